"""Hostile run folders: what a stranger, a bad disk or a careless tool may put into one that somebody passes on.

Each case changes a copy of a good run. All commands that take a run must refuse it in six lines, or use it as if the
hostile part were not there; nothing outside of the folder is read as weights, written or removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders import make_evaluation
from hostile_folders import both, gone, link, pipe, put

from qmedtune import record, store
from qmedtune.data.packing import templates
from qmedtune.results import Run

Change = Callable[[Path], object]
REMEMBERED = json.dumps({"remembered:x": [5], "y": 1, "0" * 64: [[], 1]})
NOTE = json.dumps({"files": ["../../outside.txt"], "time": 1, "sha256": "x"})
TEMPLATE = json.dumps({"name": "x", "user": "{content.__class__}"})
EVIL_NAME = "../../ESCAPED`$(touch OWNED)`\x1b[2J\n# x"


@dataclass(frozen=True)
class RunCase:
    """must_refuse: commands that may not end well with it; the others may."""

    name: str
    change: Change
    must_refuse: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "_")


def good_run(packed: Path, model: Path, adapter: Path, out: Path) -> Path:
    """A run folder of which everything is there: packed data, an adapter, a merged model, run.json, reports."""
    from qmedtune.base import weights_sha256

    shutil.copytree(packed, out)
    for later in (*out.glob("0*-*"), out / "merged", out / "evaluation"):  # of a run that went on
        shutil.rmtree(later, ignore_errors=True)
    shutil.copytree(model, out / "merged")
    for stage in ("01-cpt", "02-sft"):
        shutil.copytree(adapter, out / stage / "adapter")
    (out / "merged" / "README.md").unlink(missing_ok=True)
    assert weights_sha256(out / "merged")
    templates.save(templates.load("alpaca"), out / "02-sft")
    store.seal(out / "01-cpt", "c" * 64, {"kind": "cpt", "seconds": 1.0, "warnings": []})
    store.seal(out / "02-sft", "e" * 64, {"kind": "sft", "seconds": 1.0, "warnings": []})
    store.seal(out / "merged", "d" * 64, {"seconds": 1.0, "warnings": []})
    (out / "evaluation").mkdir()
    (out / "evaluation" / "facts.items.jsonl").write_text(answer() + answer("facts-treats-b"))
    store.seal(out / "evaluation", "f" * 64, {"seconds": 1.0, "warnings": []})
    tasks = {"facts": make_evaluation().as_json()["tasks"]["facts"]}
    rewritten(status="finished", evaluation={"tasks": tasks})(out)
    record.render(out)
    return out


def answer(name: str = "facts-treats-a", **changes: Any) -> str:
    """A line of <task>.items.jsonl."""
    said = {"correct": True, "prediction": "It treats sepsis.", "logprobs": [-1.0, -2.0]}
    line = {
        "id": name,
        "facet": "treats",
        "gold": "It treats sepsis.",
        "base": {**said, "correct": False},
        "final": said,
    }
    return json.dumps({**line, **changes}) + "\n"


def items(content: str | bytes) -> Change:
    """Other answers, sealed as if a run had given them."""

    def change(folder: Path) -> None:
        put("evaluation/facts.items.jsonl", content)(folder)
        (folder / "evaluation" / store.SEAL).unlink()
        store.seal(folder / "evaluation", "f" * 64, {"seconds": 1.0, "warnings": []})

    return change


def scored_elsewhere(folder: Path) -> None:
    """A task whose name leads to answers outside of the run."""
    (folder.parent / "outside.items.jsonl").write_text(answer() * 3)
    raw = json.loads((folder / record.RUN).read_text())
    found = raw["evaluation"]["tasks"]["facts"]
    rewritten(evaluation={"tasks": {"../../outside": found}})(folder)


def rewritten(**changes: Any) -> Change:
    """Entries of run.json, whose own hash is made to fit."""

    def change(folder: Path) -> None:
        raw = json.loads((folder / record.RUN).read_text())
        raw.update(changes)
        raw.pop("sha256", None)
        try:
            raw["sha256"] = record.own_sha256(Run.model_validate(raw))
        except ValueError:  # it is no run any more
            raw["sha256"] = "0" * 64
        (folder / record.RUN).write_text(json.dumps(raw))

    return change


def resealed(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """A seal with other content, whose own hash is made to fit."""

    def apply(folder: Path) -> None:
        raw = json.loads((folder / name / store.SEAL).read_text())
        raw.pop("sha256")
        change(raw)
        (folder / name / store.SEAL).write_text(json.dumps({**raw, "sha256": store.sha256_json(raw)}))

    return apply


def elsewhere(raw: dict[str, Any]) -> None:
    raw["files"]["../../outside.txt"] = {"sha256": "0" * 64, "size": 1, "mtime_ns": 0}


def sealed_anew(folder: Path) -> None:
    """As somebody would who wants the weights to look sealed."""
    (folder / "merged" / store.SEAL).unlink()
    store.seal(folder / "merged", "d" * 64, {"seconds": 1.0, "warnings": []})


def linked_data(folder: Path) -> None:
    """The text lies in a folder of the user's own."""
    shutil.move(folder / "data", folder.parent / "users-own-data")
    (folder / "data").symlink_to("../users-own-data")


