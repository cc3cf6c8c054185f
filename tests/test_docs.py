"""The documentation: the site builds strictly and loads nothing from elsewhere; its commands exist, and are run.

A `bash` block on a page is run as it stands. What is for reading only is a `console` or `text` block; there, as in
running text, every command and option that is named must exist.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import typer
import yaml
from browser import chromium, tab
from conftest import ROOT
from markdown_commands import blocks, run_page

from qmedtune import cli
from qmedtune.parsing import grammar

DOCS = sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.md"))  # run by tests/test_examples.py
READ = [*DOCS, *EXAMPLES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
SLOW = {"first_hour.md"}  # the flagship and its base: minutes
PROGRAM = typer.main.get_command(cli.app)


def pages_of(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    found = []
    for entry in nav.values() if isinstance(nav, dict) else nav:  # type: ignore[union-attr]
        found += pages_of(entry)
    return found


# ------------------------------------------------------------------------------------------------------ what is said


def commands_in(text: str) -> Iterator[str]:
    """Every `qmedtune ...` of a page: lines of its blocks, continued ones whole, and code in running text."""
    fences = re.findall(r"^```(?:bash|console|text)?\n(.*?)^```$", text, re.M | re.S)
    for block in fences:
        for line in block.replace("\\\n", " ").splitlines():
            yield from re.findall(r"(?:^|[|&;] *)(qmedtune [^|&;#]+)", line.strip())
    yield from re.findall(r"`(qmedtune\s[^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def words_of(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quote that ends on another line
        return command.split()


def wrong_with(command: str) -> str:
    """What a reader would be refused for; empty where nothing is wrong."""
    words = words_of(command)[1:]
    if words[0].startswith("-"):
        return "" if words[0] in ("--help", "--version", "--install-completion", "--show-completion") else words[0]
    group = PROGRAM
    while words and words[0] in getattr(group, "commands", {}):
        group = group.commands[words.pop(0)]  # type: ignore[attr-defined]
    if group is PROGRAM:
        return "" if words[0] == "COMMAND" else f"no command {words[0]}"
    known = {"--help"}
    for child in [group, *getattr(group, "commands", {}).values()]:
        for parameter in child.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    for place, word in enumerate(words):
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            return f"no option {option}"
        if option == "--set" and place + 1 < len(words):
            key = re.sub(r"\[.*?\]", "", words[place + 1].partition("=")[0]).rpartition(".")[2]
            if not grammar.homes_of(key) and key != "path":
                return f"no key {key}"
        if re.fullmatch(r"recipes/[\w/]+\.yaml", word) and not (ROOT / word).is_file():
            return f"no file {word}"
    return ""


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_every_command_that_is_named_exists(page: Path):
    found = list(commands_in(page.read_text(encoding="utf-8")))
    wrong = {command: wrong_with(command) for command in found if wrong_with(command)}
    assert wrong == {}


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("qmedtune trian recipes/micro.yaml", "no command trian"),
        ("qmedtune run recipes/micro.yaml --resume", "no option --resume"),
        ("qmedtune run recipes/macro.yaml", "no file recipes/macro.yaml"),
        ("qmedtune run x.yaml --set stages[0].cpt.learning_rate=1", "no key learning_rate"),
        ("qmedtune bench kernels --json", ""),
    ],
)
def test_wrong_commands_are_noticed(command: str, fault: str):
    assert wrong_with(command) == fault


def test_commands_are_found_in_blocks_and_in_running_text():
    page = (
        "Give `qmedtune doctor`.\n\n```console\ncd x && qmedtune runs \\\n  --json | less  # so\n```\n`qmedtune`, `run`"
    )
    assert [words_of(command) for command in commands_in(page)] == [
        ["qmedtune", "runs", "--json"],
        ["qmedtune", "doctor"],
    ]


def with_blocks() -> list:
    """Pages of docs/ with something to run."""
    found = []
    for page in DOCS:
        if blocks(page):
            marks = pytest.mark.slow if page.name in SLOW else ()
            found.append(pytest.param(page, id=page.name, marks=marks))
    return found


@pytest.mark.parametrize("page", with_blocks())
def test_blocks_for_the_shell_are_run(page: Path, tmp_path: Path):
    run_page(page, tmp_path, timeout_s=1800)


def test_the_way_to_the_trainer_is_the_one_that_is_told():
    """Files and functions of docs/how_it_works.md, in the order in which they call each other."""
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    told = re.findall(r"^  ([\w/]+\.py): (\w+)", page, re.M)
    assert len(told) == 5
    bodies = []
    for file, name in told:
        tree = ast.parse((ROOT / "qmedtune" / file).read_text(encoding="utf-8"))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
        assert found, (file, name)
        bodies.append(" ".join([ast.unparse(node) for node in found]))
    calls = ["spine.run(", "_do(", "step.work(", "train_stage(", "trainer.train("]
    for body, call in zip(bodies, calls, strict=True):
        assert call in body, call


# --------------------------------------------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. `--strict`: links, anchors and pages that are in no menu are errors."""
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_every_page_is_in_the_menu():
    menu = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert {page.name for page in DOCS} | {"SECURITY.md"} <= set(menu)


def test_the_site_names_nothing_that_lies_elsewhere(site: Path):
    """Scripts, styles, fonts and pictures: read from the files, so that no page is left out."""
    loaded = re.compile(r"<(?:script|img|source|iframe)[^>]+src=\"?(https?:|//)|<link[^>]+href=\"?(https?:|//)")
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 18
    for page in pages:
        found = [match[0] for match in loaded.finditer(page.read_text(encoding="utf-8")) if "canonical" not in match[0]]
        assert found == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)[\"' ]*(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_calm_in_a_browser(address: str, scheme: str):
    with chromium() as browser:
        for width in (390, 1280):
            with tab(browser, viewport={"width": width, "height": 900}, color_scheme=scheme) as seen:
                for page in ("index.html", "first_hour.html", "recipe.html"):
                    seen.page.goto(address + page)
                    seen.page.wait_for_load_state("networkidle")
                    assert seen.overflow() <= 0, (page, width)
                    assert seen.serious() == [], (page, width)
                assert seen.said == [] and seen.strangers(address) == []
