"""The peers of `bench data`, each as its documentation uses it. Imported only where it is installed."""

# The peers are no dependencies of this package:
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEEDED = ("trl", "pubmed_parser", "datasketch", "lm_eval")
NUM_PERM = 128
NGRAM_WORDS = 5


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def tokenise_with_trl(texts: list[str], backend: Any, seq_len: int) -> Callable[[], Any]:
    """datasets' batched map with a fast tokenizer, then TRL's best-fit packing: what SFTTrainer(packing=True) does."""
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import PreTrainedTokenizerFast
    from trl import pack_dataset

    disable_progress_bars()
    disable_caching()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    def work() -> Any:
        def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"input_ids": tokenizer(rows["text"])["input_ids"]}

        dataset = Dataset.from_dict({"text": texts}).map(encode, batched=True, remove_columns=["text"])
        return pack_dataset(dataset, seq_len, "bfd")

    return work


def parse_with_pubmed_parser(paths: list[Path]) -> Callable[[], Any]:
    """Metadata with the abstract, and the body's paragraphs."""
    import pubmed_parser

    def work() -> None:
        for path in paths:
            pubmed_parser.parse_pubmed_xml(str(path))
            pubmed_parser.parse_pubmed_paragraph(str(path), all_paragraph=True)

    return work


def near_with_datasketch(texts: list[str], threshold: float) -> Callable[[], list[bool]]:
    """MinHashLSH over five-word shingles, one query per text before it is inserted."""
    from datasketch import MinHash, MinHashLSH

    def work() -> list[bool]:
        index = MinHashLSH(threshold=threshold, num_perm=NUM_PERM)
        found = []
        for number, text in enumerate(texts):
            words = text.lower().split()
            sketch = MinHash(num_perm=NUM_PERM)
            sketch.update_batch(
                [" ".join(words[i : i + NGRAM_WORDS]).encode() for i in range(len(words) - NGRAM_WORDS + 1)]
            )
            found.append(bool(index.query(sketch)))
            index.insert(str(number), sketch)
        return found

    return work


def search_with_janitor(texts: list[str], items: list[str]) -> Callable[[], set[int]]:
    """Janitor with 13-grams, its Python implementation; a text that it cuts is contaminated."""
    from lm_eval.decontamination.janitor import Janitor

    def work() -> set[int]:
        janitor = Janitor(ngram_n=13, window_to_remove=0, minimum_slice_length=0)
        for item in items:
            janitor.register_contaminant_python(item)
        return {number for number, text in enumerate(texts) if len(janitor.clean_python(text)) != 1}

    return work
