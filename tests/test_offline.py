"""A whole run in a process of its own, watched by an audit hook: no socket, nothing unpickled, no child process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import MICRO

WATCHED = """
import json, sys
events = []
def hook(event, args):
    if event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen",
                 "os.system", "os.exec", "os.posix_spawn"):
        events.append([event, str(args[0])[:80]])
sys.addaudithook(hook)
from qmedtune.cli import invoke
code = invoke(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps({"events": events, "code": code}))
"""


def watched_run(tmp_path: Path, *arguments: str) -> dict:
    target = tmp_path / "events.json"
    command = [sys.executable, "-c", WATCHED, str(target), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert target.is_file(), done.stderr[-2000:]
    return json.loads(target.read_text()) | {"stderr": done.stderr}


def test_a_run_opens_no_socket_unpickles_nothing_and_starts_no_process(tmp_path: Path):
    out = tmp_path / "run"
    first = watched_run(tmp_path, "run", str(MICRO), "--out", str(out), "--until", "01-cpt")
    assert first["code"] == 0, first["stderr"][-2000:]
    whole = watched_run(tmp_path, "run", str(MICRO), "--out", str(out))
    assert whole["code"] == 0, whole["stderr"][-2000:]
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    assert first["events"] + whole["events"] == []
