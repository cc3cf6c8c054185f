"""The command line as people and scripts meet it: streams, exit codes, speed, errors without tracebacks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from qmedtune import cli
from qmedtune.commands import run as cli_run
from qmedtune.errors import DataError, DoesNotFit, RunError
from qmedtune.interrupt import TimeLimit

ROOT = Path(__file__).parent.parent
MICRO = ROOT / "recipes" / "micro.yaml"
COMMANDS = [name for name in typer.main.get_command(cli.app).commands]  # type: ignore[attr-defined]


def test_help_is_quick_and_imports_nothing_heavy():
    """Under half a second of processor time: what it takes on an idle core, whatever runs beside it."""
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "qmedtune", "--help"], capture_output=True, text=True, check=True)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5
    assert done.stderr == "" and all(f"\n  {name}" in done.stdout for name in COMMANDS)
    code = "import sys; from qmedtune.cli import invoke; invoke(['--help'])\n"
    code += "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'yaml', 'rich'} & set(sys.modules)\n"
    code += "print('heavy:', sorted(heavy))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert cli.invoke([command, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and f"Usage: qmedtune {command}" in shown.out
    assert all(len(line) <= 100 for line in shown.out.splitlines())


def test_version_and_bare_call(capsys):
    assert cli.invoke(["--version"]) == 0
    assert capsys.readouterr().out == "qmedtune 0.2.0\n"
    assert cli.invoke([]) == 0
    assert capsys.readouterr().out.startswith("Usage: qmedtune")


def test_schema_is_json_on_stdout(capsys):
    assert cli.invoke(["schema"]) == 0
    shown = capsys.readouterr()
    schema = json.loads(shown.out)
    assert shown.err == "" and schema["additionalProperties"] is False
    assert {"name", "model", "data", "stages", "validate"} <= schema["properties"].keys()


def test_a_closed_pipe_is_silent():
    command = f"{sys.executable} -m qmedtune schema | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_plan_answers_quickly_as_text_and_json(tmp_path, capsys):
    started = time.process_time()
    assert cli.invoke(["plan", str(MICRO), "--out", str(tmp_path / "run"), "--json"]) == 0
    assert time.process_time() - started < 3
    plan = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in plan["stages"]] == ["01-cpt", "02-sft"]
    assert cli.invoke(["plan", str(MICRO), "--out", str(tmp_path / "run")]) == 0
    assert "01-cpt" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["llama3_8b_24gb", "llama3_1b_colab_t4"])
def test_recipes_for_cards_plan_without_network_or_card(name, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DATA", raising=False)
    assert cli.invoke(["plan", str(ROOT / "recipes" / f"{name}.yaml"), "--out", str(tmp_path / "run"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert all(0 < stage["peak_bytes"] <= stage["budget_bytes"] for stage in plan["stages"])


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (RunError("01-cpt: loss is not finite"), 1, "error: 01-cpt: loss is not finite"),
        (DataError("notes.csv: empty"), 3, "error: notes.csv: empty"),
        (DoesNotFit("needs 30 GiB"), 4, "error: needs 30 GiB"),
        (TimeLimit(), 0, "time limit reached; the same command continues from here"),
        (OSError(28, "No space left on device", "/full/x"), 1, "error: /full/x: No space left on device"),
        (KeyError("Mrs Smith, born 1931"), 1, "error: KeyError at run.py:"),
        (DataError("\n".join("abcdefghij")), 3, "error: a"),
    ],
)
def test_errors_have_their_exit_code_and_no_traceback(error, code, shown, monkeypatch, capsys):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(cli_run, "load", fail)
    assert cli.invoke(["plan", str(MICRO)]) == code
    out, err = capsys.readouterr()
    assert err.startswith(shown) and out == "" and len(err.splitlines()) <= 6
    assert "Traceback" not in err and "Smith" not in err
    cli.invoke(["plan", str(MICRO), "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "x.yaml", "--ofline"], "--ofline"),
        (["run", "x.yaml", "--time-limit", "5 parsecs"], "allowed: 90s, 55m, 2h"),
        (["run", "x.yaml", "--time-limit", "0"], "allowed: 90s, 55m, 2h"),
        (["eval", "runs/x"], "--tasks"),
        (["eval", "runs/x", "--tasks", "facts", "--harness", "medqa_4options"], "--harness"),
        (["merge", "runs/x", "--out", "m", "--max-kl", "0"], "a number above 0"),
        (["merge", "runs/x", "--out", "m", "--dtype", "int8"], "bfloat16"),
        (["predict", "runs/x"], "--data"),
        (["bench"], "Missing command"),
        (["bench", "cake"], "No such command 'cake'"),
        (["bench", "train", "--rounds", "0"], "--rounds"),
    ],
)
def test_wrong_usage_is_exit_2_with_a_next_step(arguments, expected, capsys):
    assert cli.invoke(arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err and "--help" in err and out == "" and len(err.splitlines()) <= 6


def test_time_limits():
    from qmedtune.commands.common import seconds

    assert [seconds(text) for text in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_outside_a_run(number, code):
    """`sleep` stands for any command that is not training."""
    script = "import signal, sys, time\nfrom qmedtune import cli\n"
    # What runs the tests may ignore Ctrl-C for its children (nohup, pytest-xdist); a terminal does not.
    script += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "def wait():\n    print('ready', flush=True)\n    time.sleep(30)\n"
    script += "cli.app.command('wait')(wait)\nsys.exit(cli.invoke(['wait']))"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code and time.monotonic() - started < 2
    assert "Traceback" not in err and signal.Signals(number).name in err


def test_warnings_go_to_stderr(tmp_path, capsys):
    arguments = ["plan", str(MICRO), "--json", "--out", str(tmp_path), "--set", "stages[1].sft.lr=1e-5"]
    assert cli.invoke(arguments) == 0
    out, err = capsys.readouterr()
    assert "a rate for full tuning" in err and json.loads(out)


def test_doctor_tells_versions_kernels_and_what_is_in_the_way(capsys):
    from qmedtune import doctor

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pins.get(name) for name in doctor.TESTED} == doctor.TESTED
    assert cli.invoke(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"]["installed"] and facts["host_memory_bytes"] > 2**30
    assert set(facts["kernels"]) >= {"dequantize", "rms_norm"}
    assert cli.invoke(["doctor"]) == 0
    assert "kernel dequantize" in capsys.readouterr().out


def facts_for(**changes):
    healthy = {
        "gpu": {"usable": True, "bf16": True},
        "cards": ["A, sm_90, triton"],
        "versions": {"torch": {"installed": "2.13.0+cu130", "tested": "2.13.0"}},
        "free_disk_bytes": 2**40,
        "host_memory_bytes": 2**36,
        "hub_login": True,
        "kernels": {"lora": "grouped"},
    }
    return healthy | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"gpu": None}, "no GPU is used"),
        ({"gpu": {"usable": False}}, "torch sees no GPU"),
        ({"gpu": {"usable": True, "bf16": False}}, "takes float16"),
        ({"versions": {"trl": {"installed": None, "tested": "1.16.0"}}}, "not the tested versions: trl"),
        ({"free_disk_bytes": 2**30}, "1.00 GiB of disk left"),
        ({"host_memory_bytes": 2**32}, "4.00 GiB of memory"),
        ({"hub_login": False}, "hf auth login"),
        ({"kernels": {"lora": "reference: sm_75 broke"}}, "plain PyTorch instead of the kernels: sm_75 broke"),
        ({"gpu": {"usable": True, "bf16": True}, "kernels": {"lora": "grouped"}}, None),
        ({"cards": ["A, sm_90, triton"] * 2}, "2 cards: a run takes one, `--gpus auto` all"),
        ({"cards": ["A, sm_90, triton", "B, sm_75, reference"]}, "the cards differ (A, sm_90, triton; B, sm_75"),
    ],
)
def test_doctor_advises(changes, expected):
    from qmedtune import doctor

    lines = list(doctor.advice(facts_for(**changes)))
    assert lines == [] if expected is None else len(lines) == 1 and expected in lines[0]


def test_module_call_is_the_same_program():
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "qmedtune", "run", "absent.yaml"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: absent.yaml: no such file")


def test_a_smoke_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It must not push what the recipe itself has trained into .history."""
    from qmedtune import run as spine

    folders = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spine, "run", lambda recipe, text, out, **_: folders.append(str(out)) or {"name": "micro"})
    for more in ([], ["--smoke"], ["--smoke", "--out", "mine"]):
        cli.invoke(["run", str(MICRO), "--json", *more])
    assert folders == ["runs/micro", "runs/micro-smoke", "mine"]


def test_what_libraries_warn_of_stays_off_the_terminal(monkeypatch, tmp_path):
    """Renamed arguments that are announced, settings that are warned of on purpose: shown with --debug alone."""
    code = (
        "import logging, sys, warnings\nfrom qmedtune import cli\n"
        "from qmedtune.commands import run as commands\n"
        "def noisy(*arguments):\n"
        "    import transformers\n"
        "    warnings.warn('is deprecated', FutureWarning)\n"
        "    transformers.logging.get_logger('transformers.x').warning('set it')\n"
        "    logging.getLogger('peft.tuners').warning('merging')\n"
        "    raise KeyError('x')\n"
        "commands.load = noisy\n"
        "sys.exit(cli.invoke(sys.argv[1:]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_VERBOSITY")}
    environment.pop("PYTHONWARNINGS", None)
    said = {}
    for words in (["plan", str(MICRO)], ["plan", str(MICRO), "--debug"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        said[len(words)] = done.stderr
    assert said[2].startswith("error: KeyError at") and len(said[2].splitlines()) == 2
    assert all(word in said[3] for word in ("is deprecated", "set it", "merging"))
