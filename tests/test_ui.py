"""What is shown: plain lines in logs, a live region on a terminal (a real pseudo-terminal), never a failure."""

import os
import pty
import re
import select
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from qmedtune import terminal, ui, units


@pytest.mark.parametrize(
    "shown, expected",
    [
        (units.count(0), "0"),
        (units.count(9_500), "9,500"),
        (units.count(12_400), "12.4k"),
        (units.count(999_600), "1.00M"),
        (units.count(3_050_000_000), "3.05B"),
        (units.size(512), "512 B"),
        (units.size(1_240_000_000), "1.15 GiB"),
        (units.size(1_048_300), "1.00 MiB"),
        (units.duration(0.44), "0.4 s"),
        (units.duration(59.7), "1 min 00 s"),
        (units.duration(7_500), "2 h 05 min"),
        (units.duration(273_600), "3 d 04 h"),
        (units.clock(42.9), "0:42"),
        (units.clock(11_045), "3:04:05"),
        (units.digits3(6.049), "6.05"),
        (units.digits3(61.44), "61.4"),
        (units.digits3(1204), "1,204"),
    ],
)
def test_units(shown, expected):
    assert shown == expected


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(ui, "time", clock)
    return clock


def test_log_of_a_run(capsys, clock):
    with ui.run_progress(["data", "01-cpt", "merge"]) as run:
        run.cached("data")
        with run.step("01-cpt"):
            with ui.progress_bar("loading"):
                clock.now += 2
            with ui.progress_bar("training", 1000) as bar:
                bar.update(400, loss=3.0, tokens_per_s=80.0)
                clock.now += 5
                bar.update(1000, loss=1.5)
        with run.step("merge") as step:
            step.summary = "21 modules"
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "1/3 data: cached, unchanged",
        "2/3 01-cpt: started",
        "    loading: started",
        "    loading: done in 2.0 s",
        "    training: started",
        "    training: done in 5.0 s, 1,000 tokens, loss 3.000 → 1.500, 80 tokens/s",
        "2/3 01-cpt: done in 7.0 s, 1,000 tokens, loss 3.000 → 1.500, 80 tokens/s",
        "3/3 merge: started",
        "3/3 merge: done in 0.0 s, 21 modules",
    ]


def test_log_lines_are_rare(capsys, clock):
    with ui.progress_bar("training", 1000) as bar:
        for step in range(1, 101):
            clock.now += 0.25
            bar.update(step * 10, loss=2.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:-1] == [
        "    training: 40%, loss 2.000, 0:15 left, 400 of 1,000 tokens",
        "    training: 80%, loss 2.000, 0:05 left, 800 of 1,000 tokens",
    ]


def test_time_left_of_a_resumed_stage_counts_new_work_only(clock):
    with ui.progress_bar("training", 1000, completed=900) as bar:
        clock.now += 10
        bar.update(910)
        assert bar.left_s() == pytest.approx(90)
        clock.now += 30
        assert bar.left_s() == pytest.approx(60)
        clock.now += 1e6
        assert bar.left_s() == 0


def test_time_left_of_the_run(clock):
    with ui.run_progress(["a", "b", "c"], {"a": 10, "b": 20, "c": 5}) as run:
        assert run.left_s() is None
        run.cached("a")
        with run.step("b"):
            clock.now += 4
            assert run.left_s() == pytest.approx(16 + 5)
            with ui.progress_bar("training", 100) as bar:
                clock.now += 1
                bar.update(1)
                assert run.left_s() == pytest.approx(99 + 5), "a slower measurement beats the plan"
    with ui.run_progress(["a", "b"], {"a": 10}) as run, run.step("a"):
        assert run.left_s() is None


def drawn(lines):
    return [words_of(line) for line in lines]


def words_of(line):
    return "".join(text for text, _ in line)


@pytest.mark.parametrize("title, said", [("training", "  training  ━"), ("01-cpt", "  ━")])
def test_moving_lines_say_a_name_once_and_end_in_a_figure(clock, monkeypatch, title, said):
    monkeypatch.setattr(ui.terminal, "width", lambda: 60)
    with ui.run_progress(["data", "01-cpt"]) as run, run.step("01-cpt"), ui.progress_bar(title, 1000) as bar:
        clock.now += 5
        bar.update(500, loss=1.25, tokens_per_s=80.0, lr=2e-4)
        above, below = drawn(ui._moving_lines())
    assert "2/2 01-cpt" in above
    assert below.startswith(said) and below == below.rstrip() and len(below) < 60
    assert "50%  loss 1.250" in below


def test_failure_passes_through_and_is_said(capsys):
    with pytest.raises(KeyError), ui.run_progress(["a"]) as run, run.step("a"), ui.progress_bar("inner", 2):
        raise KeyError
    assert "    inner: stopped after 0.0 s" in capsys.readouterr().err
    assert (ui._shown.run, ui._shown.bars) == (None, ())


def test_warning_is_shown_once_and_errors_by_line(capsys):
    for _ in range(2):
        ui.warn("only for this test")
    ui.error_panel(["x.yaml:3 seed: -1", "allowed: 0 or more"])
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["warning: only for this test", "error: x.yaml:3 seed: -1", "  allowed: 0 or more"]


