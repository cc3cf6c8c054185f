"""The time limit ends any step at once, but training only after the optimiser step in hand."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from qmedtune.data.reading import json_stream, row_formats
from qmedtune.interrupt import Stop, Stopped, TimeLimit


def wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def test_a_step_that_never_asks_is_ended_at_the_limit():
    stop, began = Stop(), time.monotonic()
    with stop.watching(0.05), pytest.raises(TimeLimit), stop.limited():
        wait(30)
    assert time.monotonic() - began < 10


def test_a_graceful_step_is_not_ended_but_told():
    stop = Stop()
    with stop.watching(0.02), stop.limited(), stop.graceful():
        wait(0.2)
        assert stop.requested
        with pytest.raises(TimeLimit):
            stop.raise_if_requested()


@pytest.mark.parametrize("ignored", [True, False])
def test_a_lost_terminal_stops_a_run_unless_it_is_ignored(ignored: bool):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    kept = os.dup(1), os.dup(2)
    stop = Stop()
    try:
        with stop.watching(None), stop.graceful():
            os.kill(os.getpid(), signal.SIGHUP)
            wait(0.05)
            os.write(1, b"the terminal is gone, and this goes nowhere\n" if not ignored else b"")
            assert stop.requested is not ignored
    finally:
        signal.signal(signal.SIGHUP, before)
        for target, handle in enumerate(kept, start=1):
            os.dup2(handle, target)
            os.close(handle)


def test_without_a_limit_and_after_the_step_nothing_is_ended():
    stop = Stop()
    with stop.watching(None), stop.limited():
        wait(0.02)
    with stop.watching(0.2):
        with stop.limited():
            pass
        wait(0.3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM])
def test_a_stop_inside_a_reader_is_no_damaged_record(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Readers turn every ValueError into a reject; a record would be lost, and the step go on to its seal."""
    path, decode, calls = tmp_path / "notes.jsonl", json_stream.DECODER.decode, []
    path.write_text("".join(f'{{"text": "note {line}"}}\n' for line in range(10)))

    def decoded(text: str):
        calls.append(text)
        if len(calls) == 5:
            os.kill(os.getpid(), number)
        return decode(text)

    monkeypatch.setattr(json_stream.DECODER, "decode", decoded)
    stop = Stop()
    with stop.watching(3600), pytest.raises(Stopped), stop.limited():
        list(row_formats.read_jsonl(path))
    assert len(calls) == 5
