"""In which precision a run's scores are taken, and why: decided once, for the evaluation, its report and `plan`.

People get the merged model, so that is what is scored (`delivered`), against the untouched base in the same dtype. A
base that was rounded to NF4 is worse than the one that people could have used: against it a run looks better than it
is (SmolLM2-135M: perplexity -41 % in NF4, -24 % as delivered, 2026-11).
Deliberately absent: loading (evaluate.py), torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qmedtune import units
from qmedtune.allowed import ScoringPrecision
from qmedtune.errors import DoesNotFit
from qmedtune.llama_shape import BYTES_OF
from qmedtune.planning.fit import budget_bytes, setup_of
from qmedtune.planning.machine import Machine, this_machine
from qmedtune.planning.memory import weight_bytes
from qmedtune.planning.shapes import base_facts
from qmedtune.recipe import Recipe
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import BaseAndFinal, Merge

# Beside the weights a forward pass of 8,192 tokens holds a key/value cache (8B: 1 GiB), one layer's activations and a
# slice of logits; 2 GiB is taken for all of it.
BESIDE_WEIGHTS_BYTES = 2 * 1024**3
# Merged against the NF4 model that was trained. NF4 of 7B models moves some .01 nats and 5 % of the top tokens; beyond
# this the two are different models, and figures of one say little about the other.
LARGE_SHIFT_KL, SMALL_SHARE_TOP1 = 0.05, 0.9


@dataclass(frozen=True)
class Precision:
    """Number format in which an evaluation is run.

    weights: dtype of base and result, or `nf4`; computed_in: dtype of the products; why: where it is not what the
    recipe asks for."""

    name: ScoringPrecision
    weights: str
    computed_in: str
    why: str | None = None

    @property
    def quantised(self) -> bool:
        return self.weights == "nf4"

    @property
    def folder(self) -> str:
        """Names what is kept of an unfinished evaluation: that of another machine, or card, may be another one."""
        return f"{self.weights}-{self.computed_in}"

    def facts(self, asked: ScoringPrecision) -> dict[str, str | None]:
        """For evaluation.json: {"precision", "weights", "computed_in", "why"}, and `asked` where that is another."""
        found = {"precision": self.name, "weights": self.weights, "computed_in": self.computed_in, "why": self.why}
        if asked != self.name:
            found["asked"] = asked
        return found


def decide(recipe: Recipe, dtype: str | None = None, machine: Machine | None = None) -> Precision:
    """The precision of a resolved recipe's evaluation. `dtype`: that of the delivered folder, default `merge.dtype`.

    NF4 in place of 16 bit only where the weights do not fit the card: an evaluation never stops a run (exit 4).
    """
    machine = machine or this_machine()
    if recipe.evaluate.precision == "nf4":
        return trained(recipe)
    full16 = recipe.evaluate.precision == "full16"
    weights = recipe.model.compute_dtype if full16 else dtype or recipe.merge.dtype
    needed = base_facts(recipe.model).parameters * BYTES_OF[weights] + BESIDE_WEIGHTS_BYTES
    there = budget_bytes(machine, recipe)
    if machine.is_gpu and needed > there and recipe.model.quantization == "nf4":
        why = f"{weights} takes {units.size(needed)} of {units.size(there)} on {machine.name}"
        return replace(trained(recipe), why=why)
    if full16:
        return Precision("full16", weights, weights)
    return Precision("delivered", weights, computed_in(weights, machine))


def after_no_room(recipe: Recipe, taken: Precision) -> Precision | None:
    """What is taken where memory ran out in `taken`, on a card that others use too; None where nothing is smaller."""
    if taken.quantised or recipe.model.quantization != "nf4":
        return None
    return replace(trained(recipe), why=f"memory ran out in {taken.weights} on {this_machine().name}")


def refuse_unscorable(recipe: ResolvedRecipe, machine: Machine) -> None:
    """DoesNotFit where several GPUs hold the base together because it does not fit one, and are asked for scores or an
    audit: each model is scored by one process, on one GPU."""
    scored = recipe.evaluate.tasks or recipe.evaluate.perplexity
    if not recipe.shard or not (scored or recipe.audit):
        return
    setup = replace(setup_of(recipe, 0), cards=1, sharded=False)
    needed = sum(weight_bytes(base_facts(recipe.model), setup, gpu=True).values()) + BESIDE_WEIGHTS_BYTES
    there = budget_bytes(machine, recipe)
    if machine.is_gpu and needed > there:
        raise DoesNotFit(
            f"{'evaluate' if scored else 'audit'}: scores are taken on one GPU, and this base takes "
            f"{units.size(needed)} of {units.size(there)} there ({machine.name}); only training is sharded\n"
            "remedy: evaluate: {tasks: [], perplexity: []}, no audit; on a larger card `qmedtune eval` the result"
        )


def trained(recipe: Recipe) -> Precision:
    """As the stages were trained: NF4, or the compute dtype where nothing is quantised."""
    dtype = recipe.model.compute_dtype
    return Precision("nf4", "nf4" if recipe.model.quantization == "nf4" else dtype, dtype)


def computed_in(weights: str, machine: Machine) -> str:
    """The dtype that the machine multiplies weights of `weights` in: what it has no instructions for is emulated many
    times slower. fp32 holds every 16-bit value."""
    if weights == "bfloat16":
        return machine.compute_dtype
    return "float32" if weights == "float16" and not machine.is_gpu else weights


def shift_warning(merge: Merge) -> str | None:
    """In words, where the delivered model is far from the NF4 model that was trained."""
    shift = merge.shift_from_nf4
    if shift is None or shift.kl is None or shift.top1 is None:
        return None
    if shift.kl <= LARGE_SHIFT_KL and shift.top1 >= SMALL_SHARE_TOP1:
        return None
    return (
        f"the delivered model is far from the NF4 model that was trained (KL {shift.kl:.2g}, same top token "
        f"{shift.top1:.0%}): judge it by its own scores, and see what training only repaired of NF4's loss"
    )


def quantisation_note(source: str, delivered_in: BaseAndFinal, trained_in: BaseAndFinal) -> str | None:
    """A warning where NF4 makes training look much better than what is delivered. Perplexities of one source, in the
    precision that is delivered and in NF4."""
    in_nf4, delivered = _change(trained_in), _change(delivered_in)
    if in_nf4 >= 0 or in_nf4 > delivered - 0.05:
        return None
    return f"{source}: perplexity {in_nf4:+.0%} in NF4 but {delivered:+.0%} delivered: the rest repaired quantisation"


def _change(perplexity: BaseAndFinal) -> float:
    assert perplexity.base is not None and perplexity.final is not None, "a run scores both"
    return perplexity.final / perplexity.base - 1
