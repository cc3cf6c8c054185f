"""Exported files as a real llama.cpp reads them: token ids, logits, greedy text, adapters, the template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_folders
import numpy as np
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp import LlamaCpp
from llama_folders import backend, small_model, smollm2_folder, with_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qmedtune import gguf_folder, tiny
from qmedtune.data.packing import framing, templates
from qmedtune.export import ExportJob, export
from qmedtune.exporting import gguf_model, splits
from qmedtune.exporting.gguf_adapter import write_adapter
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
