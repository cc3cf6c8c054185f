"""From `path:` of a recipe to files: folders, patterns and variables expanded, what is no data left out and counted.

A licence, a readme or a list of checksums is never a document, wherever it lies; of a folder, what no reader claims is
left out. Both are counted by extension for the ledger: files found = files read + files unread. A file that the recipe
names itself is read whatever it is called.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from qmedtune.data.reading.files import plain_suffix
from qmedtune.disk import unmounted_drive
from qmedtune.errors import DataError
from qmedtune.hashes import read_checked
from qmedtune.recipe import SourceSection

BUILTIN = "builtin:"
SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text", ".nxml": "jats", ".tar": "jats", ".tgz": "jats", ".xml": "xml",
    ".hl7": "hl7", ".nbib": "medline", ".pubtator": "pubtator", ".zip": "zip", ".docx": "docx", ".xlsx": "xlsx",
    ".pdf": "pdf",
}  # fmt: skip
# Of a folder these are read only where nothing else is: PMC's packages hold every article as XML and as PDF.
OFFICE = (".docx", ".xlsx", ".pdf")
# What a format is written in, where `format:` names one and a folder holds other files as well.
SUFFIXES_OF = {
    "jats": (".nxml", ".xml", ".tar", ".tgz"), "pubmed": (".xml",), "text": (".txt", ".text", ".md"), "pdf": (".pdf",),
    "csv": (".csv", ".txt"), "tsv": (".tsv", ".txt"), "parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson", ".json"),
    "json": (".json", ".jsonl", ".ndjson"), "hl7": (".hl7", ".txt"), "docx": (".docx",), "xlsx": (".xlsx",),
}  # fmt: skip
STRAY = re.compile(
    r"(read[-_ ]?me|licen[cs]e|copying|copyright|notice|change(s|log)|contributing|authors|citation|code_of_conduct"
    r"|security|(md5|sha\d*)(sums?|checksums?)?|checksums?|index|requirements|manifest)([-_.].*)?",
    re.IGNORECASE,
)
STRAY_SUFFIXES = ("", ".txt", ".md", ".text", ".rst")
STRAY_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "datapackage.json")
CXR_REPORT = re.compile(r"s\d+\.txt")
SHARDS = ".shards.json"  # beside shards of ours: their sizes by name
LFS_MARK = b"version https://git-lfs.github.com/spec"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?$")  # owner/name:configuration@revision
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|_KEY$|^KEY$", re.I)
VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Listing:
    """The files of a source in order, and those that were found and are not read."""

    files: tuple[Path, ...]
    unread: tuple[Path, ...] = ()


def source_files(source: SourceSection) -> list[Path]:
    """The files of a source, sorted; [] for `builtin:` and Hub ids. Raises DataError for what cannot be data."""
    return list(list_source(source).files)


def list_source(source: SourceSection) -> Listing:
    """The files of a source and what is left out. Raises DataError for what cannot be data."""
    if source.is_builtin or hub_dataset(source):
        return Listing(())
    found = []
    for path in source.paths:
        found.append(_expand(with_variables(path), source.format))
    files = tuple(chain.from_iterable(listing.files for listing in found))
    for file in files:
        _check_file(file)
    return Listing(files, tuple(chain.from_iterable(listing.unread for listing in found)))


def by_extension(files: tuple[Path, ...]) -> Counter[str]:
    """How many files of each extension; `no extension` for those without."""
    return Counter(file.suffix.lower() or "no extension" for file in files)


def hub_dataset(source: SourceSection) -> str | None:
    """A Hub id: `format: huggingface`, one `owner/name`, and no such folder here."""
    if source.format != "huggingface" or not isinstance(source.path, str) or Path(source.path).exists():
        return None
    if HUB_ID.match(source.path):
        return source.path
    return None


def with_variables(path: str) -> str:
    """`path` with ${VARIABLES} and ~ put in. Raises DataError for a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if SECRET_NAME.search(name):
            raise DataError(
                f"{path}: {name} looks like a secret, and paths are shown in messages and kept in reports\n"
                "put the path in a variable of another name, or write it"
            )
        if name not in os.environ:
            raise DataError(f"{path}: the environment variable {name} is not set\nexport {name}=... or write the path")
        return os.environ[name]

    return str(Path(os.path.expanduser(VARIABLE.sub(value, path))))


