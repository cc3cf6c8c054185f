"""Whole runs: merged by weights, their adapter on llama.cpp, and what goes to the Hub, or is refused, at an endpoint.

The endpoint speaks as much of the Hub's protocol as an upload needs and is no Hub: it is here to see what would leave
the machine. The client is huggingface_hub's own, in a process that is allowed to open connections.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import MICRO
from gguf_checks import check_logits, check_tokens
from llama_cpp import LlamaCpp

from qmedtune import store
from qmedtune.errors import RecipeError
from qmedtune.export import ExportJob, export
from qmedtune.merge_folder import merge_into
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import MergeSection
from qmedtune.run import run

QUICK = ["evaluate.tasks=[]", "evaluate.perplexity=[]", "adapter.train_embeddings=false", "adapter.rslora=true"]
TERMS = "data.notes.terms=invented notes; models may be published"


class Endpoint(BaseHTTPRequestHandler):
    """Creates repositories and takes commits whose files come inside them."""

    private: dict[str, bool] = {}
    sent: dict[str, bytes] = {}
    created: list[dict] = []

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("?")[0].removesuffix("/revision/main")
        known = name in self.private
        self.answer(200 if known else 404, {"id": name, "private": self.private.get(name), "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.created.append(asked)
            known = name in self.private
            self.private.setdefault(name, asked.get("private", False) or asked.get("visibility") == "private")
            return self.answer(409 if known else 200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.sent[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            host = self.headers["Host"]
            told = {
                "commitUrl": f"http://{host}/lab/m/commit/{'1' * 40}",
                "commitOid": "1" * 40,
                "pullRequestUrl": None,
            }
            return self.answer(200, told)
        print("no answer to", self.path, file=sys.stderr)
        self.answer(404, {"error": self.path})

    def answer(self, status: int, told: dict) -> None:
        text = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Endpoint.private, Endpoint.sent, Endpoint.created = {"lab/open": False}, {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def closed_run(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on clinical notes of which nobody said that a model may be published."""
    folder = tmp_path_factory.mktemp("run") / "micro"
    loaded = load_recipe(MICRO, QUICK)
    run(loaded.recipe, loaded.text, folder, offline=True)
    return folder


@pytest.fixture(scope="module")
def open_run(closed_run: Path) -> Path:
    """The same, with terms that allow it: nothing is trained again for that."""
    loaded = load_recipe(MICRO, [*QUICK, TERMS, "merge.weights={01-cpt: 0.5}"])
    folder = closed_run.with_name("open")
    subprocess.run(["cp", "-rp", str(closed_run), str(folder)], check=True)
    run(loaded.recipe, loaded.text, folder, offline=True)
    return folder


def test_a_run_merges_its_stages_by_weight(closed_run: Path, open_run: Path, tmp_path: Path):
    told = json.loads((open_run / "run.json").read_text())
    assert told["merge"]["weights"] == {"01-cpt": 0.5, "02-sft": 1.0} and told["merge"]["violations"] == 0
    assert "weights" not in json.loads((closed_run / "run.json").read_text())["merge"]
    again = merge_into(str(closed_run), tmp_path / "again", MergeSection(weights={"01-cpt": 0.5}), offline=True)
    file = "model.safetensors"
    assert again.sha256 == told["merge"]["sha256"] == store.sha256_file(open_run / "merged" / file)
    first = merge_into(str(closed_run), tmp_path / "first", MergeSection(weights={"02-sft": 0}), offline=True)
    alone = merge_into(str(closed_run / "01-cpt" / "adapter"), tmp_path / "alone", MergeSection(), offline=True)
    assert first.sha256 == alone.sha256, "nothing of the second stage is left"
    with pytest.raises(RecipeError, match="its merge weighs the stages"):
        export(ExportJob(str(open_run), tmp_path / "adapter", "gguf-adapter", offline=True))
    with pytest.raises(RecipeError, match="no adapter of stage '03-x' is merged"):
        merge_into(str(closed_run), tmp_path / "x", MergeSection(weights={"03-x": 1}), offline=True)


