"""From `path:` and `format:` of a recipe to a stream of records: finds files, picks the reader, keeps the ledger.

Readers live in rows.py (JSON, CSV, text), xml.py (JATS, PubMed), notes.py (report trees, emrQA, BioC) and
tables.py (Parquet, Hugging Face folders). Damaged records are counted and named, never raised. Nothing is
downloaded: a Hub id is read by the `datasets` library only when `format: huggingface` asks for it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmedtune.data import notes, rows, tables, xml
from qmedtune.data.files import ARCHIVE_ERRORS, plain_suffix
from qmedtune.data.instructions import instruction_record
from qmedtune.data.records import text_record
from qmedtune.data.rejects import Damaged, Refused, Rejects, Unusable
from qmedtune.disk import unmounted_drive
from qmedtune.errors import DataError
from qmedtune.recipe import SourceSection

BUILTIN = "builtin:"
SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".txt": "text", ".text": "text", ".md": "text", ".nxml": "jats", ".tar": "jats", ".tgz": "jats", ".xml": "xml",
}  # fmt: skip
Reader = Callable[[Path], Iterator[tuple[int, Any]]]
READERS: dict[str, Reader] = {
    "jsonl": rows.read_jsonl, "json": rows.read_json, "csv": rows.read_csv, "tsv": rows.read_tsv,
    "text": rows.read_text, "jats": xml.read_jats, "pubmed": xml.read_pubmed, "parquet": tables.read_parquet,
    "mimic_cxr": notes.read_mimic_cxr,
}  # fmt: skip
# Schemas in JSON or JSON lines, told apart by their keys; naming them only skips the guess from the extension.
JSON_SCHEMAS = ("s2orc", "bioc", "emrqa", "pubmedqa", "medqa", "medmcqa")
LFS_MARK = b"version https://git-lfs.github.com/spec"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?$")  # owner/name:configuration@revision
VERSIONED = "_versioned"
VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Deleted:
    """Stands in a stream for the PubMed ids that a file withdraws."""

    pmids: tuple[str, ...]


Item = tuple[str, int, dict[str, Any] | Damaged | Refused | Deleted]


def source_files(source: SourceSection) -> list[Path]:
    """The files of a source, sorted; [] for `builtin:` and Hub ids. Raises DataError for what cannot be data."""
    paths = [source.path] if isinstance(source.path, str) else list(source.path)
    if all(path.startswith(BUILTIN) for path in paths) or hub_dataset(source):
        return []
    found = [file for path in paths for file in _expand(with_variables(path), source.format)]
    for file in found:
        _check_file(file)
    return found


def with_variables(path: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise DataError(f"{path}: the environment variable {name} is not set\nexport {name}=... or write the path")
        return os.environ[name]

    return str(Path(VARIABLE.sub(value, path)).expanduser())


def _expand(path: str, format: str) -> list[Path]:
    here = Path(path)
    if here.is_file():
        return [here]
    if here.is_dir():
        return _folder(here, format)
    matches = sorted(Path(match) for match in glob.glob(path, recursive=True))
    files = [file for file in matches if file.is_file()]
    if not files:
        what = "nothing matches this pattern" if glob.has_magic(path) else "no such file or folder"
        advice = unmounted_drive(here) or "give a file, a folder or a pattern such as /data/pmc/**/*.nxml"
        raise DataError(f"{path}: {what}\n{advice}")
    return files


def _folder(folder: Path, format: str) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    known = [file for file in files if format != "auto" or _suffix(file) in SUFFIXES]
    if not known:
        seen = ", ".join(sorted({file.suffix or "no extension" for file in files})[:8]) or "it is empty"
        raise DataError(
            f"{folder}: no readable file in this folder ({seen})\nallowed: {', '.join(SUFFIXES)}, also .gz and .zst"
        )
    return known


def _check_file(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            head = stream.read(len(LFS_MARK))
    except OSError as error:
        raise DataError(f"{file}: cannot be opened ({error.strerror})") from error
    if not head:
        raise DataError(f"{file}: the file is empty\nremove it from the source or fetch it again")
    if head == LFS_MARK:
        raise DataError(f"{file}: a Git LFS pointer, not the data\nrun `git lfs pull` where it came from")


def _suffix(file: Path) -> str:
    return ".tgz" if file.suffix == ".tgz" else plain_suffix(file)


def format_of(file: Path, format: str) -> str:
    """The reader's name for a file: `format:` unless that is `auto`, then its extension and, for .xml, its root."""
    if format in JSON_SCHEMAS:
        return "jsonl" if _suffix(file) in (".jsonl", ".ndjson") else "json"
    if format != "auto":
        return format
    known = SUFFIXES.get(_suffix(file))
    if known is None:
        raise DataError(
            f"{file}: unknown extension {file.suffix or '(none)'}\n"
            f"allowed: {', '.join(SUFFIXES)}, also .gz and .zst; or name the `format:`"
        )
    return xml.root_format(file) if known == "xml" else known


def read_records(name: str, source: SourceSection, rejects: Rejects) -> Iterator[dict[str, Any]]:
    """Records of a source in a fixed order: text records, or for `kind: instructions` records with messages.

    `name` is the source's name in the recipe. What cannot be used goes to `rejects`, whose `at` tells file and line
    of the record just given; with `max_records` reading stops early. PubMed updates replace earlier versions.
    """
    seen, num = PmidSet(), 0
    for file, line, item in read_items(source):
        rejects.at = (file, line)
        if isinstance(item, (Damaged, Refused)):
            rejects.add(item)
        elif isinstance(item, Deleted):
            seen.update(item.pmids)
        elif item.pop(VERSIONED, False) and seen.add(item["pmid"]):
            rejects.superseded()
        else:
            yield item
            num += 1
            if num == source.max_records:
                return