def unset_variables(path: str) -> list[str]:
    """The variables in `path` that the environment does not have."""
    return [name for name in VARIABLE.findall(path) if name not in os.environ]


def data_suffix(file: Path) -> str:
    """The extension that says what a file is, below compression."""
    if file.suffix.lower() == ".tgz":
        return ".tgz"
    return plain_suffix(file)


def is_stray(file: Path) -> bool:
    """Whether a file's name says that it is about the data and none of it."""
    if file.name.startswith(".") or file.name.lower() in STRAY_FILES:
        return True
    return file.suffix.lower() in STRAY_SUFFIXES and STRAY.fullmatch(file.stem) is not None


def _expand(path: str, format: str) -> Listing:
    here = Path(path)
    if here.is_file():
        return Listing((here,))
    if here.is_dir():
        return _folder(here, format)
    matches = sorted(Path(match) for match in glob.glob(path, recursive=True))
    files = []
    for file in matches:
        if file.is_file():
            files.append(file)
    if not files:
        if glob.has_magic(path):
            what = "nothing matches this pattern"
        else:
            what = "no such file or folder"
        advice = unmounted_drive(here) or "give a file, a folder or a pattern such as /data/pmc/**/*.nxml"
        raise DataError(f"{path}: {what}\n{advice}")
    return _chosen(files, format, path)


def _folder(folder: Path, format: str) -> Listing:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    _check_shards(folder)
    return _chosen(files, format, str(folder))


def _check_shards(folder: Path) -> None:
    """DataError where shards that a job of ours has written (data/shards/) are not all in `folder` and whole."""
    sizes = read_checked(folder / SHARDS)
    if sizes is None:
        return
    bad: list[str] = []
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            bad.append(name)
    if bad:
        raise DataError(
            f"{folder}: {len(bad)} of {len(sizes)} shards are missing or cut off: {', '.join(bad[:3])}\n"
            "copy them again, or give the command that made them again: it makes those anew"
        )


def _chosen(files: list[Path], format: str, where: str) -> Listing:
    """Which of the files of a folder or pattern are data. Raises DataError where none is."""
    if format == "huggingface":
        return Listing(tuple(files))
    data = []
    for file in files:
        if not is_stray(file):
            data.append(file)
    if format == "mimic_cxr":
        data = [file for file in data if CXR_REPORT.fullmatch(file.name)]
    elif format == "auto":
        data = [file for file in data if data_suffix(file) in SUFFIXES]
        data = [file for file in data if data_suffix(file) not in OFFICE] or data
    elif suffixes := SUFFIXES_OF.get(format):
        data = [file for file in data if data_suffix(file) in suffixes] or data
    if not data:
        seen = ", ".join(sorted(by_extension(tuple(files)))[:8]) or "it is empty"
        if format == "mimic_cxr":
            allowed = "reports are s<digits>.txt"
        else:
            allowed = ", ".join(SUFFIXES)
        raise DataError(f"{where}: no readable file in this folder ({seen})\nallowed: {allowed}, also .gz and .zst")
    taken = set(data)
    return Listing(tuple(data), tuple(file for file in files if file not in taken))


def _check_file(file: Path) -> None:
    try:
        str(file).encode()
    except UnicodeEncodeError as error:
        shown = str(file).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise DataError(
            f"{shown}: the name of this file is not UTF-8\nrename it, and give the command again"
        ) from error
    try:
        with file.open("rb") as stream:
            head = stream.read(len(LFS_MARK))
    except OSError as error:
        raise DataError(f"{file}: cannot be opened ({error.strerror})") from error
    if not head:
        raise DataError(f"{file}: the file is empty\nremove it from the source or fetch it again")
    if head == LFS_MARK:
        raise DataError(f"{file}: a Git LFS pointer, not the data\nrun `git lfs pull` where it came from")
