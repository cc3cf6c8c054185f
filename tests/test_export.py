"""`qmedtune export`: what is made, what proves it, and what is refused, by the command line and on real folders."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import llama_folders
import pytest
import torch
from llama_folders import backend, small_model, with_tokenizer
from safetensors.torch import load_file, save_file

from qmedtune import cli, tiny
from qmedtune.errors import RecipeError, RunError
from qmedtune.export import ExportJob, export
from qmedtune.exporting import gguf_model, place, splits, tensor_names
from qmedtune.exporting.gguf_model import rope_factors
from qmedtune.exporting.read_back import GgufFile
from qmedtune.gguf_header import read_arrays
from qmedtune.merging.disk_llama import open_llama
from qmedtune.results import Exported


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the tokenizer of builtin:micro."""
    made = tmp_path_factory.mktemp("model")
    tokenizer = tiny.build_tokenizer(tiny.world_of("builtin:micro"))
    tokenizer.save_pretrained(str(made))
    small_model(made, tiny.vocab_size(tokenizer))
    return made


@pytest.fixture
def llama3(tmp_path: Path) -> Path:
    return llama_folders.llama3_folder(tmp_path / "llama3")


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code and stderr of `qmedtune export`."""
    code = cli.invoke(["export", *map(str, words)])
    return code, capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code, err = said(capsys, *words)
    lines = [line for line in err.splitlines() if not line.startswith(("writing", "proving"))]
    assert code in (1, 2) and 2 <= len(lines) <= 6, err
    return err


def edited(folder: Path, file: str, **keys: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# ---- what is made ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_type_is_written_and_proven(quant: str, folder: Path, tmp_path: Path):
    facts = export(ExportJob(str(folder), tmp_path / "out", "gguf", quant))
    proof = facts.as_json()["proof"]
    assert proof["kl"] <= {"f32": 1e-9, "f16": 1e-5, "bf16": 1e-3, "q8_0": 1e-3}.get(quant, 0.2)
    assert proof["texts"] >= 10 and (proof["greedy"] is None) == (quant in ("f32", "f16", "bf16"))
    [file] = [name for name in facts.files if name.endswith(".gguf")]
    header = GgufFile.open(tmp_path / "out" / file).header
    assert header.tensors["blk.0.ffn_up.weight"].kind == quant.upper()
    assert header.tensors["blk.0.attn_norm.weight"].kind == "F32"
    assert json.loads((tmp_path / "out" / "proof.json").read_text())["proof"] == proof
    assert f"KL {proof['kl']:.2e}" in (tmp_path / "out" / "README.md").read_text()


def test_a_row_that_is_not_made_of_blocks_is_kept_in_f16(tmp_path: Path, folder: Path):
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    small_model(odd, json.loads((folder / "config.json").read_text())["vocab_size"], intermediate_size=88)
    export(ExportJob(str(odd), tmp_path / "out", "gguf", "q4_0"))
    tensors = GgufFile.open(next((tmp_path / "out").glob("*.gguf"))).header.tensors
    assert tensors["blk.0.ffn_down.weight"].kind == "F16" and tensors["blk.0.ffn_up.weight"].kind == "Q4_0"


def test_the_same_export_again_changes_nothing_and_another_is_refused(folder: Path, tmp_path: Path, capsys):
    words = (folder, "--as", "gguf", "--quant", "f16", "--out", tmp_path / "out")
    assert said(capsys, *words)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    code, err = said(capsys, *words)
    assert code == 0 and "nothing was changed" in err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    words = (folder, "--as", "gguf", "--quant", "q8_0", "--out", tmp_path / "out")
    assert "is not this export" in refused(capsys, *words)
    assert not list(tmp_path.glob(".out*"))


def test_stretched_positions_are_transformers_own(llama3: Path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = open_llama(llama3).model.config
    factors = rope_factors(config)
    plain = 500000.0 ** (-torch.arange(0, 32, 2) / 32)
    assert factors is not None and factors.min() == 1 and factors.max() == 32
    assert torch.allclose(plain / factors, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-5)


def test_sentencepiece_types_and_scores(tmp_path: Path):
    base = llama_folders.llama2_folder(tmp_path / "base")
    facts = export(ExportJob(str(base), tmp_path / "out", "gguf", "f16"))
    keys = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "scores")]
    lists = read_arrays(tmp_path / "out" / facts.files[1], keys)
    tokens, types, scores = (lists[key] for key in keys)
    assert len(tokens) == 448 and types[:3] == [2, 3, 3] and types[3:259] == [6] * 256
    assert tokens[-1] == "[PAD447]" and types[-1] == 5
    merges = json.loads((base / "tokenizer.json").read_text())["model"]["merges"]
    ranks = [scores[tokens.index("".join(merge))] for merge in merges]
    assert ranks == sorted(ranks, reverse=True), "what is merged first has the highest score"


# ---- the proof finds what is wrong -----------------------------------------------------------------------------------


def test_rows_that_are_not_turned_are_found(folder: Path, tmp_path: Path, monkeypatch):
    """Without it the text is still plausible: the commonest fault of converters."""
    monkeypatch.setattr(gguf_model, "row_order", lambda *_: None)
    with pytest.raises(RunError, match="nats per token"):
        export(ExportJob(str(folder), tmp_path / "out", "gguf", "f32"))
    assert not list(tmp_path.iterdir())


def test_a_wrong_name_of_the_split_is_found(folder: Path, tmp_path: Path):
    with pytest.raises(RunError, match="becomes other tokens"):
        export(ExportJob(str(folder), tmp_path / "out", "gguf", "f16", pre="llama-bpe"))


def test_left_out_factors_are_found(llama3: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gguf_model, "rope_factors", lambda config: None)
    with pytest.raises(RunError, match="positions are stretched otherwise"):
        export(ExportJob(str(llama3), tmp_path / "out", "gguf", "f16"))


def test_a_lost_head_is_found(tmp_path: Path, monkeypatch):
    base = llama_folders.llama2_folder(tmp_path / "base")
    monkeypatch.setitem(tensor_names.ENDS, "lm_head.weight", "output.weight")
    model = open_llama(base)
    real = gguf_model._tensors

    def without_head(*arguments):
        return [tensor for tensor in real(*arguments) if tensor.name != "output.weight"]

    monkeypatch.setattr(gguf_model, "_tensors", without_head)
    with pytest.raises(RunError, match="nats per token"):
        export(ExportJob(str(base), tmp_path / "out", "gguf", "f32"))
    assert not model.tied


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_unknown_types_and_k_quants_without_llama_cpp(folder: Path, tmp_path: Path, capsys, monkeypatch):
    err = refused(capsys, folder, "--as", "gguf", "--quant", "q9_z", "--out", tmp_path / "out")
    assert "'q9_z'" in err and "q4_0" in err
    monkeypatch.setenv("QMEDTUNE_LLAMA_CPP", str(tmp_path))
    err = refused(capsys, folder, "--as", "gguf", "--quant", "q4_k_m", "--out", tmp_path / "out")
    assert "llama-quantize" in err and "QMEDTUNE_LLAMA_CPP" in err
    assert "keeps the folder's own numbers" in refused(
        capsys, folder, "--as", "vllm", "--quant", "f16", "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_model(tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no run, model or adapter" in refused(capsys, tmp_path / "empty", "--as", "gguf", "--out", tmp_path / "out")
    base = llama_folders.llama2_folder(tmp_path / "base")
    adapter = llama_folders.write_adapter(base, tmp_path / "adapter")
    err = refused(capsys, adapter, "--as", "gguf", "--base", base, "--out", tmp_path / "out")
    assert "qmedtune merge" in err and "--as gguf-adapter" in err
    assert "no adapter is there" in refused(capsys, base, "--as", "gguf-adapter", "--out", tmp_path / "out")
    shutil.move(base, tmp_path / "gone")
    err = refused(capsys, adapter, "--as", "gguf-adapter", "--offline", "--out", tmp_path / "out")
    assert "base" in err and not (tmp_path / "out").exists()


def test_an_adapter_with_trained_embeddings_has_no_gguf_form(llama3: Path, tmp_path: Path, capsys):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    adapter = llama_folders.write_adapter(llama3, tmp_path / "adapter", **settings)
    for form in ("gguf-adapter", "vllm"):
        err = refused(capsys, adapter, "--as", form, "--base", llama3, "--out", tmp_path / "out")
        assert "trained copy" in err and "qmedtune merge" in err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "--pre NAME"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
         "--pre NAME"),
    ],
)  # fmt: skip
def test_tokenizers_that_gguf_cannot_express(change: dict, told: str, folder: Path, tmp_path: Path, capsys):
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    edited(odd, "tokenizer.json", **change)
    assert told in refused(capsys, odd, "--as", "gguf", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_name_is_guessed_for_an_unknown_split(folder: Path):
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert splits.name_of(tokenizer) == "gpt-2"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])
    assert splits.name_of(tokenizer) is None


def test_numbers_that_f16_cannot_hold(folder: Path, tmp_path: Path):
    odd = tmp_path / "odd"
    shutil.copytree(folder, odd)
    weights = load_file(odd / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(weights, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="not finite as F16"):
        export(ExportJob(str(odd), tmp_path / "out", "gguf", "f16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


def test_a_disk_that_is_full_in_the_middle(folder: Path, tmp_path: Path, monkeypatch):
    """The error that the system gives at the second tensor's data."""
    real = gguf_model._write_data
    left = [1]

    def write(*arguments):
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        real(*arguments)

    monkeypatch.setattr(gguf_model, "_write_data", write)
    with pytest.raises(RunError, match="the disk is full; nothing was published"):
        export(ExportJob(str(folder), tmp_path / "out", "gguf", "f16"))
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(gguf_model, "_write_data", real)
    export(ExportJob(str(folder), tmp_path / "out", "gguf", "f16"))


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(RecipeError, match="is there already"):
        place.publish(tmp_path / "out", "key", lambda folder: Exported())
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_for_transformers_is_checked(llama3: Path, tmp_path: Path):
    facts = export(ExportJob(str(llama3), tmp_path / "out", "transformers"))
    assert facts.proof.texts > 10 and facts.proof.template
    for path in llama3.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_tokenizer_that_transformers_rebuilds_otherwise_is_named_as_it_is(tmp_path: Path):
    """LLaMA-2's class drops a blank that the file keeps."""
    from transformers import AutoTokenizer

    real = with_tokenizer("llama2", tmp_path / "model")
    facts = export(ExportJob(str(real), tmp_path / "out", "vllm"))
    assert facts.proof.tokenizer_class == "PreTrainedTokenizerFast"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(" x", add_special_tokens=False).input_ids
    assert ids == backend(real).encode(" x", add_special_tokens=False).ids
    assert ids != AutoTokenizer.from_pretrained(real)(" x", add_special_tokens=False).input_ids


def test_an_adapter_for_vllm(llama3: Path, tmp_path: Path):
    adapter = llama_folders.write_adapter(llama3, tmp_path / "adapter", r=12, target_modules=["q_proj", "up_proj"])
    facts = export(ExportJob(str(adapter), tmp_path / "out", "vllm", base=str(llama3)))
    assert facts.proof.as_json() == {"modules": 4, "rank": 12, "max_lora_rank": 16}
    assert "--max-lora-rank 16" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    odd = llama_folders.write_adapter(llama3, tmp_path / "odd", target_modules=["q_proj"], rank_pattern={"q_proj": 4})
    with pytest.raises(RecipeError, match="which vLLM ignores"):
        export(ExportJob(str(odd), tmp_path / "other", "vllm", base=str(llama3)))
