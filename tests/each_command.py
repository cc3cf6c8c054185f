"""The commands that write something, on a micro run, each with the result that it must come to: for trials in which it
is killed, started twice, or has no room (kill_commands.py, full_commands.py).

Children are forked from a process that has imported the libraries: a trial costs the command's own second.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
MICRO = ROOT / "recipes" / "micro.yaml"
QUESTIONS = 24
SWEEP = ["ablate={arms: [sft, cpt+sft], seeds: 1}", "stages[0].cpt.tokens=800", "evaluate.perplexity=[]"]


@dataclass(frozen=True)
class Materials:
    """A finished run and a file of questions. Both are only read, but by `report`, which gets a copy."""

    run: Path
    questions: Path

    @property
    def model(self) -> str:
        return str(self.run / "merged")


@dataclass(frozen=True)
class Command:
    """words(materials, place): what is given; result(place): a hash of what it came to, None where nothing stands
    under its final name. Raises where half of it does."""

    name: str
    words: Callable[[Materials, Path], list[str]]
    result: Callable[[Path], str | None]
    prepare: Callable[[Materials, Path], object] = lambda materials, place: None
    again: int = 0  # exit code where the result is there already


def of_file(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def of_sealed(folder: Path) -> str | None:
    """Of a folder that must be sealed and whole wherever it is there."""
    from qmedtune import store

    if not folder.exists():
        return None
    sealed = store.read_seal(folder)
    assert sealed is not None, f"{folder}: half of it is there, without a seal"
    problems = store.damage(folder, sealed, full=True)
    assert not problems, problems
    return sealed.digest


def of_reports(place: Path) -> str | None:
    """Of a run's reports: each is what it was (none) or whole."""
    names = ("report.html", "report.md")
    for name in names:
        path = place / "run" / name
        if path.exists():
            text = path.read_text(encoding="utf-8")
            assert text.endswith("</html>\n" if name == "report.html" else "\n") and len(text) > 2000, f"{name} is cut"
    if not all((place / "run" / name).exists() for name in names):
        return None
    return "".join(str(of_file(place / "run" / name)) for name in names)


def of_sweep(place: Path) -> str | None:
    """Figures and weights of a finished ablation; each arm's sealed folders must be whole."""
    from qmedtune import store

    out = place / "ablation"
    weights = sorted(out.glob("arms/*/seed-*/merged/model.safetensors"))
    for seal in out.glob("arms/*/seed-*/*/seal.json"):
        sealed = store.read_seal(seal.parent)
        assert sealed and not store.damage(seal.parent, sealed, full=True), seal
    if not (out / "ablation.json").is_file():
        return None
    if json.loads((out / "ablation.json").read_text())["status"] != "finished":
        return None
    parts = [str(of_file(path)) for path in (*weights, out / "ablation.csv", out / "differences.csv")]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def fresh_reports(materials: Materials, place: Path) -> None:
    shutil.copytree(materials.run, place / "run", copy_function=os.link)
    for name in ("report.html", "report.md", ".lock"):
        (place / "run" / name).unlink(missing_ok=True)


COMMANDS = [
    Command(
        "predict",
        lambda given, place: ["predict", given.model, "--data", str(given.questions), "--out",
                              str(place / "answers.jsonl"), "--max-new-tokens", "8"],
        lambda place: of_file(place / "answers.jsonl"),
        again=2,
    ),
    Command(
        "eval",
        lambda given, place: ["eval", given.model, "--tasks", "facts", "--limit", "12", "--out", str(place / "scores")],
        lambda place: of_sealed(place / "scores" / "evaluation"),
    ),
    Command(
        "merge",
        lambda given, place: ["merge", str(given.run), "--out", str(place / "merged")],
        lambda place: of_sealed(place / "merged"),
        again=2,
    ),
    Command(
        "export",
        lambda given, place: ["export", str(given.run), "--as", "gguf", "--out", str(place / "export")],
        lambda place: of_sealed(place / "export"),
    ),
    Command("report", lambda given, place: ["report", str(place / "run")], of_reports, prepare=fresh_reports),
    Command(
        "ablate",
        lambda given, place: ["ablate", str(MICRO), "--out", str(place / "ablation"),
                              *(word for setting in SWEEP for word in ("--set", setting))],
        of_sweep,
    ),
]  # fmt: skip


def named(names: list[str]) -> list[Command]:
    return [command for command in COMMANDS if not names or command.name in names]


def materials(folder: Path) -> Materials:
    """Made once; the cache of built-in bases lies beside."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["QMEDTUNE_CACHE"] = str(folder / "cache")
    os.environ["QMEDTUNE_SECRETS"] = str(folder / "secrets")
    run = folder / "run"
    if not (run / "report.md").is_file():
        said = folder / "run.said"
        assert finish(start(["run", str(MICRO), "--out", str(run), "--offline"], said)) == 0, said.read_text()
    questions = folder / "questions.jsonl"
    lines = []
    for number in range(QUESTIONS):
        lines.append(json.dumps({"id": f"q{number}", "instruction": f"What does drug number {number} treat?"}) + "\n")
    questions.write_text("".join(lines))
    return Materials(run, questions)


def preload() -> None:
    """Import what the commands import, without starting a thread."""
    import attack

    from qmedtune import process

    process.prepare()
    attack.preload()
    import qmedtune.ablate
    import qmedtune.ablation.ablation_page
    import qmedtune.commands.export
    import qmedtune.export
    import qmedtune.exporting.gguf_model
    import qmedtune.exporting.logit_proof  # noqa: F401


def start(words: list[str], said: Path, first: Callable[[], object] = lambda: None) -> int:
    """Fork a child that gives the command, after `first()`; its pid. What it says goes to `said`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        from qmedtune.cli import invoke

        first()
        code = invoke(words)
    except BaseException as error:
        print(f"Escaped {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def error_lines(said: Path) -> list[str]:
    """Of the last error, without warnings and progress before it."""
    lines = [line for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("error:")]
    return lines[starts[-1] :] if starts else []


def is_clear(said: Path) -> bool:
    """One to six lines with words in them."""
    lines, text = error_lines(said), said.read_text(encoding="utf-8", errors="replace")
    return 1 <= len(lines) <= 6 and "--debug" not in text and "Traceback" not in text and "Escaped" not in text


def expected_of(command: Command, given: Materials, folder: Path) -> str:
    """What the command comes to when nobody disturbs it."""
    place = folder / f"{command.name}-undisturbed"
    place.mkdir(parents=True)
    command.prepare(given, place)
    code = finish(start(command.words(given, place), place / "said"))
    found = command.result(place)
    assert code == 0 and found, (command.name, code, (place / "said").read_text()[-600:])
    return found
