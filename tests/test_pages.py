"""Our pages in headless Chromium: a live run that is killed and goes on, accessibility, widths, no request that leaves.

Skipped, by name, where Chromium, Playwright or axe-core is missing (browser.py says how to get them).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from browser import Tab, chromium, tab
from conftest import MICRO
from watched import a_run, serving

from qmedtune.heartbeat import is_held

WRONG_S = 10.0  # a page may show what is no longer so for at most so long
WIDTHS = (390, 800, 1280)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def start(out: Path) -> subprocess.Popen:
    """A run that trains for ten seconds or more, with a checkpoint every fifth step: the page asks every few."""
    words = ["run", str(MICRO), "--out", str(out), "--offline", "--set", "stages[0].cpt.tokens=40000"]
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "qmedtune", *words], stdout=log, stderr=log)


def until(says: Callable[[], bool], limit_s: float) -> float:
    """Seconds until the page says so."""
    began = time.monotonic()
    while not says():
        assert time.monotonic() - began < limit_s, "the page does not come to say so"
        time.sleep(0.1)
    return time.monotonic() - began


def status_of(page) -> str:
    return page.locator(".status").first.inner_text() if page.locator(".status").count() else ""


def training_line(page) -> str:
    line = page.locator("path.line.s0, path.raw.s0").first
    return line.get_attribute("d") or "" if line.count() else ""


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def watching(folder: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """`qmedtune watch FOLDER` as its own process, and its address."""
    command = [sys.executable, "-m", "qmedtune", "watch", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        try:
            yield re.search(r"http://\S+", said)[0], process  # type: ignore[index]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130


def test_a_live_run_is_watched_while_it_is_killed_and_goes_on(browser, own_cache: Path, tmp_path: Path):
    out = tmp_path / "run"
    with watching(tmp_path) as (address, watcher), tab(browser) as seen:
        run, page, before_s = start(out), seen.page, cpu_s(watcher.pid)
        until((out / "run.json").is_file, 60)
        page.goto(f"{address}run/run/")
        until(lambda: status_of(page) == "running", WRONG_S)
        until(lambda: training_line(page).count("L") >= 5, 120)
        before = training_line(page)
        until(lambda: training_line(page).count("L") > before.count("L"), 20)  # the curve moves, nobody reloads
        run_s = cpu_s(run.pid)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert until(lambda: status_of(page) == "killed", WRONG_S) < WRONG_S
        run = start(out)
        until(lambda: json.loads((out / "run.json").read_text())["status"] == "running" and is_held(out), 60)
        assert until(lambda: status_of(page) == "running", WRONG_S) < WRONG_S
        until(lambda: training_line(page).count("L") > before.count("L"), 60)
        last_s = 0.0
        while run.poll() is None:
            with suppress(FileNotFoundError):
                last_s = cpu_s(run.pid)
            time.sleep(0.2)
        assert run.returncode == 0, out.with_suffix(".log").read_text()
        assert until(lambda: status_of(page) == "finished", WRONG_S) < WRONG_S
        assert page.locator("details.stage").count() == 2
        assert seen.said == [] and seen.strangers(address) == []
        watched_s, ran_s = cpu_s(watcher.pid) - before_s, run_s + last_s
        print(f"the watcher took {watched_s:.2f} s of CPU time, the run {ran_s:.1f} s")
        assert watched_s < 0.05 * ran_s  # 1 % where a run is longer than a minute: serving the page first is most of it
        asked_both(seen, address)


def asked_both(seen: Tab, address: str) -> None:
    """The second tab, on the run that has ended."""
    seen.page.goto(f"{address}run/run/ask")
    seen.page.fill("#question", "What does gunolir treat?")
    seen.page.click("#ask button")
    until(lambda: all(seen.page.locator(f"#{side}").inner_text() for side in ("base", "final")), 90)
    assert seen.serious() == [] and seen.said == [] and seen.strangers(address) == []


PAGES = ("", "run/run/", "run/run/report", "run/run/ask", "run/run/rows", "compare?run=run&run=other")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible_and_fit_every_width(browser, tmp_path: Path, scheme: str):
    a_run(tmp_path / "run")
    a_run(tmp_path / "other", "failed", error="RunError: no room", seed=18)
    with serving(tmp_path) as address:
        for place in PAGES:
            for width in WIDTHS:
                with tab(browser, viewport={"width": width, "height": 900}, color_scheme=scheme) as seen:
                    seen.page.goto(address + place)
                    assert seen.overflow() <= 0, (place, width)
                    assert seen.cut() == [], (place, width)
                    assert 1_000 < seen.weight() < 300_000, (place, width)
                    if width != 800:
                        assert seen.serious() == [], (place, width)
                    assert seen.said == [] and seen.strangers(address) == [], place
