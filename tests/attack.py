"""Give a command something hostile, in a child process that is watched: what ran, what it said, what it took.

The child is forked from a process of its own that has imported the libraries already and started no thread: an attack
costs its own work, not eight seconds of imports. An audit hook sees every execution; address space, time and file sizes
are bounded by the operating system, so that a bomb that goes off is an outcome and not the end of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

SECONDS = 60  # of one attack; the slowest refusal takes about one
MEMORY_BYTES = 3 << 30  # above what is mapped at the start: PyTorch's libraries alone map several GB
FILE_BYTES = 1 << 30
STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
CONNECTED = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
# What processes of one command hand each other: rows of a source on their way to and from its workers.
OWN_PICKLES = ("concurrent.futures.", "multiprocessing.", "qmedtune.", "array", "collections")
RENDERER = "chat_renderer"  # the one process that may be started, for templates (test_chat_template.py)


@dataclass(frozen=True)
class Outcome:
    """`code`: of the command; negative: the signal that ended it. `executed`: what the hook saw that must not be."""

    code: int
    said: str
    seconds: float
    peak_bytes: int
    executed: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """Of the error: warnings and progress come before it."""
        everything = [line for line in self.said.splitlines() if line.strip()]
        starts = [number for number, line in enumerate(everything) if line.startswith("error:")]
        return everything[starts[-1] :] if starts else everything


def refusal_complaints(outcome: Outcome, name: str) -> list[str]:
    said, found = " ".join(outcome.lines), []
    if outcome.code not in (1, 2, 3, 4):
        found.append(f"exit code {outcome.code}")
    if not 1 <= len(outcome.lines) <= 6:
        found.append(f"{len(outcome.lines)} lines")
    if "--debug" in said or "Traceback" in outcome.said:
        found.append("an error without words")
    if name not in said:
        found.append("the folder is not named")
    if "\x1b" in outcome.said:
        found.append("colours of the folder reach the terminal")
    return found


def count(row: Counter[str], outcome: Outcome, found: Sequence[str]) -> None:
    """Add a command's outcome to a row of the table. found: what it did that must not be."""
    row["asked"] += 1
    row["executed"] += bool(outcome.executed)
    row["refused"] += outcome.code != 0
    row["did no harm"] += outcome.code == 0 and not found
    row["held"] += not found


def preload() -> None:
    """Import what the commands import, without starting a thread."""
    from qmedtune.process import prepare

    prepare()  # as the command line does first
    import jinja2  # noqa: F401
    import peft  # noqa: F401

    import qmedtune.cli
    import qmedtune.commands.ablate
    import qmedtune.commands.common
    import qmedtune.commands.compare
    import qmedtune.commands.export
    import qmedtune.commands.model
    import qmedtune.commands.run
    import qmedtune.data.packing.pack
    import qmedtune.data.prepare
    import qmedtune.evaluate
    import qmedtune.export
    import qmedtune.exporting.folders
    import qmedtune.exporting.gguf_model
    import qmedtune.merge
    import qmedtune.merge_folder
    import qmedtune.predict
    import qmedtune.report
    import qmedtune.run
    import qmedtune.train  # noqa: F401


def attack(words: Sequence[str], here: Path, *, typed: str = "", hostile: Path | None = None) -> Outcome:
    """Run `qmedtune WORDS` in folder `here` with `typed` as its input. Code below `hostile` must never be executed."""
    here.mkdir(parents=True, exist_ok=True)
    report, log, stdin = here / ".outcome", here / ".said", here / ".typed"
    report.unlink(missing_ok=True)
    stdin.write_text(typed)
    sys.stdout.flush()
    sys.stderr.flush()
    begin = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(list(words), here, hostile, (report, log, stdin))
    code, usage = _wait(pid, begin + SECONDS)
    found = json.loads(report.read_text()) if report.is_file() else {"executed": []}
    said = log.read_bytes().decode("utf-8", "replace") if log.is_file() else ""
    return Outcome(code, said, time.monotonic() - begin, usage.ru_maxrss << 10, found["executed"])


def _wait(pid: int, until: float) -> tuple[int, resource.struct_rusage]:
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage
        if time.monotonic() > until:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            status, usage = os.wait4(pid, 0)[1:]
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.005)


def _child(words: list[str], here: Path, hostile: Path | None, files: tuple[Path, Path, Path]) -> None:
    report, log, stdin = files
    code = 99
    executed: list[str] = []
    try:
        os.setsid()
        os.chdir(here)
        os.dup2(os.open(stdin, os.O_RDONLY), 0)
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - until the end
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        _bound()
        sys.addaudithook(_hook(executed, hostile))
        from qmedtune.cli import invoke

        code = invoke(words)
    except BaseException as error:
        print(f"Escaped {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        report.write_text(json.dumps({"executed": executed}))
        os._exit(code)


def _bound() -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, mapped + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _hook(executed: list[str], hostile: Path | None):
    root = str(hostile) if hostile else None

    def hook(event: str, given: tuple) -> None:
        started = event in STARTED and RENDERER not in str(given)
        unpickled = event == "pickle.find_class" and not str(given[0]).startswith(OWN_PICKLES)
        if started or unpickled or event in CONNECTED:
            executed.append(f"{event} {given!s:.120}")
        elif event == "exec" and root and getattr(given[0], "co_filename", "").startswith(root):
            executed.append(f"exec {given[0].co_filename}")
        elif event == "open" and str(given[0]) == "/etc/passwd":
            executed.append("open /etc/passwd")

    return hook


class Attacker:
    """The process that children are forked from. A context manager."""

    def __enter__(self) -> Attacker:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).resolve())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def __call__(self, words: Sequence[str], here: Path, *, typed: str = "", hostile: Path | None = None) -> Outcome:
        assert self.process.stdin and self.process.stdout
        asked = {"words": list(words), "here": str(here), "typed": typed, "hostile": str(hostile) if hostile else None}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Outcome(**json.loads(self.process.stdout.readline()))


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    preload()
    for line in sys.stdin:
        asked = json.loads(line)
        hostile = Path(asked["hostile"]) if asked["hostile"] else None
        outcome = attack(asked["words"], Path(asked["here"]), typed=asked["typed"], hostile=hostile)
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
