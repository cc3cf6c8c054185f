"""The spine: what is cached, what is made again and why, who may run, what a refused or damaged run leaves."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path

import pytest
from builders import unknown_keys
from conftest import MICRO
from stages import stop_after

from qmedtune import cli, interrupt, store, ui
from qmedtune.errors import RecipeError, RunError
from qmedtune.parsing.loader import load_recipe
from qmedtune.results import Run
from qmedtune.run import run
from qmedtune.smoke import smoke
from qmedtune.step_status import status
from qmedtune.training.trainer import QTrainer

TRAINED = ("01-cpt", "02-sft")


def run_micro(out: Path, *settings: str, **options) -> Run:
    loaded = load_recipe(MICRO, settings)
    return run(loaded.recipe, loaded.text, out, offline=True, **options)


def contents(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Every file with its inode, time and hash."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns, store.sha256_file(p)) for p in files}


def digests(out: Path) -> dict[str, str]:
    steps = json.loads((out / "run.json").read_text())["steps"]
    seals = {step["name"]: store.read_seal(out / step["name"]) for step in steps}
    return {name: sealed.digest for name, sealed in seals.items() if sealed}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run_micro(out).finished
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_run_json_has_the_promised_names(finished: Path):
    result = json.loads((finished / "run.json").read_text())
    assert [stage["name"] for stage in result["stages"]] == ["01-cpt", "02-sft"]
    for stage in result["stages"]:
        assert {"name", "kind", "status", "seconds", "key", "tokens", "mixture", "adapter", "loss", "tokens_per_s",
                "peak_memory_bytes"} <= stage.keys()  # fmt: skip
        assert stage["tokens"].keys() == {"read", "kept", "split", "dropped", "supervised", "trained"}
        adapter = finished / stage["adapter"]["path"] / "adapter_model.safetensors"
        assert store.sha256_file(adapter) == stage["adapter"]["sha256"]
    promised = {"path", "base", "modules", "kl", "top1", "max_abs_logit_diff", "sha256"}
    assert promised | {"elements", "violations", "rounding", "lost", "swallowed", "dtype"} <= result["merge"].keys()
    facts = result["evaluation"]["tasks"]["facts"]
    assert {"accuracy", "ci95", "n"} <= facts["base"].keys() & facts["final"].keys()
    assert facts["facets"].keys() == {"treats", "adverse"}
    assert result["evaluation"]["perplexity"]["literature"].keys() >= {"base", "final"}
    assert {"versions", "device", "base_revision", "base_sha256", "git"} <= result["provenance"].keys()
    at_the_root = ("metrics.jsonl", "report.html", "report.md", "evaluation.json")
    for name in (*at_the_root, "evaluation/facts.items.jsonl", "merged/README.md"):
        assert (finished / name).is_file(), name


def test_run_json_is_written_again_byte_for_byte(finished: Path):
    """Every key has a name and a type in results/: what a step writes beside them would be read by nobody."""
    written = (finished / "run.json").read_text(encoding="utf-8")
    run = Run.model_validate_json(written)
    assert json.dumps(run.as_json(), indent=1, ensure_ascii=False) + "\n" == written
    assert unknown_keys(run) == []


def test_the_token_ledger_adds_up(finished: Path):
    for stage in json.loads((finished / "run.json").read_text())["stages"]:
        tokens = stage["tokens"]
        assert tokens["read"] == tokens["kept"] + tokens["dropped"]
        assert tokens["trained"] == sum(source["tokens"] for source in stage["mixture"].values())
        metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
        assert max(m["tokens"] for m in metrics if m["stage"] == stage["name"] and "loss" in m) == tokens["trained"]


def test_a_finished_run_changes_nothing(copy: Path):
    run_micro(copy)
    before = contents(copy)
    assert run_micro(copy).finished
    assert contents(copy) == before


@pytest.mark.parametrize("text", ["{}", "[]", "null"])
def test_a_damaged_run_json_is_written_again(copy: Path, text: str):
    """Also one that still says `finished`: a flipped bit elsewhere must not be shown as a result."""
    whole = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(text if text != "{}" else json.dumps({**whole, "seed": 18}))
    assert run_micro(copy).finished
    assert json.loads((copy / "run.json").read_text())["seed"] == whole["seed"]


def test_one_sft_key_makes_sft_and_what_follows_again(copy: Path):
    before = digests(copy)
    result = run_micro(copy, "stages[1].sft.lr=7e-4")
    assert result.finished
    after = digests(copy)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"02-sft", "merged", "evaluation"}
    # What was paid for is kept, and comes back without training when the old value does.
    assert (copy / ".history").is_dir()
    run_micro(copy)
    assert digests(copy) == before


def test_an_attempt_that_is_edited_away_is_put_aside_and_told(tmp_path: Path, capfd):
    """Stopped in 01-cpt, its rate edited: it begins anew and says why (test_store: it comes back with the old rate)."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(interrupt.Interrupted):
        patch.setattr("qmedtune.train.StageCallback.on_step_end", stop_after(4))
        run_micro(tmp_path, until="01-cpt")
    interrupt.stop.signal = None
    attempt = tmp_path / ".building" / "01-cpt" / store.SCRATCH / "checkpoint-4"
    assert attempt.is_dir()
    run_micro(tmp_path, "stages[0].cpt.lr=1e-3", until="01-cpt")
    assert "01-cpt begins anew, its interrupted attempt is put aside: training.lr was" in capfd.readouterr().err
    assert list(tmp_path.glob(".history/*01-cpt-partial-*/scratch/checkpoint-4"))


