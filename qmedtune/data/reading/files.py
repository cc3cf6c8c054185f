"""Opening what researchers have on disk: plain, .gz and .zst files, read in bounded memory.

A line longer than `MAX_RECORD_BYTES` and a truncated or corrupt archive become `Damaged` entries; reading goes on
where that is possible. Nothing here knows a format, and nothing is unpacked to disk.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

from qmedtune.data.reading.rejects import Damaged, Unread

# The longest full-text article of the PMC open-access subset is about 5 MB of XML; a longer line is a broken file.
MAX_RECORD_BYTES = 8 << 20
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
MAX_MEMBER_BYTES = 256 << 20  # of a tar or zip archive, unpacked; the members are read one at a time
ARCHIVE_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, tarfile.TarError, zipfile.BadZipFile)
BROKEN_ARCHIVE = Unread("archive is truncated or corrupt from here on")


def open_bytes(path: Path) -> IO[bytes]:
    """A binary stream of the file's content, decompressed where it is gzip or Zstandard by its first bytes (`.gz` that
    a browser has unpacked keeps its name). `archive.zip/member` is read out of its archive."""
    archive = _zip_of(path)
    if path.suffix.lower() not in (".gz", ".zst"):
        if archive:
            return _member(archive, path)
        return path.open("rb")
    if archive:
        stream = io.BufferedReader(cast(io.RawIOBase, _member(archive, path)))
    else:
        stream = path.open("rb")
    head = stream.peek(4)[:4]
    if head.startswith(GZIP):
        return cast(IO[bytes], _closing(gzip.GzipFile(fileobj=stream), stream))
    if head.startswith(ZSTD):
        frames = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True, closefd=True)
        return io.BufferedReader(cast(io.RawIOBase, frames))
    return stream


def _closing(packed: gzip.GzipFile, stream: IO[bytes]) -> gzip.GzipFile:
    """A gzip stream that closes the file below it too, as it does with a file that it has opened itself."""
    packed.myfileobj = stream  # pyright: ignore[reportAttributeAccessIssue] - typed as a file of its own, used for its close() only
    return packed


def _zip_of(path: Path) -> Path | None:
    """The zip archive that a path goes into, None for a path of the file system."""
    if ".zip" not in str(path).lower():
        return None
    return next((parent for parent in path.parents if parent.suffix.lower() == ".zip" and parent.is_file()), None)


def _member(archive: Path, path: Path) -> IO[bytes]:
    return zipfile.ZipFile(archive).open(path.relative_to(archive).as_posix())


def in_archive(path: Path) -> bool:
    """Whether a path goes into a zip archive, where only `open_bytes` finds it."""
    return _zip_of(path) is not None


def plain_suffix(path: Path) -> str:
    """`.xml` for `a.xml.gz`: the extension below the compression, in lower case."""
    suffixes = []
    for s in path.suffixes:
        suffixes.append(s.lower())
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    if len(suffixes) > 1 and suffixes[-2:] == [".tar"]:
        return ".tar"
    if suffixes:
        return suffixes[-1]
    return ""


def lines(path: Path) -> Iterator[tuple[int, bytes | Damaged]]:
    """(line number from 1, line without its newline). The stream ends where an archive is broken."""
    with open_bytes(path) as file:
        yield from lines_of(file)


def lines_of(file: IO[bytes]) -> Iterator[tuple[int, bytes | Damaged]]:
    """`lines` of a file that is open."""
    number = 0
    try:
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                yield number, Damaged(f"line longer than {MAX_RECORD_BYTES >> 20} MiB")
                continue
            yield number, line.rstrip(b"\r\n")
    except ARCHIVE_ERRORS:
        yield number + 1, BROKEN_ARCHIVE


def text_lines(path: Path) -> Iterator[tuple[int, str | Damaged]]:
    """`lines` as text."""
    with open_bytes(path) as file:
        yield from text_lines_of(file)


def text_lines_of(file: IO[bytes]) -> Iterator[tuple[int, str | Damaged]]:
    """`text_lines` of a file that is open."""
    for number, line in lines_of(file):
        yield number, line if isinstance(line, Damaged) else text_of(line)


def head_of(path: Path, size_bytes: int) -> bytes:
    """How a file begins; b"" where its archive is broken."""
    try:
        with open_bytes(path) as file:
            return file.read(size_bytes)
    except ARCHIVE_ERRORS:
        return b""


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(MAX_RECORD_BYTES)) and not rest.endswith(b"\n"):
        pass


def text_of(data: bytes) -> str | Damaged:
    """UTF-8 with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Damaged("not UTF-8")