def read_items(source: SourceSection, files: list[Path] | None = None) -> Iterator[Item]:
    """(file, line, record | what stands for an unusable one) of a source, or of some of its `reading_order`.

    PubMed records carry `VERSIONED`: the first of a PMID that is met is the one to keep, unless a `Deleted` that names
    it came before. Both are for the caller to apply, because they reach across files.
    """
    shape = instruction_record if source.kind == "instructions" else text_record
    if source.format == "huggingface":
        stream = _dataset_rows(source)
    else:
        files = files or reading_order(source)
        stream = (row for file in files for row in _file_rows(file, source)) if files else _builtin_rows(source)
    for file, line, fields in stream:
        yield file, line, _shaped(shape, fields, source.columns)


def reading_order(source: SourceSection) -> list[Path]:
    """The files of a source: PubMed's from the newest to the oldest, then all others by name."""
    files = source_files(source)
    formats = [format_of(file, source.format) for file in files]
    pubmed = [file for file, format in zip(files, formats, strict=True) if format == "pubmed"]
    return [*reversed(pubmed), *(file for file, format in zip(files, formats, strict=True) if format != "pubmed")]


def _shaped(shape: Callable, fields: Any, columns: dict[str, str]) -> dict[str, Any] | Damaged | Refused | Deleted:
    if isinstance(fields, (Damaged, Refused, Deleted)):
        return fields
    try:
        record = shape(fields, columns)
    except Unusable as error:
        return Damaged(str(error))
    if isinstance(record, dict):
        record |= {key: fields[key] for key in ("held_out", "language", VERSIONED) if key in fields}
    return record


def _builtin_rows(source: SourceSection) -> Iterator[tuple[str, int, dict[str, Any]]]:
    from qmedtune.data import outcomes

    for path in [source.path] if isinstance(source.path, str) else source.path:
        for number, fields in enumerate(outcomes.builtin_records(path), start=1):
            yield path, number, fields


def hub_dataset(source: SourceSection) -> str | None:
    """A Hub id: `format: huggingface`, one `owner/name`, and no such folder here."""
    if source.format != "huggingface" or not isinstance(source.path, str) or Path(source.path).exists():
        return None
    return source.path if HUB_ID.match(source.path) else None


def _dataset_rows(source: SourceSection) -> Iterator[tuple[str, int, dict[str, Any]]]:
    paths = [source.path] if isinstance(source.path, str) else source.path
    for path in paths:
        stream = tables.read_hub(path) if hub_dataset(source) else tables.read_saved(Path(with_variables(path)))
        for number, fields in stream:
            yield path, number, fields


def _file_rows(file: Path, source: SourceSection) -> Iterator[tuple[str, int, Any]]:
    format = format_of(file, source.format)
    if format == "pubmed":
        yield from _latest_first(file)
        return
    number = 0
    try:
        for number, fields in _with_answer_base(READERS[format], file):
            for record in notes.expand(fields, source.kind == "instructions"):
                yield str(file), number, record
    except ARCHIVE_ERRORS:
        yield str(file), number + 1, Damaged("archive is truncated or corrupt from here on")


def _with_answer_base(reader: Reader, file: Path) -> Iterator[tuple[int, Any]]:
    """MedMCQA's `cop` counts from 0 or from 1: a file that holds a 4 counts from 1, and is read twice to know it."""
    stream = reader(file)
    first = next(stream, None)
    if first is None:
        return
    if not isinstance(first[1], dict) or "cop" not in first[1]:
        yield first
        yield from stream
        return
    answers = {fields.get("cop") for _, fields in reader(file) if isinstance(fields, dict)}
    base = 1 if 4 in answers and 0 not in answers else 0
    for number, fields in reader(file):
        yield number, {**fields, "_cop_base": base} if isinstance(fields, dict) else fields


def _latest_first(file: Path) -> Iterator[tuple[str, int, Any]]:
    """What a PubMed file deletes, then its records from the last to the first; one file is held in memory."""
    items = list(xml.read_pubmed(file))
    deleted = [pmid for _, item in items if isinstance(item, dict) for pmid in item.get("deleted", ())]
    if deleted:
        yield str(file), 1, Deleted(tuple(deleted))
    for number, item in reversed(items):
        if not isinstance(item, dict):
            yield str(file), number, item
        elif "deleted" not in item:
            yield str(file), number, {**item, VERSIONED: True}


class PmidSet:
    """A bitmap over PubMed ids that grows as needed: 8 MB for the 40 million there are."""

    def __init__(self) -> None:
        self._bits = bytearray(1 << 20)

    def __contains__(self, pmid: str) -> bool:
        at = int(pmid) if pmid.isdecimal() else -1
        return 0 <= at < 8 * len(self._bits) and bool(self._bits[at >> 3] >> (at & 7) & 1)

    def update(self, pmids: Iterable[str]) -> None:
        for pmid in pmids:
            self.add(pmid)

    def add(self, pmid: str) -> bool:
        """True if it was there already."""
        if pmid in self or not pmid.isdecimal() or len(pmid) > 9:
            return pmid in self
        at = int(pmid)
        if at >= 8 * len(self._bits):
            self._bits.extend(bytes((at >> 3) + 1 + (1 << 20) - len(self._bits)))
        self._bits[at >> 3] |= 1 << (at & 7)
        return False
