"""A whole run in a process of its own, watched by an audit hook: no socket, nothing unpickled, no child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from assets import kernels_folder
from conftest import MICRO, MicroRun

WATCHED = """
import json, sys
events = []
def hook(event, args):
    if event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen",
                 "os.system", "os.exec", "os.posix_spawn"):
        events.append([event, str(args[0])[:80]])
sys.addaudithook(hook)
if sys.argv[2] == "stopped":  # as by SIGTERM, in the fourth optimiser step
    from qmedtune.process import prepare
    prepare()  # as the command line does first
    from qmedtune import interrupt, train
    original = train.StageCallback.on_step_end
    def on_step_end(self, args, state, control, **given):
        interrupt.stop.signal = 15 if state.global_step == 4 else interrupt.stop.signal
        original(self, args, state, control, **given)
    train.StageCallback.on_step_end = on_step_end
from qmedtune.cli import invoke
code = invoke(sys.argv[3:])
loaded = sys.modules.get("kernels") is not None
open(sys.argv[1], "w").write(json.dumps({"events": events, "code": code, "kernels": loaded}))
"""


def with_kernels(folder: Path) -> Path:
    """Hugging Face's `kernels` as if it were installed: bitsandbytes fetches compiled code through it."""
    info = folder / "kernels-0.11.1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.11.1\n")
    fetched = "import socket\ndef __getattr__(name):\n    socket.create_connection(('kernels.invalid', 443))\n"
    (folder / "kernels.py").write_text(fetched)
    return folder


def watched_run(tmp_path: Path, how: str, *arguments: str, site: Path | None = None) -> dict:
    """site: where `kernels` is installed; None: a stand-in that connects as soon as it is used."""
    target = tmp_path / "events.json"
    command = [sys.executable, "-c", WATCHED, str(target), how, *arguments]
    # As on a user's machine: with these set the libraries are quiet by themselves, and nothing would be shown.
    quiet = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "CI")
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    environment["PYTHONPATH"] = str(site or with_kernels(tmp_path / "site"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert target.is_file(), done.stderr[-2000:]
    return json.loads(target.read_text()) | {"stderr": done.stderr}


def test_a_run_opens_no_socket_unpickles_nothing_and_starts_no_process(micro_run: MicroRun, tmp_path: Path):
    # `micro_run` has made the base: otherwise the stop would come while that is trained.
    out = tmp_path / "run"
    first = watched_run(tmp_path, "stopped", "run", str(MICRO), "--out", str(out))
    assert first["code"] == 143, first["stderr"][-2000:]
    assert (out / ".building" / "01-cpt" / "scratch" / "checkpoint-4" / "seal.json").is_file()
    whole = watched_run(tmp_path, "whole", "run", str(MICRO), "--out", str(out))  # resumes from that checkpoint
    assert whole["code"] == 0, whole["stderr"][-2000:]
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert first["events"] + whole["events"] == []


@pytest.mark.slow
def test_it_does_neither_where_the_real_kernels_package_is_installed(micro_run: MicroRun, tmp_path: Path):
    site = kernels_folder(tmp_path / "installed")
    asked = "import importlib.metadata as m, importlib.util as u; print(m.version('kernels'), u.find_spec('kernels'))"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.startswith("0.17.2 ModuleSpec(name='kernels'")  # this is what a program without care would find
    out = tmp_path / "run"
    whole = watched_run(tmp_path, "whole", "run", str(MICRO), "--out", str(out), site=site)
    asked_of = ["eval", str(out), "--tasks", "facts", "--limit", "4"]
    scored = watched_run(tmp_path, "whole", *asked_of, site=site)
    assert whole["code"] == scored["code"] == 0, whole["stderr"][-2000:]
    assert whole["events"] + scored["events"] == []
    assert whole["kernels"] is scored["kernels"] is False


def test_kernels_cannot_be_fetched_and_telemetry_is_off(tmp_path: Path):
    """bitsandbytes would download compiled code through Hugging Face's `kernels` if that can be imported."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    raise SystemExit('fetched')\n")
    asked = (
        "import os, importlib.util as u\n"
        "import qmedtune.process\n"
        "qmedtune.process.prepare()\n"
        "print(u.find_spec('kernels'), os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    command = [sys.executable, "-c", asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["None", "1"]


def test_importing_the_package_leaves_the_host_process_alone(tmp_path: Path):
    """Its environment, modules, logging, signals and warnings; the public functions prepare the process when called."""
    (tmp_path / "kernels.py").write_text("")
    asked = (
        "import logging, os, signal, sys, warnings\n"
        "names = ('bitsandbytes.backends.cpu.ops', 'transformers', '')\n"
        "def state():\n"
        "    levels = [logging.getLogger(name).level for name in names]\n"
        "    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]\n"
        "    return dict(os.environ), levels, handlers, list(warnings.filters), sys.excepthook\n"
        "before = state()\n"
        "import qmedtune, kernels\n"
        "from qmedtune import QmedtuneError, evaluate_model, load_recipe, merge_adapters, plan_recipe, run_recipe\n"
        "assert state() == before and kernels is not None\n"
        "try:\n"
        "    merge_adapters('absent', 'out')\n"
        "except QmedtuneError:\n"
        "    pass\n"
        "print(os.environ['HF_HUB_DISABLE_TELEMETRY'], os.environ['OMP_WAIT_POLICY'])"
    )
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "PYTORCH", "HF_"))}
    command = [sys.executable, "-c", asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone)
    assert done.stdout.split() == ["1", "PASSIVE"], done.stderr


def test_offline_reaches_the_libraries_before_they_are_imported(tmp_path: Path):
    asked = (
        "import sys\nfrom qmedtune.cli import invoke\n"
        "invoke(['run', 'missing.yaml', '--offline'])\n"
        "from huggingface_hub import constants\nprint(constants.HF_HUB_OFFLINE)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", asked]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert done.stdout.split() == ["True"]
