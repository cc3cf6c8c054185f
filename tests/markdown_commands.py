"""The commands of a Markdown page, run as a reader would: one shell, in order, from the top to the bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from stand_ins import fake_downloaders

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.M | re.S)


def blocks(page: Path) -> list[str]:
    """`bash` blocks as they are, `python` blocks as scripts of their own; what is marked `console` is for reading."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text if kind == "bash" else f"python3 - <<'END_OF_BLOCK'\n{text}END_OF_BLOCK\n" for kind, text in found]


def run_page(page: Path, place: Path, *, timeout_s: int = 600, **variables: str) -> tuple[str, Path]:
    """(what the page's blocks printed, the working folder). Any command that fails fails the test.

    `place` becomes home, and below it a folder that looks like a checkout; downloads are stand-ins. `variables` are set
    before the page begins.
    """
    work = place / "checkout"
    work.mkdir(parents=True)
    for name in ("recipes", "examples"):
        (work / name).symlink_to(ROOT / name)
    fakes = fake_downloaders(place / "fakes")
    environment = {
        **os.environ,
        "HOME": str(place),
        "HF_HOME": str(place / "huggingface"),
        "PATH": f"{fakes}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        **variables,
    }
    script = "set -euo pipefail\n" + "\n".join(blocks(page))
    done = subprocess.run(
        ["bash", "-c", script], cwd=work, env=environment, text=True, timeout=timeout_s,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{page.name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    )
    return done.stdout, work
