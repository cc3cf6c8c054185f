"""The pictures of the README: a run's progress on a terminal, its report in light and dark, its live page.

    python examples/screenshots/make.py [--recipe recipes/cpt_then_sft.yaml] [--out examples/screenshots]
    python examples/screenshots/make.py --run RUN     # report and live page of a run that is there

Nothing is drawn by hand: the recipe is run in a pseudo-terminal, what it wrote is replayed up to a moment of the
training, and Chromium takes the pictures. Needs Chromium (`$CHROMIUM`), a minute, no network.
"""

from __future__ import annotations

import argparse
import html
import io
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from qmedtune.report import write_report
from qmedtune.watching.parts import address
from qmedtune.watching.watch import Watching, address_of, open_server

ROOT = Path(__file__).parents[2]
COLUMNS, ROWS = 104, 30
MOMENT = re.compile(r"01-cpt .*\n.*━.* [56]\d%")  # of the first stage, half is done
COLOUR = re.compile(r"\x1b\[[\d;]*m")
MOVES = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?25[lh]|\r|\n")  # what rich writes to redraw its lines
TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #e9e7e1; padding: 28px; width: max-content; }}
.window {{ background: #171c22; border-radius: 12px; box-shadow: 0 8px 28px #0003; overflow: hidden; }}
.bar {{ height: 34px; display: flex; gap: 8px; align-items: center; padding: 0 14px; background: #20262e; }}
.bar i {{ width: 11px; height: 11px; border-radius: 50%; background: #3b444f; }}
.bar span {{ margin-left: 10px; color: #8b96a3; font: 12.5px system-ui, "DejaVu Sans", sans-serif; }}
pre {{ margin: 0; padding: 16px 20px 20px; color: #d7dde4; font: 13.5px/1.55 "DejaVu Sans Mono", monospace; }}
</style><div class="window"><div class="bar"><i></i><i></i><i></i><span>{title}</span></div><pre>{body}</pre></div>"""


def watch(command: list[str], folder: Path) -> list[str]:
    """The pieces of text that `command` writes to a terminal of `COLUMNS` columns, in order."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ |= {"COLUMNS": str(COLUMNS), "LINES": str(ROWS), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        os.environ.pop("NO_COLOR", None)
        os.execvp(command[0], command)
    pieces = []
    while True:
        select.select([terminal], [], [])
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            data = b""
        if not data:
            break
        pieces.append(data.decode("utf-8", errors="replace"))
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{''.join(pieces)[-2000:]}")
    return pieces


def screen(text: str) -> list[str]:
    """The lines, with their colours, that a terminal shows after `text`."""
    lines, at, end = [""], 0, 0
    for move in MOVES.finditer(text):
        lines[at] += text[end : move.start()]
        end = move.end()
        if move[0] == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif move[2] == "A":
            at = max(at - int(move[1] or 1), 0)
        elif move[2] == "K":
            lines[at] = ""
        elif move[2] == "m":
            lines[at] += move[0]
        elif move[0] == "\r" and not text[end:].startswith("\n"):
            lines[at] = "" if text[end : end + 2] != "\x1b[" else lines[at]
    lines[at] += text[end:]
    return lines


def moment(pieces: list[str]) -> list[str]:
    """The screen in the middle of the first stage."""
    for number in range(len(pieces)):
        lines = screen("".join(pieces[: number + 1]))
        if MOMENT.search(COLOUR.sub("", "\n".join(lines[-4:]))):
            return lines
    sys.exit("the first stage was over before a picture of it could be taken: give a longer recipe")


def terminal_page(lines: list[str], title: str) -> str:
    from rich.console import Console
    from rich.terminal_theme import TerminalTheme
    from rich.text import Text

    quiet = [(23, 28, 34), (255, 120, 110), (80, 200, 150), (230, 190, 90), (100, 170, 240), (200, 150, 230),
             (90, 200, 210), (215, 221, 228)]  # fmt: skip
    theme = TerminalTheme((23, 28, 34), (215, 221, 228), quiet, quiet)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines[-ROWS:]:
        console.print(Text.from_ansi(line), soft_wrap=True)
    body = console.export_html(theme=theme, inline_styles=True, code_format="{code}")
    return TERMINAL.format(title=html.escape(title), body=body)


def shoot(page: str, picture: Path, width: int, height: int, *flags: str) -> None:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            os.environ.get("CHROMIUM", "chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run",
            f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={picture}", *flags,
            page,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    print(picture)


def shoot_run(run: Path, out: Path) -> None:
    """Its report as this version writes it, and its live page, served for as long as it takes."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("run.json", "metrics.jsonl"):
            shutil.copy(run / name, scratch)
        write_report(Path(scratch))
        report = (Path(scratch) / "report.html").as_uri()
        shoot(report, out / "report.png", 1100, 1060)
        shoot(report, out / "report-dark.png", 1100, 1060, "--blink-settings=preferredColorScheme=0")
    server = open_server(Watching(run, port=0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    [seen] = server.site.shelf.all()
    shoot(address_of(server).rstrip("/") + address(seen), out / "watch.png", 1100, 1060)
    server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "cpt_then_sft.yaml")
    parser.add_argument("--run", type=Path, help="a finished run of the recipe: nothing is run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if arguments.run:
        return shoot_run(arguments.run.resolve(), out)
    with tempfile.TemporaryDirectory() as scratch:
        recipe, place = arguments.recipe.resolve(), Path(scratch)
        (place / "recipes").mkdir()
        (place / "recipes" / recipe.name).write_text(recipe.read_text(encoding="utf-8"), encoding="utf-8")
        command = ["qmedtune", "run", f"recipes/{recipe.name}"]
        pieces = watch([sys.executable, "-m", *command], place)
        lines = [line for line in moment(pieces) if COLOUR.sub("", line).strip()]
        (place / "terminal.html").write_text(terminal_page(lines, " ".join(command)), encoding="utf-8")
        shoot((place / "terminal.html").as_uri(), out / "progress.png", 940, 126 + 21 * len(lines))
        shoot_run(next(place.glob("runs/*/run.json")).parent, out)


if __name__ == "__main__":
    main()
