"""The Python interface: what it exports, that importing it costs nothing, and its example from end to end."""

import importlib.util
import inspect
import subprocess
import sys
from typing import get_type_hints

import pytest
from conftest import MICRO, ROOT

import qmedtune

EXAMPLE = ROOT / "examples" / "python_api.py"


def test_every_public_name_is_typed_and_documented():
    assert set(qmedtune._HOMES) == set(qmedtune.__all__)
    for name in qmedtune.__all__:
        found = getattr(qmedtune, name)
        assert inspect.getdoc(found)
        if inspect.isfunction(found):
            assert get_type_hints(found).keys() == {*inspect.signature(found).parameters, "return"}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'train_everything'"):
        qmedtune.train_everything  # noqa: B018


def test_importing_brings_none_of_it():
    code = "import sys, qmedtune; print(sorted(name for name in sys.modules if name.startswith('qmedtune')))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "['qmedtune']"


@pytest.mark.slow
def test_the_example_plans_runs_scores_and_merges(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("python_api", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(str(MICRO), str(tmp_path / "run"))
    planned, finished, scored, merged = capsys.readouterr().out.splitlines()
    assert planned.startswith("about") and "tokens" in planned
    assert finished.startswith("finished; merged: KL ")
    assert 0 <= float(scored.removeprefix("facts: ")) <= 1
    assert merged == str(tmp_path / "run" / "merged-float16")
    assert (tmp_path / "run" / "merged-float16" / "model.safetensors").is_file()
