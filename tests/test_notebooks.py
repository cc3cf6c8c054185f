"""The notebooks run from top to bottom, on a CPU and without network, and carry no outputs in git."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
import stand_ins
from conftest import MICRO, ROOT
from llama_folders import llama3_folder

from qmedtune.parsing.loader import load_recipe
from qmedtune.run import run

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def executed(path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, **values: object) -> str:
    """All that the notebook prints when it is run in `place`, a folder that looks like a checkout of this repository.

    `values` stand in for what its first cell sets, as a user would fill in that form.
    """
    from nbclient import NotebookClient

    place.mkdir()
    (place / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in values.items():
        assert f"\n{name} = " in f"\n{first.source}", f"the first cell sets {name}"
        first.source += f"\n{name} = {value!r}"
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(place)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") or json.dumps(output.get("data", {})) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_without_outputs(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None), cell.source


def test_the_quickstart_goes_from_the_install_to_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = MICRO.relative_to(ROOT).as_posix()
    printed = executed(ROOT / "examples" / "colab_quickstart.ipynb", tmp_path / "work", monkeypatch, RECIPE=recipe)
    assert "micro: finished. Report: runs/cpt_then_sft/report.html" in printed
    assert "&lt;!doctype html&gt;" in printed  # the report, in a frame of its own
    assert printed.count("(true: It treats ") == 4
    assert (tmp_path / "work" / "runs" / "cpt_then_sft" / "merged" / "model.safetensors").is_file()


CELL = """
import sys
from IPython.core.interactiveshell import InteractiveShell
result = InteractiveShell.instance().run_cell("SOURCE = %r\\n" + open(%r).read())
result.raise_error()
"""


def fresh_environment(tmp_path: Path) -> Path:
    """One that has all packages of this one but qmedtune; its folder of programs."""
    site, venv = Path(sysconfig.get_paths()["purelib"]), tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for folder in [*map(Path, filter(os.path.isdir, sys.path)), site]:
        for entry in folder.iterdir() if folder.name == "site-packages" else ():
            if "qmedtune" not in entry.name and entry.suffix != ".pth" and not (borrowed / entry.name).exists():
                (borrowed / entry.name).symlink_to(entry)
    (venv / "lib" / site.parent.name / "site-packages" / "borrowed.pth").write_text(str(borrowed))
    return venv / "bin"


def install_cell(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return next(cell.source for cell in cells if "%pip install" in cell.source)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["git", "index", "wheel", "asked"])
def test_the_install_cell_takes_what_there_is(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From a git address, a name in an index, an uploaded wheel; with none of these it asks once, here for an index.
    Each notebook has the same cell."""
    cell = install_cell(NOTEBOOKS[0])
    assert cell == install_cell(NOTEBOOKS[1])
    programs, place, index = fresh_environment(tmp_path), tmp_path / "work", tmp_path / "index" / "qmedtune"
    place.mkdir()
    index.mkdir(parents=True)
    # In an environment of its own, as pip does it: needs a package index, or setuptools in pip's cache.
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(index), str(ROOT)], check=True)
    [wheel] = index.glob("*.whl")
    (index / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    if way == "wheel":
        shutil.copy(wheel, place)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
    if way in ("index", "asked"):
        monkeypatch.setenv("PIP_INDEX_URL", index.parent.as_uri())
    monkeypatch.setenv("PIP_NO_DEPS", "1")  # they are there; what is asked is where qmedtune comes from
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    (tmp_path / "cell.py").write_text(cell)
    source = {"git": ROOT.as_uri(), "index": "qmedtune"}.get(way, "")
    done = subprocess.run(
        [str(programs / "python"), "-c", CELL % (source, str(tmp_path / "cell.py"))],
        cwd=place, input="qmedtune\n", capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "qmedtune 0.2" in done.stdout and ("or its name in a package index" in done.stdout) == (way == "asked")
    [recipes] = place.rglob("recipes/cpt_then_sft.yaml")
    assert recipes.is_file() and (programs / "qmedtune").is_file()


@pytest.mark.slow
def test_the_quickstart_answers_what_was_never_asked_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    printed = executed(ROOT / "examples" / "colab_quickstart.ipynb", tmp_path / "work", monkeypatch)
    told = [line for line in printed.splitlines() if "(true: " in line]
    right = [line for line in told if line.partition("(true: ")[2].removesuffix(")") in line.partition("(true: ")[0]]
    assert len(told) == 8 and len(right) >= 3, told  # three of eight by guessing among 20: p = 0.006


@pytest.mark.slow
def test_the_llama_notebook_rehearses_without_token_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    notebook = ROOT / "examples" / "colab_llama3_1b.ipynb"
    printed = executed(notebook, tmp_path / "work", monkeypatch, REHEARSAL=True)
    assert "2.30 GiB to fetch" in " ".join(printed.split())  # the plan is that of the real base
    assert "finished -" in printed and "not a medical device" in printed.lower()
    facts = json.loads((tmp_path / "work" / "runs" / "llama3_1b" / "run.json").read_text())
    assert facts["evaluation"]["tasks"]["facts"]["final"]["ci95"] and facts["merge"]["kl"] <= 1e-4


def test_what_the_llama_notebook_downloads_is_what_its_recipe_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The download cell itself needs a network: here its files, in their formats, lie where it puts them."""
    cells = [cell.source for cell in nbformat.read(ROOT / "examples" / "colab_llama3_1b.ipynb", as_version=4).cells]
    [cell] = [source for source in cells if "wget" in source]
    files = {
        "data/pubmed": ("pubmed26n1274.xml.gz", stand_ins.pubmed_baseline()),
        "data/general": ("en/c4-validation.00000-of-00008.json.gz", stand_ins.c4_shard()),
        "data/instructions": ("medical_meadow_wikidoc_medical_flashcards.json", stand_ins.flashcards()),
        "data/eval": ("ori_pqal.json", stand_ins.pubmedqa()),
    }
    for folder, (name, content) in files.items():
        assert f"-P {folder} " in cell or f"--local-dir {folder}" in cell
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    base = llama3_folder(tmp_path / "base")
    loaded = load_recipe(ROOT / "recipes" / "llama3_1b_colab_t4.yaml", [f"model.base={base}"])
    found = run(loaded.recipe, loaded.text, tmp_path / "run", until="data", offline=True)
    kept = {name: source.records.kept for name, source in found.data.items()}
    assert kept["literature"] >= 180 and kept["general"] >= 300 and kept["instructions"] >= 60


def test_colab_keeps_its_own_torch():
    def pins(name: str) -> dict[str, str]:
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        return dict(line.split("==") for line in lines)

    assert pins("constraints-colab.txt") == {
        name: version for name, version in pins("constraints.txt").items() if name not in ("torch", "triton", "numpy")
    }