def test_the_adapter_of_a_run_as_gguf_for_llama_cpp(closed_run: Path, tmp_path: Path):
    """Trained with rsLoRA; over the base's own file it is the merged model's."""
    facts = export(ExportJob(str(closed_run), tmp_path / "adapter", "gguf-adapter", offline=True))
    base = next((Path(os.environ["QMEDTUNE_CACHE"]) / "bases").glob("micro-*")) / "01-pretrain" / "model"
    export(ExportJob(str(base), tmp_path / "base", "gguf", "f32"))
    export(ExportJob(str(closed_run), tmp_path / "merged", "gguf", "f32"))
    assert facts.proof.alpha == pytest.approx(8 * 2) and facts.proof.kl < 1e-9
    with LlamaCpp(next((tmp_path / "merged").glob("*.gguf"))) as merged:
        ids = merged.tokenize("### Instruction:\nWhat does volusev treat?")
        expected = merged.logits(ids)
    with LlamaCpp(next((tmp_path / "base").glob("*.gguf"))) as reads:
        bare = reads.logits(ids)
        reads.use_adapter(next((tmp_path / "adapter").glob("*.gguf")))
        found = reads.logits(ids)
    rounded = abs(found - expected).max()  # the merged model is in bfloat16
    assert rounded < 0.1 < abs(bare - expected).max()


def test_a_trained_micro_model_on_llama_cpp(closed_run: Path, tmp_path: Path):
    """Of its base and of what was merged: token ids, logits, 48 tokens written greedily."""
    base = next((Path(os.environ["QMEDTUNE_CACHE"]) / "bases").glob("micro-*")) / "01-pretrain" / "model"
    for name, folder in (("base", base), ("merged", closed_run / "merged")):
        (tmp_path / name).mkdir()
        check_logits(folder, tmp_path / name, greedy=48)
        check_tokens(folder, tmp_path / name / "f16.gguf")


def push(run_folder: Path, endpoint: str, *more: str, repo: str = "lab/m") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qmedtune", "export", str(run_folder), "--as", "hub", "--endpoint", endpoint]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_a_test"}
    command += ["--repo", repo, "--json", *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_a_model_of_clinical_text_is_refused_before_a_connection(closed_run: Path, endpoint: str):
    for more in ([], ["--publish-clinical"]):
        done = push(closed_run, endpoint, *more)
        assert (
            done.returncode == 2 and "clinical text (notes)" in done.stderr and "models may be published" in done.stderr
        )
    assert not Endpoint.created and not Endpoint.sent


def test_terms_alone_and_a_folder_alone_are_not_enough(open_run: Path, endpoint: str):
    done = push(open_run, endpoint)
    assert done.returncode == 2 and "--publish-clinical" in done.stderr
    done = push(open_run / "merged", endpoint, "--publish-clinical")
    assert done.returncode == 2 and "give the run folder" in done.stderr
    assert not Endpoint.created


def test_what_is_allowed_goes_to_a_private_repository_with_its_card(open_run: Path, endpoint: str):
    done = push(open_run, endpoint, "--publish-clinical")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert Endpoint.private["lab/m"] is True and len(Endpoint.created) == 1
    assert set(told["files"]) == set(Endpoint.sent) and "seal.json" not in Endpoint.sent
    for name, content in Endpoint.sent.items():
        assert content == (open_run / "merged" / name).read_bytes(), name
    assert b"models may be published" in Endpoint.sent["README.md"]


def test_a_public_repository_a_bad_name_and_no_answer(open_run: Path, endpoint: str):
    done = push(open_run, endpoint, "--publish-clinical", repo="lab/open")
    assert done.returncode == 2 and "lab/open is public" in done.stderr and not Endpoint.sent
    done = push(open_run, endpoint, "--publish-clinical", repo="m")
    assert done.returncode == 2 and "OWNER/NAME" in done.stderr
    done = push(open_run, "http://127.0.0.1:9", "--publish-clinical")
    assert done.returncode == 1 and "was not reached" in done.stderr and "Traceback" not in done.stderr
    done = push(open_run, endpoint, "--publish-clinical", "--offline")
    assert done.returncode == 2 and "--offline forbids it" in done.stderr
