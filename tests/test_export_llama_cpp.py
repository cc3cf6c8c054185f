"""Exported files as a real llama.cpp reads them: token ids, logits, greedy text, adapters, the template."""

from __future__ import annotations

import json
from pathlib import Path

import llama_cpp
import llama_folders
import numpy as np
import pytest
import torch
from gguf_checks import PROMPT, check_logits, check_tokens, divergence, reference, written
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp import LlamaCpp
from llama_folders import backend, small_model, smollm2_folder, with_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qmedtune import gguf_folder, tiny
from qmedtune.data.packing import framing, templates
from qmedtune.errors import RunError
from qmedtune.export import ExportJob, export
from qmedtune.exporting import k_quants, splits
from qmedtune.exporting.gguf_adapter import write_adapter
from qmedtune.exporting.logit_proof import probe_texts
from qmedtune.exporting.read_back import GgufFile
from qmedtune.merging.disk_llama import open_llama


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of builtin:tiny, which llama.cpp's converter refuses, and random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny.build_tokenizer(tiny.world_of("builtin:tiny"))
    tokenizer.save_pretrained(str(folder))
    small_model(folder, tiny.vocab_size(tokenizer))
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Path:
    return smollm2_folder(tmp_path_factory.mktemp("smollm2"))


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_the_tiny_base(tiny_folder: Path, tmp_path: Path):
    check_tokens(tiny_folder, written(tiny_folder, tmp_path / "x.gguf"))


@pytest.mark.parametrize("name", ["llama2", "llama3_1"])
def test_real_tokenizers(name: str, tmp_path: Path):
    folder = with_tokenizer(name, tmp_path / "model")
    check_tokens(folder, written(folder, tmp_path / "x.gguf"))


