"""Parquet files and Hugging Face datasets, read in batches with the libraries that `datasets` brings.

A Hub id is only opened by `format: huggingface`, in streaming mode, and needs a network; a folder made by
`save_to_disk` does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmedtune.data.reading.document import Fields
from qmedtune.data.reading.files import MAX_RECORD_BYTES, in_archive, open_bytes
from qmedtune.data.reading.rejects import Damaged, Unread
from qmedtune.data.reading.row_formats import Row
from qmedtune.errors import DataError

BATCH_ROWS = 1024
MAX_GROUP_BYTES = 2 << 30  # of one column of one row group, unpacked; writers make groups of some 100 MB
# Of a batch, at worst: a column with a dictionary can repeat its longest entry in every row.
MAX_BATCH_BYTES = 1 << 30
MAX_GROWTH = (
    1000  # of a file as it is unpacked, beyond a batch of that size; text packs to a third, codes to a hundredth
)
TOO_LONG = Damaged(f"record longer than {MAX_RECORD_BYTES >> 20} MiB")


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file, `BATCH_ROWS` at a time; `line` is the row from 1."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(open_bytes(path) if in_archive(path) else path) as file:
            rows = _batch_rows(file.metadata)
            if rows == 0:
                yield 1, Unread(f"Parquet column longer than {MAX_GROUP_BYTES >> 30} GiB unpacked")
                return
            unpacked, stored = 0, max(1, sum(_column_bytes(file.metadata)))
            for batch in file.iter_batches(batch_size=rows):
                unpacked += batch.nbytes
                if unpacked > MAX_BATCH_BYTES and unpacked > MAX_GROWTH * stored:
                    yield number + 1, Unread(f"Parquet file unpacks to more than {MAX_GROWTH} times its size")
                    return
                for row in batch.to_pylist():
                    number += 1
                    yield number, TOO_LONG if batch.nbytes > MAX_RECORD_BYTES and _is_long(row) else row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError):
        yield number + 1, Unread("Parquet file is truncated or corrupt")


def _is_long(row: Fields) -> bool:
    """As a line of JSON lines would be (files.py)."""
    return sum(len(value) for value in row.values() if isinstance(value, str | bytes)) > MAX_RECORD_BYTES


def _chunks(metadata: Any) -> Iterator[Any]:
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            yield metadata.row_group(group).column(column)


def _column_bytes(metadata: Any) -> Iterator[int]:
    for chunk in _chunks(metadata):
        yield chunk.total_compressed_size


def _batch_rows(metadata: Any) -> int:
    """Rows that can be unpacked at once whatever the pages hold; 0: not even one."""
    rows = BATCH_ROWS
    for chunk in _chunks(metadata):
        if chunk.total_uncompressed_size > MAX_GROUP_BYTES:
            return 0
        if chunk.has_dictionary_page:
            rows = min(rows, MAX_BATCH_BYTES // max(1, chunk.total_uncompressed_size))
    return max(1, rows)


def read_saved(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a dataset folder made by `save_to_disk` (of its `train` split where it has several)."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(
            f"{path}: not a folder made by datasets' save_to_disk\ngive that folder, or a Hub id"
        ) from error
    if isinstance(dataset, DatasetDict):
        if "train" in dataset:
            dataset = dataset["train"]
        else:
            dataset = next(iter(dataset.values()))
    yield from enumerate(dataset, start=1)


def read_hub(name: str) -> Iterator[tuple[int, Fields]]:
    """Rows of a Hub dataset's `train` split, streamed. `name`: `owner/dataset:configuration@revision`, the
    last two as wanted."""
    from datasets import load_dataset

    dataset, _, revision = name.partition("@")
    where, _, configuration = dataset.partition(":")
    try:
        stream = load_dataset(where, configuration or None, split="train", streaming=True, revision=revision or None)
        yield from enumerate(stream, start=1)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: this Hub dataset cannot be read ({type(error).__name__})\n"
            "check the name, log in where it is gated, or save it with `save_to_disk` and give that folder"
        ) from error
