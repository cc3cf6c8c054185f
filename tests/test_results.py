"""The typed results: what is read of run.json is written again, and runs of earlier versions are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import unknown_keys
from pydantic import ValidationError

from qmedtune.results import Evaluation, Merge, Records, Run, Score

DATA = Path(__file__).parent / "data"


def test_a_run_of_version_0_1_is_read_and_kept_as_it_is():
    raw = json.loads((DATA / "run_0_1.json").read_text())
    run = Run.model_validate(raw)
    assert json.loads(json.dumps(run.as_json())) == raw
    assert run.provenance.qmedtune == "0.1.0" and run.merge is not None and run.evaluation is not None
    assert run.merge.max_weight_error == 0.0017910210384325205 and run.merge.rounding is None
    assert run.evaluation.weights is None and run.evaluation.precision == "nf4"
    facts = run.evaluation.tasks["facts"]
    assert facts.final is not None and facts.final.majority is None and facts.final.value == 0.05
    assert run.stages[0].batch is None and run.stages[0].kept_by == []
    assert run.data["notes"].columns_unread == {}


def test_figures_keep_the_form_they_were_written_in():
    written = '{"status":"sealed","kl":1,"top1":1.0,"lost":null,"probe":{"tokens":5,"from":"held-out text"}}'
    assert json.dumps(Merge.model_validate_json(written).as_json(), separators=(",", ":")) == written


def test_only_what_was_given_is_written():
    assert Records(read=3, kept=3).as_json() == {"read": 3, "kept": 3}
    assert Evaluation(why=None).as_json() == {"why": None}


def test_keys_of_a_later_version_are_kept():
    assert Records.model_validate({"read": 1, "mended": 2}).as_json() == {"read": 1, "mended": 2}


def test_metrics_stand_under_their_names_behind_the_definition():
    raw = {"metric": "auroc", "definition": "area", "auroc": 0.75, "accuracy": 0.5, "ci95": [0.6, 0.9], "n": 8}
    score = Score.model_validate(raw)
    assert (score.value, score.metrics) == (0.75, {"auroc": 0.75, "accuracy": 0.5})
    assert list(score.as_json().items()) == list(raw.items())


def test_results_do_not_change():
    with pytest.raises(ValidationError):
        Records(read=1).read = 2  # type: ignore[misc]


def test_a_figure_of_another_type_is_refused():
    with pytest.raises(ValidationError, match=r"records\.read"):
        Run.model_validate({"name": "x", "status": "finished", "data": {"a": {"records": {"read": "many"}}}})


def test_unknown_keys_are_found():
    assert unknown_keys(Run(name="x", status="y", merge=Merge.model_validate({"new": 1}))) == [".merge.new"]
