"""`qmedtune selftest`: equal on a sound machine, and it can fail."""

import json

import pytest
import torch
from qmedtune_kernels import nf4

from qmedtune import cli, selftest


def test_everything_is_equal_on_this_machine(capsys):
    assert cli.invoke(["selftest", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert len(checks) == len(selftest.CHECKS) and all(row["ok"] for row in checks)
    assert all(row["measured"] <= row["limit"] for row in checks)


def test_a_decode_that_is_off_by_one_level_is_named(monkeypatch, capsys):
    wrong = list(nf4.CODE)
    wrong[3] = wrong[4]
    monkeypatch.setattr(nf4, "CODE", tuple(wrong))
    monkeypatch.setattr(selftest, "CHECKS", selftest.CHECKS[:1])
    assert cli.invoke(["selftest"]) == 1
    shown = capsys.readouterr()
    assert "NO" in shown.out and "NF4 decode = bitsandbytes" in shown.err


@pytest.mark.gpu
def test_everything_is_equal_on_the_card():
    assert torch.cuda.is_available()
    assert all(row["ok"] for row in selftest.selftest())
