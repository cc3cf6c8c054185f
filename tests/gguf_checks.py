"""Exported files held against the folder they were made from, by a real llama.cpp (llama_cpp.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_cpp import LlamaCpp
from llama_folders import backend
from transformers import AutoModelForCausalLM

from qmedtune.exporting import gguf_model
from qmedtune.exporting.logit_proof import probe_texts
from qmedtune.exporting.types import QUANTS
from qmedtune.exporting.vocabulary import read_vocabulary
from qmedtune.merging.disk_llama import open_llama

PROMPT = "The patient was given aspirin 100 mg for chest pain; BP 120/80 mmHg.\n\nQuestion: what was it for? Answer:"


def written(folder: Path, out: Path, quant: str = "f32") -> Path:
    """The folder's file, without the proof: llama.cpp is the judge here."""
    model = open_llama(folder)
    gguf_model.write_model(
        out, model, read_vocabulary(folder, model.model.config.vocab_size), QUANTS[quant], title="test"
    )
    return out


def check_tokens(folder: Path, file: Path) -> None:
    ours = backend(folder)
    special = sorted(token.content for token in ours.get_added_tokens_decoder().values() if token.special)
    with LlamaCpp(file, vocab_only=True) as reads:
        for text in [*probe_texts(special), PROMPT, ""]:
            for marks in (True, False):
                expected = ours.encode(text, add_special_tokens=marks).ids
                assert reads.tokenize(text, marks=marks) == expected, (text, marks)


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def divergence(model: Any, ids: list[int], found: np.ndarray) -> float:
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    ours = torch.from_numpy(found).double().log_softmax(-1)
    return float((expected.exp() * (expected - ours)).sum(-1).mean())


def check_logits(folder: Path, work: Path, *, greedy: int) -> None:
    """f32 to 1e-9, f16 to 1e-5 nats per token; what f16 writes is what transformers writes."""
    model, ids = reference(folder), backend(folder).encode(PROMPT).ids
    for quant, limit in (("f32", 1e-9), ("f16", 1e-5)):
        with LlamaCpp(written(folder, work / f"{quant}.gguf", quant)) as reads:
            assert divergence(model, ids, reads.logits(ids)) <= limit, quant
            if quant == "f16":
                model.generation_config.eos_token_id = None  # llama.cpp does not stop there either
                expected = model.generate(torch.tensor([ids]), max_new_tokens=greedy, do_sample=False)
                assert reads.greedy(ids, greedy) == expected[0, len(ids) :].tolist()
