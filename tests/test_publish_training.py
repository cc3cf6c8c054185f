"""The page made from training results: every row is told, measured or not."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "kernels" / "benchmarks"
TRAINED = {
    "contender": "qmedtune", "value": 1000.0, "spread": [900.0, 1100.0], "ratio": 1.2, "unit": "tokens/s",
    "what": "ours", "utilisation": 0.512, "first_step_s": 3.0, "peak_memory_bytes": 2**30, "device_bytes": 2**31,
    "host_bytes": 2**30,
}  # fmt: skip
ABSENT = {"contender": "unsloth", "value": None, "unit": "tokens/s", "what": "theirs", "absent": "not installed"}
CONTEXT = {
    "case": "24 GiB",
    "contender": "qmedtune",
    "value": 78_000,
    "unit": "tokens",
    "predicted": 99_000,
    "settled": False,
}
LOADED = {"case": "nf4", "contender": "qmedtune", "value": 9.5, "unit": "s", "what": "shards", "host_bytes": 2**30,
          "next_stage_s": 0.25, "checkpoint_s": 0.5, "largest_shard_bytes": 2**30, "weight_bytes": 2**32}  # fmt: skip

BEST = {**TRAINED, "setting": {"micro_batch": 2, "checkpointing": True}, "layers": {"cheap": 14, "recompute": 18}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, bench, rows in [
        ("8b", "train", [TRAINED, ABSENT]),
        ("long", "context", [CONTEXT]),
        ("load", "load", [LOADED]),
        ("best", "train", [BEST]),
    ]:
        result = {
            "bench": bench,
            "device": "a card",
            "versions": {"torch": "2.13"},
            "job": {"shape": "8b", "micro_batch": 3},
            "rows": rows,
        }
        (tmp_path / f"card.{name}.json").write_text(json.dumps(result))
    (tmp_path / "card.raw.json").write_text("{}")
    return tmp_path


def test_the_page_tells_every_row(folder: Path):
    subprocess.run([sys.executable, SCRIPTS / "publish_training.py", folder], check=True)
    page = (folder / "README.md").read_text()
    assert (
        "| qmedtune | 1,000 (900 to 1,100) | 1.20 | 51.2% | 3.0 s | 1.00 GiB | 2.00 GiB | 1.00 GiB | - | ours |" in page
    )
    assert "| unsloth | - | - | - | - | - | - | - | - | not installed |" in page
    assert "| 24 GiB | 78,000 or more | 99,000 |" in page and "| shards | 9.50 | 0.25 | 0.50 | 1.00 GiB |" in page
    charts = sorted(path.name for path in folder.glob("*.svg"))
    assert charts == ["card.8b.svg", "card.best.svg", "card.load.svg", "card.long.svg"] and all(
        name in page for name in charts
    )
    assert "ours; at its best: 2 rows at a time, layers 14 cheap, 18 recompute |" in page
    assert page.count("micro_batch 3") == 3  # not where it was searched
    assert "unsloth" not in (folder / "card.8b.svg").read_text()


def test_the_script_names_options_that_exist():
    """run_gpu.sh meets its first card in a lease of minutes: its arguments are checked here."""
    script = (SCRIPTS / "run_gpu.sh").read_text()
    subprocess.run(["bash", "-n", SCRIPTS / "run_gpu.sh"], check=True)
    shown = subprocess.run(["bash", SCRIPTS / "run_gpu.sh"], capture_output=True, text=True, check=False)
    assert shown.returncode == 2 and all(part in shown.stdout for part in ("kernels", "train", "memory", "ablation"))
    assert importlib.util.find_spec("qmedtune.__main__")

    from qmedtune.bench import train

    named = {name for word in script.replace('"', " ").split() if "qmedtune" in word for name in word.split(",")}
    known = {name for name in named if name in train.CONTENDERS}
    assert {"qmedtune", "qmedtune-reference", "trl-tuned", "unsloth"} <= known
    left_out = script.partition("left_out=")[2].split()[0].split(",")
    assert set(left_out) == {name for name in train.CONTENDERS if name.startswith("without-")}