def test_an_interrupted_merge_leaves_the_old_result(copy: Path, finished: Path):
    old = digests(copy)["merged"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match="injected"):
        patch.setattr("qmedtune.merge.check_readings", raises(RunError("injected")))
        run_micro(copy, "merge.dtype=float32")
    assert store.intact(copy / "merged", full=True) and digests(copy)["merged"] == old
    assert json.loads((copy / "run.json").read_text())["status"] == "failed"


def raises(error: Exception):
    def function(*_args, **_options):
        raise error

    return function


def test_a_damaged_built_in_base_is_made_again(finished: Path, tmp_path: Path, capfd):
    """A flipped bit that leaves size and time alone is seen when the base is about to be trained on."""
    from qmedtune import base, makers

    made = base.builtin_folder("builtin:micro")
    shutil.copytree(made, tmp_path / "bases" / made.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QMEDTUNE_CACHE", str(tmp_path))
        patch.setattr(makers, "_makers", [lambda name, at: shutil.copytree(made / "01-pretrain", at / "01-pretrain")])
        weights = base.builtin_folder("builtin:micro") / "01-pretrain" / "model" / "model.safetensors"
        before, times = weights.read_bytes(), weights.stat()
        flip(weights)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
        base.identify(load_recipe(MICRO).recipe.model, offline=True).make()
        assert "builtin:micro was damaged" in capfd.readouterr().err
        assert weights.read_bytes() == before


def test_status_names_what_is_stale_and_why(finished: Path):
    recipe = load_recipe(MICRO, ["stages[1].sft.lr=7e-4"]).recipe
    rows = {row["name"]: row for row in status(recipe, finished)}
    assert rows["01-cpt"]["status"] == "cached"
    assert rows["02-sft"]["status"] == "stale" and "lr was" in rows["02-sft"]["why"]
    assert rows["merged"] == {"name": "merged", "status": "stale", "why": "after 02-sft"}


def test_until_stops_after_a_step_and_the_rest_follows(tmp_path: Path, finished: Path):
    result = run_micro(tmp_path / "run", until="cpt")
    assert result.status == "stopped" and not (tmp_path / "run" / "02-sft").exists()
    run_micro(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(finished)


def test_an_unknown_until_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(RecipeError, match="allowed: data, 01-cpt, 02-sft, merged, evaluation"):
        run_micro(tmp_path / "run", until="sfft")
    assert not (tmp_path / "run").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SEALED = ["data/notes/train.jsonl", "01-cpt/adapter/adapter_model.safetensors", "merged/model.safetensors"]


@pytest.mark.parametrize("name", SEALED)
def test_a_flipped_bit_in_a_sealed_file_is_found_and_made_again(copy: Path, finished: Path, name: str, capfd):
    flip(copy / name)
    run_micro(copy)
    assert "sha256 differs" in capfd.readouterr().err
    assert digests(copy) == digests(finished)
    assert any((copy / ".history").glob("*damaged*"))


@pytest.mark.slow
def test_a_flipped_bit_in_every_sealed_file_is_found_and_made_again(copy: Path, finished: Path, capfd):
    """Manifests too. Digests leave metrics.jsonl and facts out, which carry times."""
    before, silent = digests(finished), []
    files = [path for path in copy.rglob("*") if path.is_file() and path.stat().st_size]
    names = sorted(path.relative_to(copy).as_posix() for path in files)
    sealed = [name for name in names if "/" in name and name != "merged/README.md" and not name.startswith(".")]
    assert len(sealed) > 50
    for name in sealed:
        ui.forget_warnings()
        flip(copy / name)
        run_micro(copy)
        said = capfd.readouterr().err
        if digests(copy) != before or ("sha256 differs" not in said and not name.endswith(store.SEAL)):
            silent.append(name)
        shutil.rmtree(copy / ".history", ignore_errors=True)
    assert silent == []


def test_two_runs_on_one_folder(copy: Path):
    (copy / "run.json").unlink()
    with store.lock(copy), pytest.raises(RunError, match=rf"already running \(pid {os.getpid()}\)"):
        run_micro(copy)
    assert run_micro(copy).finished


def test_the_time_limit_seals_and_the_next_run_goes_on(tmp_path: Path, finished: Path):
    with pytest.raises(interrupt.TimeLimit):
        run_micro(tmp_path / "run", time_limit_s=1e-3)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    run_micro(tmp_path / "run")
    assert digests(tmp_path / "run") == digests(finished)


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="--out"):
        run_micro(tmp_path / "file" / "run")


def test_smoke_takes_the_built_in_base_and_data(tmp_path: Path):
    recipe = load_recipe(MICRO.parent / "llama3_8b_24gb.yaml").recipe
    smoked = smoke(recipe)
    assert smoked.model.base == "builtin:tiny"
    assert {source.path for source in smoked.data.values()} <= {
        "builtin:literature", "builtin:notes", "builtin:general", "builtin:instructions"
    }  # fmt: skip
    assert [stage.kind for stage in smoked.stages] == [stage.kind for stage in recipe.stages]


def test_five_functions_lie_between_the_command_line_and_the_trainer(copy: Path, monkeypatch: pytest.MonkeyPatch):
    """The path that CONTRIBUTING tells, and no frame more."""
    package = Path(cli.__file__).parent
    path: list[str] = []

    def reached(self, **_):
        for frame in inspect.stack()[1:]:
            if Path(frame.filename).is_relative_to(package) and "commands/run.py: run" not in path:
                path.append(f"{Path(frame.filename).relative_to(package).as_posix()}: {frame.function}")
        raise RunError("far enough")

    monkeypatch.setattr(QTrainer, "train", reached)
    changed = ["--set", "stages[0].cpt.lr=0.001"]
    assert cli.invoke(["run", str(MICRO), "--out", str(copy), "--offline", *changed]) == 1
    assert path[::-1] == [
        "commands/run.py: run",
        "run.py: run",
        "run.py: _do",
        "steps.py: work",
        "train.py: train_stage",
    ]
