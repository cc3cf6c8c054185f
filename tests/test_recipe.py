"""The schema: every shipped recipe is valid, and every key has code that reads it."""

import ast
import json
import typing
from pathlib import Path

import pytest

from qmedtune import recipe as schema
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import Recipe, Section

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
PACKAGE = ROOT / "qmedtune"
SCHEMA = [PACKAGE / "recipe.py", *sorted((PACKAGE / "sections").glob("*.py"))]
# These only check or describe a recipe; a key that nothing else reads would do nothing.
NO_READERS = {*SCHEMA, *(PACKAGE / "parsing").glob("*.py")}


def test_the_flagship_is_shipped():
    assert "cpt_then_sft" in {path.stem for path in RECIPES} and len(RECIPES) >= 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_say_how_to_run_them(path):
    loaded = load_recipe(path)
    assert loaded.recipe.name == path.stem
    assert loaded.warnings == ()
    assert loaded.text.startswith("#") and f"qmedtune run recipes/{path.relative_to(ROOT / 'recipes')}" in loaded.text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_survive_run_json(path):
    recipe = load_recipe(path).recipe
    text = json.dumps(recipe.model_dump(mode="json", by_alias=True))
    again = Recipe.model_validate(json.loads(text))
    assert again == recipe and again.stage_names() == recipe.stage_names()


def test_the_flagship_becomes_real_by_base_and_paths():
    overrides = ["model.base=meta-llama/Llama-3.1-8B"]
    overrides += [f"data.{name}.path=/data/{name}" for name in ("literature", "notes", "general", "instructions")]
    recipe = load_recipe(ROOT / "recipes" / "cpt_then_sft.yaml", [*overrides, "evaluate.tasks=[]"]).recipe
    assert recipe.used_sources() == ["literature", "notes", "general", "instructions"]
    assert recipe.stage_names() == ["01-cpt", "02-sft"]


# ------------------------------------------------------------------------------------------- every key has a reader


def sections():
    """All section classes with the names of their own and inherited fields."""
    classes = [c for c in vars(schema).values() if isinstance(c, type) and issubclass(c, Section) and c is not Section]
    return {c.__name__: list(c.model_fields) for c in classes}


def classes_in(annotation):
    """Names of section classes in an annotation: of the model, or the source text of one."""
    if isinstance(annotation, ast.expr):
        return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name) and node.id in SECTIONS}
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {annotation.__name__}
    return {name for part in typing.get_args(annotation) for name in classes_in(part)}


SECTIONS = sections()


def family(name):
    """The section classes that a section class is: itself, and those above it."""
    return {cls.__name__ for cls in getattr(schema, name).__mro__ if cls.__name__ in SECTIONS}


FAMILY = {name: family(name) for name in SECTIONS}


def holders(trees):
    """What code calls a value of a section class: its field's name, annotated arguments and returning functions."""
    names = {name: set() for name in SECTIONS}
    for cls in SECTIONS:
        for field, info in getattr(schema, cls).model_fields.items():
            for found in classes_in(info.annotation):
                names[found].add(field)
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            target = node.arg if isinstance(node, ast.arg) else terminal(node.target)
            found = classes_in(node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            target, found = node.name, classes_in(node.returns)
        else:
            continue
        for name in found:
            names[name].add(target)
    return names


def terminal(node):
    """`recipe.stages[0].section` -> section; `x()` -> x."""
    while isinstance(node, ast.Subscript | ast.Call):
        node = node.value if isinstance(node, ast.Subscript) else node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def aliases(trees, names):
    """`merge = recipe.merge`, `for source in recipe.data.values()`: variables that take a holder's value."""
    found = {name: set(known) for name, known in names.items()}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Assign | ast.NamedExpr):
            targets, value = node.targets if isinstance(node, ast.Assign) else [node.target], node.value
        elif isinstance(node, ast.For | ast.comprehension):
            targets, value = [node.target], node.iter
        else:
            continue
        mentioned = {terminal(part) for part in ast.walk(value)}
        bound = {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        for name, known in names.items():
            if mentioned & known:
                found[name] |= bound
    return found


def is_validator(function):
    return any("validator" in ast.dump(decorator) for decorator in function.decorator_list)


def unread_keys(readers, schema_trees):
    """Keys of the schema that no code outside the schema reads as an attribute of something of that section."""
    functions = [node for tree in schema_trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    helpers = [function for function in functions if not is_validator(function)]
    names = aliases(readers, holders([*readers, *helpers]))
    reads = {
        (terminal(node.value), node.attr)
        for tree in [*readers, *helpers]
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = []
    for cls, fields in SECTIONS.items():
        related = {other for other in SECTIONS if cls in FAMILY[other] or other in FAMILY[cls]}
        known = {"self"} | set().union(*(names[other] for other in related))
        if cls == "StageSection":  # its keys are the kinds: `kind` and `section` read whichever is set
            continue
        for field in fields:
            if not any((name, field) in reads for name in known):
                unread.append(f"{cls}.{field}")
    return unread


def parsed(paths):
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def package_trees():
    return parsed(path for path in sorted(PACKAGE.rglob("*.py")) if path not in NO_READERS)


def test_every_key_has_a_reader():
    assert unread_keys(package_trees(), parsed(SCHEMA)) == []


@pytest.mark.parametrize(
    ("cls", "key"),
    [("SaveSection", "keep"), ("VerifySection", "max_kl"), ("SftSection", "loss_on"), ("SourceSection", "split_by")],
)
def test_a_key_without_reader_is_noticed(cls, key):
    """Take the reads of one key out of the whole package: the check must name it."""

    class Blind(ast.NodeTransformer):
        def visit_Attribute(self, node):
            self.generic_visit(node)
            return ast.Name("nothing", ast.Load()) if node.attr == key else node

    assert f"{cls}.{key}" in unread_keys([Blind().visit(tree) for tree in package_trees()], parsed(SCHEMA))


def test_recipes_are_frozen():
    recipe = load_recipe(RECIPES[0]).recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    assert isinstance(recipe, Recipe)
