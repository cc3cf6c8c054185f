"""The script behind the README's pictures: replaying what a terminal was sent, and that its pictures are there."""

import importlib.util
import struct

import pytest
from conftest import ROOT

FOLDER = ROOT / "examples" / "screenshots"
spec = importlib.util.spec_from_file_location("make_screenshots", FOLDER / "make.py")
assert spec is not None and spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.mark.parametrize(
    "sent, shown",
    [
        ("one\r\ntwo", ["one", "two"]),
        ("10%\r\x1b[2K20%", ["20%"]),
        ("a\r\nb\r\x1b[2K\x1b[1A\x1b[2Kdone\r\nc", ["done", "c"]),
        ("\x1b[?25l\x1b[1mbold\x1b[0m\x1b[?25h", ["\x1b[1mbold\x1b[0m"]),
    ],
)
def test_a_redrawn_line_replaces_what_stood_there(sent, shown):
    assert make.screen(sent) == shown


def test_the_moment_is_in_the_middle_of_the_first_stage():
    redraw = "\r\x1b[2K\x1b[1A\x1b[2K"
    pieces = ["data  0.1 s\r\n", "7/12 01-cpt \r\n  ━━ 12%", f"{redraw}7/12 01-cpt \r\n  ━━━ 55%", "\r\nend"]
    assert make.moment(pieces) == ["data  0.1 s", "7/12 01-cpt ", "  ━━━ 55%"]


@pytest.mark.parametrize("name", ["progress.png", "report.png", "report-dark.png", "watch.png"])
def test_the_pictures_of_the_readme(name):
    head = (FOLDER / name).read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:24])
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and width >= 900 and height >= 250
    pages = ""
    for page in ("README.md", "docs/watching.md"):
        pages += (ROOT / page).read_text(encoding="utf-8")
    assert f"examples/screenshots/{name}" in pages
