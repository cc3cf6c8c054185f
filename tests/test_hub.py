"""A base from the Hub: what its client is told is what the user is told. The Hub is a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import MICRO

BASE = "meta-llama/Llama-3.2-1B"


@contextmanager
def hub(status: int, code: str | None) -> Iterator[str]:
    """The address of a Hub that answers everything with `status` and, in its header, the error `code`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def refused(place: Path, address: str, token: str | None) -> str:
    """What `qmedtune run` says on stderr, in a process of its own: the Hub's client reads its address at import."""
    drop = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(place / "home"), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "qmedtune", "run", str(MICRO), "--out", "run", "--set", f"model.base={BASE}"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 6 and not (place / "run").exists()
    return done.stderr


@pytest.mark.parametrize(
    "status, code, token, says",
    [
        (401, "GatedRepo", None, ("is gated", f"https://huggingface.co/{BASE}", "hf auth login")),
        (403, "GatedRepo", "hf_x", ("is gated", "this login has no access yet", f"https://huggingface.co/{BASE}")),
        (404, "RepoNotFound", "hf_x", ("no model", "this login may not see it", "check the name")),
        (401, None, "hf_x", ("does not know this login", "hf auth login")),
        (500, None, None, ("the Hub was not reached", f"hf download {BASE}", "builtin:tiny")),
    ],
    ids=[
        "no token",
        "a token without access",
        "a name that is not there",
        "a token that is wrong",
        "a Hub that is down",
    ],
)
def test_a_base_that_cannot_be_had(tmp_path, status, code, token, says):
    with hub(status, code) as address:
        told = refused(tmp_path, address, token)
    for words in says:
        assert words in told, told


def test_weights_that_are_a_git_lfs_pointer(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 64}
    config |= {"intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    command = [sys.executable, "-m", "qmedtune", "run", str(MICRO), "--out", "run", "--set", f"model.base={base}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Git LFS pointer" in done.stderr and "git lfs pull" in done.stderr and str(base) in done.stderr


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_the_plan_looks_where_the_hub_library_keeps_models(variable, tmp_path):
    """A model that was downloaded is known, whatever names the cache: the folder is the one that a run will take."""
    below = {"XDG_CACHE_HOME": "huggingface/hub", "HF_HOME": "hub"}.get(variable, "")
    repository = tmp_path / below / "models--someone--llama"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 96}
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8, **shape}))
    code = (
        "from huggingface_hub import snapshot_download\n"
        "from qmedtune.planning.shapes import base_facts\n"
        "from qmedtune.recipe import ModelSection\n"
        "print(base_facts(ModelSection(base='someone/llama')).folder)\n"
        "print(snapshot_download('someone/llama', local_files_only=True))\n"
    )
    named = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    environment = {key: value for key, value in os.environ.items() if key not in named}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, variable: str(tmp_path)}
    )
    assert done.stdout.splitlines() == [str(snapshot)] * 2, done.stderr
