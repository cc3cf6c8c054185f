"""Opening what researchers have on disk: plain, .gz and .zst files, read in bounded memory.

A line longer than `MAX_RECORD_BYTES` and a truncated or corrupt archive become `Damaged` entries; reading goes on
where that is possible. Nothing here decodes text or knows a format, and nothing is unpacked to disk.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

from qmedtune.data.rejects import Damaged

# The longest full-text article of the PMC open-access subset is about 5 MB of XML; a longer line is a broken file.
MAX_RECORD_BYTES = 8 << 20
ARCHIVE_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, tarfile.TarError)


def open_bytes(path: Path) -> IO[bytes]:
    """A binary stream of the file's content, decompressed by its last extension."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        frames = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(cast(io.RawIOBase, frames))
    return path.open("rb")


def plain_suffix(path: Path) -> str:
    """`.xml` for `a.xml.gz`: the extension below the compression, in lower case."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    if len(suffixes) > 1 and suffixes[-2:] == [".tar"]:
        return ".tar"
    return suffixes[-1] if suffixes else ""


def lines(path: Path) -> Iterator[tuple[int, bytes | Damaged]]:
    """(line number from 1, line without its newline). The stream ends where an archive is broken."""
    number = 0
    with open_bytes(path) as file:
        try:
            while line := file.readline(MAX_RECORD_BYTES + 1):
                number += 1
                if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                    _skip_line(file)
                    yield number, Damaged(f"line longer than {MAX_RECORD_BYTES >> 20} MiB")
                    continue
                yield number, line.rstrip(b"\r\n")
        except ARCHIVE_ERRORS:
            yield number + 1, Damaged("archive is truncated or corrupt from here on")


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(MAX_RECORD_BYTES)) and not rest.endswith(b"\n"):
        pass


def text_of(data: bytes) -> str | Damaged:
    """UTF-8 with or without a byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Damaged("not UTF-8")