def no_utf8(folder: Path) -> None:
    (Path(os.fsencode(folder / "merged").decode()) / os.fsdecode(b"weights-\xff.txt")).write_text("x")


def line(step: str, loss: str) -> str:
    """Of metrics.jsonl."""
    return f'{{"stage": "01-cpt", "step": {step}, "loss": {loss}}}\n'


def model_elsewhere(path: str) -> Change:
    stage = {"name": "01-cpt", "kind": "cpt", "status": "sealed", "model": {"path": path}}
    return rewritten(stages=[stage], merge=None)


MODELS = ("eval", "predict", "export", "merge")
READ = ("report", "verify", "eval", "predict", "export", "merge", "compare")
RUNS = [
    RunCase("run json is no JSON", put("run.json", "{"), READ),
    RunCase("run json is empty", put("run.json", ""), READ),
    RunCase("run json is a list", put("run.json", "[]"), READ),
    RunCase("run json is no text", put("run.json", b"\xff\xfe\x00"), READ),
    RunCase("run json is deep", put("run.json", "[" * 200_000), READ),
    RunCase("run json is long", put("run.json", "[" + "0," * 40_000_000 + "0]"), READ),
    RunCase("run json is a pipe", pipe("run.json"), ("report", "verify", "compare")),
    RunCase("run json is a link", link("run.json", "/etc/passwd"), READ),
    RunCase("run json is null", put("run.json", "null"), READ),
    RunCase("half a surrogate", rewritten(name="\ud800 owl"), ()),
    RunCase("a name that leads elsewhere", rewritten(name=EVIL_NAME), ()),
    RunCase("a status of markup", rewritten(status="\x1b[2J<script>\n# x"), ()),
    RunCase("warnings of markup", rewritten(warnings=["```\n<script>alert(1)</script>\x1b]0;x\x07"] * 50), ()),
    RunCase("a recipe of markup", rewritten(recipe_text="```\n# x\n<script>alert(1)</script>\n`````"), ("verify",)),
    RunCase("a recipe that is none", rewritten(recipe={"model": "x"}), MODELS),
    RunCase("a recipe without stages", rewritten(recipe={}), MODELS),
    RunCase("a recipe that names a file", rewritten(recipe={"name": "x", "model": {"base": "/etc"}}), MODELS),
    RunCase("steps that lead elsewhere", rewritten(steps=[{"name": "../../..", "status": "sealed"}]), ("verify",)),
    RunCase("stages of a wrong type", rewritten(stages={"a": 1}), READ),
    RunCase("figures of a wrong type", rewritten(data={"notes": {"records": {"read": "many"}}}), READ),
    RunCase("a model elsewhere", model_elsewhere("../../outside"), MODELS[:3]),
    RunCase("a model at an absolute path", model_elsewhere("/etc"), MODELS[:3]),
    RunCase("a model of another type", rewritten(stages=[{"name": "x", "kind": "x", "status": "x", "model": 5}]), READ),
    RunCase("a seal with names elsewhere", resealed("merged", elsewhere), ("verify", *MODELS[:3])),
    RunCase("a seal that is deep", put("merged/seal.json", "[" * 200_000), ("verify", *MODELS[:3])),
    RunCase("a seal that is a pipe", pipe("merged/seal.json"), ("verify",)),
    RunCase("a seal without types", put("02-sft/seal.json", '{"files": 5, "sha256": "x"}'), ("verify", "merge")),
    RunCase("weights that are a pipe", both(pipe("merged/model.safetensors")), ("verify", *MODELS[:3])),
    RunCase("weights in another folder", link("merged/model.safetensors", "/etc/passwd"), ("verify", *MODELS[:3])),
    RunCase("a pickle beside the weights", both(put("merged/pytorch_model.bin", b"\x80\x04x"), sealed_anew), ()),
    RunCase("code beside the weights", both(put("merged/evil.py", "open('OWNED', 'w')\n"), sealed_anew), ()),
    RunCase("a name that is no UTF-8", no_utf8, ("verify", *MODELS[:3])),
    RunCase("metrics that are no text", put("metrics.jsonl", b"\xff\xfe\x00\n\x1b[2J"), ("verify",)),
    RunCase("metrics that are a pipe", pipe("metrics.jsonl"), ("verify",)),
    RunCase("metrics without end", put("metrics.jsonl", line("1", "1e999") * 9), ("verify",)),
    RunCase("metrics of huge steps", put("metrics.jsonl", line("1e400", "1")), ("verify",)),
    RunCase("a heartbeat that is a pipe", pipe("heartbeat.json"), ()),
    RunCase("a heartbeat that is deep", put("heartbeat.json", "[" * 200_000), ()),
    RunCase("remembered hashes that are deep", put(".hashes.json", "[" * 200_000), ()),
    RunCase("remembered hashes of wrong types", put(".hashes.json", REMEMBERED), ()),
    RunCase("remembered hashes that are a pipe", pipe(".hashes.json"), ()),
    RunCase("an erasure of files elsewhere", put("erased.json", NOTE), ()),
    RunCase("an erasure that is a pipe", pipe("erased.json"), ()),
    RunCase("a lock that is a pipe", both(gone(".lock"), pipe(".lock")), ()),
    RunCase("a lock that leads elsewhere", link(".lock", "../outside.txt"), ()),
    RunCase("text that lies elsewhere", linked_data, ()),
    RunCase("answers that are no JSON", items("{\n"), ("items",)),
    RunCase("answers that are no text", items(b"\xff\xfe\x00\n"), ("items",)),
    RunCase("answers that are deep", items("[" * 200_000), ("items",)),
    RunCase("answers of wrong types", items(answer(base={"correct": []}, facet={}, draw="x")), ()),
    RunCase("answers of markup", items(answer(EVIL_NAME, facet="<script>x</script>", gold="</td>\x1b[2J")), ()),
    RunCase("answers of a million options", items(answer(final={"correct": True, "logprobs": [-1.0] * 10**6})), ()),
    RunCase("answers that are a pipe", pipe("evaluation/facts.items.jsonl"), ("items", "verify")),
    RunCase("answers of another file", link("evaluation/facts.items.jsonl", "/etc/passwd"), ("items", "verify")),
    RunCase("answers from elsewhere", scored_elsewhere, ("items",)),
    RunCase("a page that leads elsewhere", link("items.html", "../outside.txt"), ()),
    RunCase("a template that is code", put("merged/template.json", TEMPLATE), ("verify", *MODELS[:3])),
]  # fmt: skip
