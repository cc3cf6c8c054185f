"""Word, Excel and PDF files, by the libraries of the extra `office`: what they say, not how they look.

What is lost is told in the ledger: of Word headers, footers and images, of Excel all sheets but the first with a
header, of PDF the layout, tables and images; a PDF whose pages are pictures has no text and is refused.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from qmedtune.data.reading import csvs
from qmedtune.data.reading.document import Document, Fields
from qmedtune.data.reading.files import MAX_MEMBER_BYTES, open_bytes
from qmedtune.data.reading.rejects import Damaged, RefusedRecord, Unread
from qmedtune.data.reading.xml_files import Numbered
from qmedtune.errors import DataError

TOO_LONG = f"longer than {MAX_MEMBER_BYTES >> 20} MiB unpacked"
# What the three libraries raise on files that are none of theirs or cut short; they document no common class.
BROKEN = (ValueError, KeyError, OSError, TypeError, AttributeError, IndexError, AssertionError, RuntimeError)
BROKEN += (zipfile.BadZipFile, SyntaxError, EOFError, NotImplementedError)


def _need(module: str, path: Path) -> None:
    if find_spec(module) is None:
        raise DataError(f"{path}: needs {module}, which is an extra\npip install 'qmedtune[office]'")


def _too_long(file: IO[bytes]) -> bool:
    """Whether a zip container unpacks to more than is held."""
    with zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
    file.seek(0)
    return size > MAX_MEMBER_BYTES


def read_docx(path: Path) -> Iterator[Numbered]:
    """Paragraphs and table rows of a Word document in order, headings as `#` lines."""
    _need("docx", path)
    from docx import Document as open_docx

    try:
        with open_bytes(path) as file:
            if _too_long(file):
                yield 1, Damaged(f"Word document {TOO_LONG}")
                return
            blocks = [_block(block) for block in open_docx(file).iter_inner_content()]  # pyright: ignore
    except BROKEN:
        yield 1, Damaged("Word document is truncated or corrupt")
        return
    text = "\n\n".join(block for block in blocks if block)
    unread = ("headers, footers and images of Word",)
    yield 1, Document(path.stem, text, unread=unread) if text else RefusedRecord("Word document without text")


def _block(block: Any) -> str:
    if hasattr(block, "rows"):
        return "\n".join(_table_row(row) for row in block.rows)
    text, style = block.text.strip(), (block.style.name or "") if block.style is not None else ""
    level = style.removeprefix("Heading ")
    return f"{'#' * int(level)} {text}" if text and style.startswith("Heading ") and level.isdecimal() else text


def _table_row(row: Any) -> str:
    return "\t".join(" ".join(cell.text.split()) for cell in row.cells)


def read_xlsx(path: Path) -> Iterator[Numbered]:
    """Rows of the first sheet with a header; `number` is the row of the sheet."""
    _need("openpyxl", path)
    from openpyxl import load_workbook

    number = 0
    try:
        with open_bytes(path) as file:
            if _too_long(file):
                yield 1, Unread(f"Excel file {TOO_LONG}")
                return
            book = load_workbook(file, read_only=True, data_only=True)
            for number, fields in _sheets(book):
                yield number, fields
    except BROKEN:
        yield number + 1, Unread("Excel file is truncated or corrupt from here on")


def _sheets(book: Any) -> Iterator[Numbered]:
    fault = "no sheet with a header"
    for sheet in book.worksheets:
        rows = (
            (number, cells) for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1) if any(cells)
        )
        number, cells = next(rows, (1, ()))
        names = []
        for cell in cells:
            names.append("" if cell is None else str(cell).strip())
        while names and not names[-1]:
            names.pop()
        if names:
            fault = csvs.header_fault(names)
        if not fault:
            yield from ((number, _row(names, cells)) for number, cells in rows)
            return
    yield 1, Unread(f"{fault} (Excel)")


def _row(names: list[str], cells: tuple[Any, ...]) -> Fields | Damaged:
    """Cells by name; numbers as they are written, dates in ISO's form, empty cells as empty text."""
    if any(cell is not None for cell in cells[len(names) :]):
        return Damaged("wrong number of columns")
    filled = [*cells, *([None] * (len(names) - len(cells)))]
    pairs = zip(names, filled, strict=False)
    found = {}
    for i, (name, cell) in enumerate(pairs):
        found[name or f"column{i}"] = _cell(cell)
    return found


def _cell(cell: Any) -> str | int | float | bool:
    if cell is None:
        return ""
    if isinstance(cell, str | int | float | bool):
        return cell
    if hasattr(cell, "isoformat"):
        return cell.isoformat()
    return str(cell)


def read_pdf(path: Path) -> Iterator[Numbered]:
    """The text of a PDF, page after page."""
    _need("pypdf", path)
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it prints what it mends, file by file
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        with open_bytes(path) as file:
            reader = PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):
                yield 1, RefusedRecord("PDF is encrypted")
                return
            pages = []
            for page in reader.pages:
                pages.append((page.extract_text() or "").strip())
    except (*BROKEN, PyPdfError, RecursionError):
        yield 1, Damaged("PDF is truncated or corrupt")
        return
    text = "\n\n".join(page for page in pages if page)
    unread = ("layout, tables and images of PDF",)
    yield (
        1,
        Document(path.stem, text, unread=unread) if text else RefusedRecord("PDF without text (pictures of pages?)"),
    )
