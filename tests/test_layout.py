"""What the house must look like: no shadowed packages, short functions and files, light modules that stay light."""

import ast
import importlib.util
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import house
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "qmedtune").rglob("*.py")) + sorted((ROOT / "kernels" / "torch-ext").rglob("*.py"))
MAX_FUNCTION_LINES = 90
MAX_MEDIAN_LINES = 12
MAX_FILE_LINES = 500
HEAVY = ("torch", "transformers", "datasets", "peft", "trl", "bitsandbytes", "accelerate", "triton", "pandas")
LIGHT = [
    "cli",
    "errors",
    "interrupt",
    "parsing.checks",
    "parsing.grammar",
    "parsing.loader",
    "plan",
    "recipe",
    "record",
    "report",
    "run",
    "store",
    "ui",
]


def relative(path):
    return str(path.relative_to(ROOT))


def functions(path):
    """(name, lines of code from `def` to the end without the docstring) of every function in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            yield node.name, (node.end_lineno or 0) - first.lineno + 2


def test_kernels_never_shadows_the_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        assert not re.search(r"^\s*(import kernels|from kernels)\b", path.read_text(encoding="utf-8"), re.M), path
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or not Path(found.origin).is_relative_to(ROOT)


def test_functions_are_short():
    sizes = [(lines, relative(path), name) for path in SOURCES for name, lines in functions(path)]
    assert [entry for entry in sizes if entry[0] > MAX_FUNCTION_LINES] == []
    assert statistics.median(lines for lines, _, _ in sizes) <= MAX_MEDIAN_LINES


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_are_short_and_open_with_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring or not text.strip(), "each file says what it is"


def test_light_modules_import_nothing_heavy():
    code = "import sys\n" + "".join(f"import qmedtune.{name}\n" for name in LIGHT)
    code += f"print([name for name in {HEAVY!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "[]"


def test_floors_hold_and_nothing_imports_in_a_circle():
    """By our own count, lazy imports included, and by the contract in pyproject.toml."""
    graph = house.graph_of(house.modules_of())
    assert house.circles(graph) == []
    assert house.upward(graph) == []
    assert house.without_floor(graph) == []
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_circles_and_climbing_imports_are_found(tmp_path):
    package = tmp_path / "qmedtune"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "data" / "__init__.py").write_text("def late():\n    from qmedtune import run\n")
    (package / "run.py").write_text("from qmedtune.data import late\n")
    (package / "ui.py").write_text("import typing\nif typing.TYPE_CHECKING:\n    import qmedtune.run\n")
    (package / "unplaced.py").write_text("rows = [[y for y in x] for x in ()]\n")
    modules = house.modules_of(package)
    graph = house.graph_of(modules)
    assert house.circles(graph) == [["qmedtune.data", "qmedtune.run"]]
    assert house.upward(graph) == ["qmedtune.data:2 imports qmedtune.run"]
    assert house.without_floor(graph) == ["qmedtune.unplaced"]
    assert house.density_of(modules).nested == 1


def test_text_is_no_denser_than_allowed(capsys):
    assert house.problems() == []


# Files of other projects that the text names.
FOREIGN = {"vital_measure.py", "convert_hf_to_gguf.py", "preprocess_instruct.py", "evaluation/evaluate.py"}


@pytest.mark.parametrize("place", ["qmedtune", "docs", "README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_source_files_named_in_prose_exist(place):
    known = set()
    for folder in ("qmedtune", "kernels", "tests", "examples"):
        known |= {f"/{relative(path)}" for path in (ROOT / folder).rglob("*.py")}
    texts = [path for path in (ROOT / place).rglob("*") if path.suffix in (".py", ".md")] or [ROOT / place]
    lost = []
    for path in texts:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for named in re.findall(r"(?<![\w*./-])[\w./-]*\w\.py\b", line):
                there = any(other.endswith(f"/{named}") for other in known)
                if not there and named not in FOREIGN and named.rpartition("/")[2] not in FOREIGN:
                    lost.append(f"{relative(path)}:{number} {named}")
    assert lost == []


def test_every_package_is_packed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "qmedtune").rglob("__init__.py")}
    assert packages | {"qmedtune_kernels", "qmedtune.shipped_recipes"} == set(settings["packages"])


def dangers(tree):
    """Unpickling, evaluated text and remote code, as (line, what)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((node.lineno, name) for name in names if name in ("pickle", "cloudpickle", "dill", "joblib"))
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                yield node.lineno, node.func.id
            if ast.unparse(node.func) in ("torch.load", "torch.save", "np.load") and not _plain(node):
                yield node.lineno, ast.unparse(node.func)
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (keyword.arg, value) in (("trust_remote_code", True), ("weights_only", False)):
                    yield node.lineno, keyword.arg


def _plain(call):
    """np.load refuses pickles unless it is asked to take them."""
    return ast.unparse(call.func) == "np.load" and all(k.arg != "allow_pickle" for k in call.keywords)


def test_no_code_loads_pickles_or_remote_code():
    found = [(relative(p), danger) for p in SOURCES for danger in dangers(ast.parse(p.read_text(encoding="utf-8")))]
    assert found == []
    bad = "import pickle\nload(x, trust_remote_code=True)\neval('1')\ntorch.load(x)\nnp.load(x, allow_pickle=True)"
    named = ["pickle", "trust_remote_code", "eval", "torch.load", "np.load"]
    assert [what for _, what in dangers(ast.parse(bad))] == named


def test_every_class_has_a_name_of_its_own():
    """Two classes of one name with different work are told apart by their imports alone."""
    homes: dict[str, str] = {}
    twice = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                here = f"{relative(path)}:{node.lineno}"
                first = homes.setdefault(node.name, here)
                if first != here:
                    twice.append(f"{node.name}: {first} and {here}")
    assert twice == []


# What commands run, benchmarks time, recipes ask of, steps find in and reports show of a module has its name.
VIEWS = {"commands", "bench", "sections", "results", "reporting"}


def test_files_of_one_name_are_about_one_thing():
    homes: dict[str, str] = {}
    twice = []
    for path in sorted((ROOT / "qmedtune").rglob("*.py")):
        if path.stem.startswith("__") or path.parent.name in VIEWS:
            continue
        first = homes.setdefault(path.name, relative(path))
        if first != relative(path):
            twice.append(f"{first} and {relative(path)}")
    assert twice == []


def test_no_test_module_imports_another():
    """What several of them need lies in a module that holds no tests: builders.py, stages.py, phi_generated.py."""
    found = []
    for path in sorted((ROOT / "tests").glob("*.py")):
        if re.search(r"^(from|import) test_", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            found.append(path.name)
    assert found == []