def test_plain_table(capsys):
    ui.table("Scores", ["task", "final", "why"], [["01", 0.5, "[red]kept as it is"], ["pubmedqa", None, "–"]])
    assert capsys.readouterr().out == (
        "Scores\n"
        "task      final  why\n"
        "--------  -----  ------------------\n"
        "01          0.5  [red]kept as it is\n"
        "pubmedqa         –\n"
    )


def on_terminal(code: str, **env: str) -> str:
    """Everything that a program writes to a terminal of 100 columns; asserts that it ends well."""
    main, side = pty.openpty()
    settings = {
        k: v
        for k, v in os.environ.items()
        if k not in ("NO_COLOR", "COLAB_RELEASE_TAG", "JPY_PARENT_PID", "FORCE_COLOR")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys, time, os\nfrom qmedtune import ui\n" + textwrap.dedent(code)],
        stdin=side, stdout=side, stderr=side, env=settings | {"TERM": "xterm-256color", "COLUMNS": "100", **env},
    )  # fmt: skip
    os.close(side)
    written, deadline = b"", time.monotonic() + 20
    while time.monotonic() < deadline and select.select([main], [], [], 20)[0]:
        try:
            part = os.read(main, 65536)
        except OSError:  # Linux answers EIO once the other side is closed
            break
        if not part:
            break
        written += part
    assert process.wait(20) == 0, written.decode()
    os.close(main)
    return written.decode()


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


RUN = """
with ui.run_progress(["data", "01-cpt"], {"data": 1, "01-cpt": 9}) as run:
    run.cached("data")
    with run.step("01-cpt"), ui.progress_bar("training [all]", 1000) as bar:
        bar.update(250, loss=2.5, tokens_per_s=1234.0, lr=2e-4)
        time.sleep(1.3)
        print("a line on stdout")
"""


def test_terminal_shows_run_and_stage_then_one_line():
    raw = on_terminal(RUN)
    text = visible(raw)
    assert re.search(r"2/2 01-cpt  ● ◉  0:0\d elapsed, about 0:0\d left", text)
    assert re.search(r"training \[all\]  ━+─+  25%  loss 2\.500  0:0\d left  1,234 tokens/s", text)
    assert len(set(re.findall(rf"([{ui.SPINNER}]) 2/2", text))) >= 4, "the clock moves without any update"
    assert "a line on stdout" in text
    assert re.search(r"✓ 01-cpt +1\.\d s  250 tokens, loss 2\.500 → 2\.500, 1,234 tokens/s", text)
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l"), "the cursor is shown again"


def test_no_color_keeps_the_display():
    raw = on_terminal(RUN, NO_COLOR="1")
    assert "━" in raw and not re.search(r"\x1b\[(?:\d+;)*[39]\d", raw)


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"COLAB_RELEASE_TAG": "release"}, {"JPY_PARENT_PID": "1"}])
def test_terminals_that_cannot_redraw_get_plain_lines(env):
    raw = on_terminal(RUN.replace("1.3", "0"), **env)
    assert "\x1b" not in raw and "2/2 01-cpt: done in" in raw


def test_forked_worker_neither_hangs_nor_draws():
    raw = on_terminal("""
        with ui.progress_bar("mapping", 10):
            for _ in range(20):
                if (child := os.fork()) == 0:
                    print("from a worker", file=sys.stderr)
                    ui.note("not shown")
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
    """)
    assert raw.count("from a worker") == 20 and "not shown" not in raw


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2> >(exit 0)"])
def test_nobody_listening_does_not_end_the_work(redirect, tmp_path):
    code = (
        "import time\nfrom qmedtune import ui\n"
        "with ui.run_progress(['a']) as run, run.step('a'), ui.progress_bar('s', 9) as bar:\n"
        "    time.sleep(.2); ui.warn('w'); bar.update(9)\n"
        "ui.error_panel(['e'])\nopen('finished', 'w')\n"
    )
    subprocess.run(["bash", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, code], cwd=tmp_path, timeout=20)
    assert (tmp_path / "finished").exists()


def test_import_is_light():
    code = (
        "import sys, qmedtune.ui, qmedtune.reporting.tables;"
        "print({'rich', 'yaml', 'torch', 'numpy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_only_the_terminal_module_imports_rich():
    sources = Path(terminal.__file__).parent.rglob("*.py")
    users = [file.name for file in sources if re.search(r"^\s*(from|import) rich", file.read_text(), re.M)]
    assert users == ["terminal.py"]


def test_time_left_of_training_counts_the_stages_to_come(clock):
    with ui.run_progress(["01-cpt", "02-sft", "evaluation"]) as run:
        run.tokens = {"01-cpt": 1000, "02-sft": 500}
        with run.step("01-cpt"), ui.progress_bar("01-cpt", 1000) as bar:
            assert run.left_s() is None
            clock.now += 10
            bar.update(100)
            assert run.left_s() == pytest.approx(90 + 50)
        with run.step("evaluation"), ui.progress_bar("facts", 10, "items"):
            assert run.left_s() is None
