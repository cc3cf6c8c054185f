"""`evaluate.against`: the run's result in a fair head-to-head with its base and with models that the recipe names.

The result is held against each of them on every task that is a choice, in the precision of the evaluation; compare.py
says how. Deliberately absent: tasks whose metric is not accuracy, perplexity (it does not compare tokenizers).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qmedtune import compare, store, ui
from qmedtune.allowed import Quantization
from qmedtune.data.packing import templates
from qmedtune.errors import RecipeError
from qmedtune.evaluate import Contender, EvaluatedModels, contenders, delivered_dtype, open_contender, settings_of
from qmedtune.evaluation.open_model import Location, OpenModel, locate, open_model
from qmedtune.planning import precision
from qmedtune.recipe import Recipe
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import HeadToHead
from qmedtune.tasks import load_task, world_of
from qmedtune.tasks.item_parts import part_of

FINAL = "final"


def against_step(recipe: ResolvedRecipe, inputs: EvaluatedModels, out: Path) -> HeadToHead:
    """Writes compare.json and <task>.items.jsonl below `out`, where an interrupted comparison goes on; returns
    {"subject", "models", "duels", "claims", "left_out", "precision"}."""
    splits, left_out = splits_of(recipe)
    taken = precision.decide(recipe, delivered_dtype(inputs.trained))
    template = settings_of(recipe, inputs.trained).template
    entrants = []
    for contender in contenders(inputs, taken):
        entrants.append(compare.Entrant(contender.label, partial(_own, recipe, contender, template)))
    quantization: Quantization = "nf4" if taken.quantised else "none"
    for name in recipe.evaluate.against:
        entrants.append(compare.Entrant(name, partial(_other, name, quantization)))
    rules = compare.SettingSearch(_shots(recipe), (template.name,), recipe.items_seed, out / store.SCRATCH)
    outcome = compare.meet(entrants, splits, rules)
    pairs = [(FINAL, entrant.name) for entrant in entrants if entrant.name != FINAL]
    how = {"subject": FINAL, "left_out": left_out, **taken.facts(recipe.evaluate.precision)}
    result = compare.judged(outcome, pairs).model_copy(update=how)
    compare.write(out, outcome, result)
    return result


def splits_of(recipe: Recipe) -> tuple[list[compare.TaskSplit], list[str]]:
    """The recipe's tasks that can be compared, each once and zero-shot; and the labels of those that cannot.
    RecipeError where none is left."""
    found: dict[str, compare.Questions] = {}
    left_out: list[str] = []
    for section in recipe.evaluate.tasks:
        bare = section.model_copy(update={"shots": 0})
        task = part_of(load_task(bare, recipe.items_seed, world_of(recipe)), recipe, "scored")
        if not compare.comparable(task):
            left_out.append(section.label)
        elif bare.label not in found:
            found[bare.label] = compare.Questions(task, bare)
    if not found:
        raise RecipeError(
            f"evaluate.against: none of the tasks can be compared ({', '.join(left_out)})\n"
            "name one whose metric is accuracy, with 16 items or more"
        )
    return compare.splits_of(list(found.values()), recipe.items_seed), left_out


def check(recipe: Recipe, offline: bool) -> None:
    """Before anything is trained: the models are there (a Hub id is fetched now), and some task can be compared."""
    for name in recipe.evaluate.against:
        locate(name, offline=offline)
    _, left_out = splits_of(recipe)
    if left_out:
        ui.note(f"evaluate.against: no choices of accuracy, or too few, and not compared: {', '.join(left_out)}")


def _shots(recipe: Recipe) -> tuple[int, ...]:
    """None, and every number of examples that a task of the recipe asks for."""
    return tuple(sorted({0, *(section.shots for section in recipe.evaluate.tasks)}))


def _own(recipe: Recipe, contender: Contender, template: templates.Template) -> OpenModel:
    """Base or result of the run, with the template that suits it: the base's own, that of training."""
    model, tokenizer = open_contender(recipe, contender)
    asked = template if contender.label == FINAL else templates.for_base(templates.default(None, contender.stack.base))
    location = Location(contender.label, "model", contender.stack.base, (), asked, world_of(recipe))
    taken = contender.taken
    return OpenModel(location, model, tokenizer, "nf4" if taken.quantised else "none", taken.computed_in)


def _other(name: str, quantization: Quantization) -> OpenModel:
    return open_model(locate(name, offline=True), quantization)