@pytest.mark.parametrize("name", splits.NAMES)
def test_each_known_way_to_split_text_under_a_tokenizer_trained_anew(name: str, tmp_path: Path):
    split = splits.NAMES[name]
    trained = Tokenizer(models.BPE(ignore_merges=split.whole_words))
    trained.pre_tokenizer, trained.decoder = split.pre_tokenizer(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    trained.train_from_iterator([*llama_folders.SENTENCES, *probe_texts([]), PROMPT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(str(tmp_path))
    small_model(tmp_path, len(tokenizer) + 5)
    assert splits.name_of(backend(tmp_path)) == name
    check_tokens(tmp_path, written(tmp_path, tmp_path / "x.gguf"))


# ---- logits ----------------------------------------------------------------------------------------------------------


def test_logits_and_greedy_text_of_a_small_model_with_the_tiny_tokenizer(tiny_folder: Path, tmp_path: Path):
    check_logits(tiny_folder, tmp_path, greedy=48)


def test_llama3_tied_sharded_and_stretched(tmp_path: Path):
    folder = llama_folders.llama3_folder(tmp_path / "model")
    check_logits(folder, tmp_path, greedy=48)
    tensors = gguf_folder.gguf_header.read_header(tmp_path / "f32.gguf").tensors
    assert "rope_freqs.weight" in tensors and "output.weight" not in tensors


def test_llama2_untied(tmp_path: Path):
    folder = llama_folders.llama2_folder(tmp_path / "model", tie_word_embeddings=False)
    check_logits(folder, tmp_path, greedy=48)
    assert "output.weight" in gguf_folder.gguf_header.read_header(tmp_path / "f32.gguf").tensors


def test_the_real_model(smollm2: Path, tmp_path: Path):
    check_logits(smollm2, tmp_path, greedy=48)
    check_tokens(smollm2, tmp_path / "f16.gguf")


@pytest.mark.slow
def test_the_tiny_base(tmp_path: Path):
    from qmedtune import base
    from qmedtune.recipe import ModelSection

    folder = base.identify(ModelSection(base="builtin:tiny"), offline=True).make()
    check_logits(folder, tmp_path, greedy=48)
    check_tokens(folder, tmp_path / "f32.gguf")


# ---- adapters --------------------------------------------------------------------------------------------------------


RSLORA = {"use_rslora": True, "r": 8, "lora_alpha": 16}
PATTERNS = {"alpha_pattern": {"q_proj": 4}, "rank_pattern": {"o_proj": 3}}


@pytest.mark.parametrize("settings", [{}, RSLORA, PATTERNS], ids=["plain", "rslora", "patterns"])
def test_an_adapter_on_llama_cpp_is_the_adapter_of_peft(settings: dict, tmp_path: Path):
    from peft import PeftModel

    base = llama_folders.llama2_folder(tmp_path / "base")
    adapter = llama_folders.write_adapter(base, tmp_path / "adapter", size=0.1, **settings)
    proof = write_adapter(tmp_path / "a.gguf", open_llama(base), [adapter], "f32", title="test")
    if settings.get("use_rslora"):
        assert proof.alpha == pytest.approx(45.2548)
    ids = backend(base).encode(PROMPT).ids
    bare, adapted = reference(base), PeftModel.from_pretrained(reference(base), str(adapter))
    with torch.no_grad():
        without, expected = (model(torch.tensor([ids])).logits[0].numpy() for model in (bare, adapted))
    with LlamaCpp(written(base, tmp_path / "base.gguf")) as reads:
        reads.use_adapter(tmp_path / "a.gguf")
        found = reads.logits(ids)
    assert np.abs(expected - without).max() > 0.1, "the adapter does something"
    assert np.abs(found - expected).max() <= 1e-4


# ---- the template ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alpaca", "chat"])
def test_what_is_asked_has_one_bos(name: str, tmp_path: Path):
    """llama.cpp renders the file's template and puts bos before it."""
    folder = llama_folders.llama3_folder(tmp_path / "model")
    frame = framing.frame_in(templates.load(name, folder), folder)
    framing.publish(frame, folder)
    question = [{"role": "user", "content": "What does it treat?"}]
    [asked] = frame.ask([question])
    with LlamaCpp(written(folder, tmp_path / "x.gguf"), vocab_only=True) as reads:
        source = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(reads.template)
        text = source.render(
            messages=question, add_generation_prompt=True, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
        )
        assert reads.tokenize(text) == asked.ids
        for end in frame.ends:
            assert reads.ends_answers(end), backend(folder).id_to_token(end)


def test_an_export_of_a_folder_is_what_llama_cpp_reads(tiny_folder: Path, tmp_path: Path):
    facts = export(ExportJob(str(tiny_folder), tmp_path / "out", "gguf", "q8_0"))
    [name] = [name for name in facts.files if name.endswith(".gguf")]
    model, ids = reference(tiny_folder), backend(tiny_folder).encode(PROMPT).ids
    with LlamaCpp(tmp_path / "out" / name) as reads:
        assert divergence(model, ids, reads.logits(ids)) < 0.01
    assert 0 < facts.proof.kl < 0.01 and facts.proof.greedy is not None


# ---- K-quants, which llama.cpp computes ------------------------------------------------------------------------------


@pytest.fixture
def users_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama.cpp without its programs, as packages bring it along, named by the user."""
    monkeypatch.setenv("QMEDTUNE_LLAMA_CPP", str(llama_cpp.binaries()))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def wide_folder(folder: Path) -> Path:
    """K-quants take blocks of 256 numbers of a row."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    return llama_folders.llama3_folder(folder, **sizes)


def check_k_quant(folder: Path, out: Path, quant: str, limit: float) -> set[str]:
    """Its proof says how far the file is from the folder, and llama.cpp reads what the proof has read. Returns the
    types of its tensors."""
    made = export(ExportJob(str(folder), out, "gguf", quant))
    file = out / f"{folder.name}-{quant}.gguf"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", file.name, "proof.json", "seal.json"]
    told = json.loads((out / "proof.json").read_text())
    assert told["quantised_by"].startswith("libllama") and told["quant"] == quant
    proof = told["proof"]
    assert 0 < proof["kl"] <= limit and proof["top1"] > 0.5 and 0 <= proof["greedy"] <= 16 and proof["texts"] >= 10
    assert f"KL {proof['kl']:.2e}" in (out / "README.md").read_text()
    model, ids = reference(folder), backend(folder).encode(PROMPT).ids
    read = GgufFile.open(file)
    copied = reference(folder)
    copied.load_state_dict({name: read.load(name).float() for name in copied.state_dict()})
    with LlamaCpp(file) as reads:
        found = reads.logits(ids)
    # llama.cpp rounds what enters a quantised product to 8 bits: .009 nats of SmolLM2 with q6_k, little beside what
    # 2 to 4 bits of the weights lose
    lost = divergence(model, ids, found)
    assert lost <= limit and divergence(copied, ids, found) <= max(0.2 * lost, 0.015)
    assert made.bytes == file.stat().st_size
    return {tensor.kind for tensor in read.header.tensors.values()}


@pytest.mark.parametrize(("quant", "limit"), [("q4_k_m", 0.05), ("q6_k", 0.005)])
def test_k_quants_through_the_users_library(quant: str, limit: float, users_library: None, tmp_path: Path):
    kinds = check_k_quant(wide_folder(tmp_path / "model"), tmp_path / "out", quant, limit)
    assert {"F32", quant[:4].upper()} <= kinds


@pytest.mark.slow
@pytest.mark.parametrize("quant", k_quants.K_QUANTS)
def test_every_k_quant_of_the_real_model(quant: str, users_library: None, smollm2: Path, tmp_path: Path):
    """Its rows of 576 are no whole blocks: llama.cpp takes other types for those."""
    check_k_quant(smollm2, tmp_path / "out", quant, limit=3.0 if quant[1] in "23" else 0.3)


def test_a_llama_cpp_that_fails_leaves_nothing(users_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A library of something else under that name, and a program that ends badly."""
    model = wide_folder(tmp_path / "model")
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "libllama.so").write_bytes(b"no library")
    monkeypatch.setenv("QMEDTUNE_LLAMA_CPP", str(tmp_path / "wrong"))
    with pytest.raises(RunError, match="libllama.so failed: .*libllama.so"):
        export(ExportJob(str(model), tmp_path / "out", "gguf", "q4_k_m"))
    program = tmp_path / "wrong" / "llama-quantize"
    program.write_text("#!/bin/sh\necho 'no such type' >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(RunError, match="llama-quantize failed: no such type\nnothing was published"):
        export(ExportJob(str(model), tmp_path / "out", "gguf", "q4_k_m"))
    program.write_text('#!/bin/sh\ncp "$1" "$2"\n')
    with pytest.raises(RunError, match="wrote file type 32 for q4_k_m"):
        export(ExportJob(str(model), tmp_path / "out", "gguf", "q4_k_m"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "wrong"]
