"""Folders for vLLM and transformers: copied, then read as those programs read them, and compared.

Checked is what goes wrong in the field: a tensor that transformers would fill with random numbers, a tokenizer of other
ids, a template that asks otherwise than training did. For serving by LoRA an adapter keeps its PEFT form, where vLLM
can read it. Deliberately not here: servers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from qmedtune import store
from qmedtune.data.packing.framing import frame_in
from qmedtune.data.packing.tokens import load_codec
from qmedtune.errors import RecipeError, RunError
from qmedtune.evaluation.open_model import Location
from qmedtune.exporting.card import README, write_card
from qmedtune.exporting.logit_proof import probe_texts
from qmedtune.merging.disk_llama import open_llama
from qmedtune.merging.reference import read_model as read_by_transformers
from qmedtune.model import load_tokenizer, open_tokenizer
from qmedtune.model_stack import ADAPTER_CONFIG, ADAPTER_TENSORS, read_adapter, read_model
from qmedtune.results import ExportProof

LEFT = (store.SEAL, README)  # the card is written anew, with the model's below it
QUESTION = ({"role": "user", "content": "What does it treat?"},)
# What `--max-lora-rank` of vLLM takes (its documentation of LoRA adapters).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def copy_model(location: Location, folder: Path, title: str, serve: str) -> ExportProof:
    """A model folder, checked. Raises RunError where transformers reads something else than there is."""
    source = location.base
    open_llama(source)  # 16-bit or fp32 weights of a LLaMA
    load_tokenizer(source)
    files = [path for path in sorted(source.iterdir()) if path.is_file() and path.name not in LEFT]
    store.check_room(folder, sum(path.stat().st_size for path in files), "the copy")
    for path in files:
        shutil.copyfile(path, folder / path.name)
    proof = ExportProof(tensors=_check_weights(source, folder), template=False)
    if _encoded_otherwise(folder):
        proof = proof.model_copy(update={"tokenizer_class": _name_the_class(folder)})
    proof = proof.model_copy(update={"texts": _check_tokenizer(folder)})
    asked = "without a chat template"
    if location.template.source or (folder / "chat_template.jinja").is_file():
        _check_template(location, folder)
        proof = proof.model_copy(update={"template": True})
        asked = "asked with the trained template"
    lines = [
        "A copy that was read back as transformers reads it, and compared with what was trained:",
        "",
        f"- {proof.tensors} tensors equal bit by bit; token ids equal on {proof.texts} texts",
        f"- {asked}",
        "",
        serve,
    ]
    write_card(folder, title, lines, source)
    return proof


def _check_weights(source: Path, folder: Path) -> int:
    """How many tensors transformers reads from the copy as they stand in the source."""
    stored = open_llama(source)
    tensor = stored.weights[next(iter(stored.weights.files))]
    read = read_by_transformers(folder, tensor.dtype)
    if read.unexpected:
        raise RunError(f"{folder}: tensor {read.unexpected[0]} is none of a LLaMA\nnothing was published")
    for name, parameter in read.parameters.items():
        if not torch.equal(parameter, stored.source(name).to(parameter.dtype)):
            raise RunError(f"{source}: {name} is read otherwise than it is stored\nnothing was published")
    return len(read.parameters)


def _name_the_class(folder: Path) -> str:
    """transformers rebuilds some tokenizers in another form than their file has (LLaMA-2's); under this class it takes
    the file as it is. Returns the class."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    store.write_json(path, config)
    return config["tokenizer_class"]


def _check_tokenizer(folder: Path) -> int:
    """How many texts transformers' tokenizer of the folder encodes as training did. RunError where it does not."""
    if text := _encoded_otherwise(folder):
        raise RunError(
            f"{folder}: transformers' tokenizer encodes {text[:40]!r} otherwise than training did\n"
            "nothing was published; look at tokenizer_config.json"
        )
    return len(probe_texts(sorted(load_codec(folder).special_tokens)))


def _encoded_otherwise(folder: Path) -> str | None:
    """The first text of which transformers' tokenizer makes other ids than training did."""
    tokenizer = open_tokenizer(folder)
    codec = load_codec(folder)
    codec.backend.encode_special_tokens = False
    texts = probe_texts(sorted(codec.special_tokens))
    for text in texts:
        trained = codec.backend.encode(text, add_special_tokens=False).ids
        if tokenizer(text, add_special_tokens=False).input_ids != trained:
            return text
    return None


def _check_template(location: Location, folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    [asked] = frame_in(location.template, folder).ask([list(QUESTION)])
    text = tokenizer.apply_chat_template(list(QUESTION), add_generation_prompt=True, tokenize=False)
    if text != asked.text:
        raise RunError(
            f"{folder}: chat_template.jinja asks otherwise than training did\nmerge the run again: qmedtune merge"
        )


def check_numbers(adapter: Path) -> None:
    """RunError where an adapter holds values that are no numbers: it diverged, or was damaged."""
    with safe_open(adapter / ADAPTER_TENSORS, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            if not bool(torch.isfinite(tensors.get_tensor(name)).all()):
                raise RunError(
                    f"{adapter}: {name} holds values that are no numbers\nnothing was published; train it again"
                )


# ---- an adapter as it is ---------------------------------------------------------------------------------------------


def copy_adapter(location: Location, folder: Path, title: str) -> ExportProof:
    """The PEFT adapter for `vllm serve --enable-lora`. RecipeError for one that vLLM does not read."""
    [source] = location.adapters
    adapter = read_adapter(source, read_model(location.base).shapes)
    merge = f"merge it instead: qmedtune merge {source} --out MERGED, and serve that"
    if adapter.full:
        raise RecipeError(f"{source}: holds a trained copy of {adapter.full[0]}, which vLLM does not serve\n{merge}")
    if adapter.config.rank_pattern or adapter.config.alpha_pattern:
        raise RecipeError(f"{source}: has ranks or alphas of their own for some layers, which vLLM ignores\n{merge}")
    rank = next((rank for rank in VLLM_RANKS if rank >= adapter.config.r), None)
    if rank is None:
        raise RecipeError(f"{source}: has rank {adapter.config.r}, vLLM serves up to {VLLM_RANKS[-1]}\n{merge}")
    check_numbers(source)
    for name in (ADAPTER_CONFIG, ADAPTER_TENSORS):
        shutil.copyfile(source / name, folder / name)
    frame = frame_in(location.template, location.base)
    (folder / "chat_template.jinja").write_text(frame.template.jinja(), encoding="utf-8")
    command = f"vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules {title}=FOLDER"
    lines = [
        f"The adapter ({len(adapter.low_rank)} updates, rank {adapter.config.r}) over the base it was trained on:",
        "",
        f"`{command} --chat-template FOLDER/chat_template.jinja --host 127.0.0.1`",
    ]
    write_card(folder, title, lines, source)
    return ExportProof(modules=len(adapter.low_rank), rank=adapter.config.r, max_lora_rank=rank)
