"""Shards that datatrove's executor writes are read by `data:` as they are. Needs the extra `datatrove`."""

import json
import random
import sys
from pathlib import Path

import pytest

from qmedtune.data.prepare import prepare_source
from qmedtune.recipe import Recipe

WORDS = [f"w{number}" for number in range(999)]
EXAMPLES = Path(__file__).parents[1] / "examples"
pytest.importorskip("datatrove")


def prepared(path, out):
    recipe = Recipe.model_validate({
        "name": "t", "model": {"base": "builtin:tiny"}, "stages": [{"cpt": {"mix": {"notes": 1}}}],
        "data": {"notes": {"path": str(path), "kind": "clinical", "split_by": "patient", "holdout": 0.3}},
    })  # fmt: skip
    out.mkdir()
    facts = prepare_source(recipe, "notes", {}, out).as_json()
    lines = [json.loads(line) for name in ("train", "heldout") for line in (out / f"{name}.jsonl").open()]
    return facts["records"], {row["id"]: (row["patient"], row["text"]) for row in lines}


def test_the_local_executor_writes_what_data_reads(tmp_path, monkeypatch):
    corpus, rng = tmp_path / "corpus", random.Random(0)
    corpus.mkdir()
    for number in range(5):
        rows = [
            {
                "note_id": f"{number}-{i}",
                "subject_id": i % 7,
                "text": " ".join(f"w{rng.randrange(999)}" for _ in range(40)),
            }
            for i in range(20)
        ]
        (corpus / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    shards = tmp_path / "shards"
    command = ["many_machines.py", str(corpus), str(shards), "--kind", "clinical", "--tasks", "3"]
    monkeypatch.setattr(sys, "argv", command)
    import many_machines

    many_machines.main()
    assert sorted(path.name for path in shards.iterdir()) == [f"0000{n}.jsonl.gz" for n in range(3)]
    direct, through = prepared(corpus, tmp_path / "direct"), prepared(shards, tmp_path / "through")
    assert through == direct and direct[0]["kept"] == 100
