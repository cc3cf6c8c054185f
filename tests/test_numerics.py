"""Precision and attention: decided once, the same for planner and trainer, and what the trainer really computes in."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import MICRO, MicroRun
from transformers import LlamaConfig, LlamaForCausalLM

from qmedtune import model as models
from qmedtune import train
from qmedtune.errors import RecipeError
from qmedtune.llama_shape import facts_from_config
from qmedtune.modeling.attention import varlen
from qmedtune.modeling.loss import token_nll
from qmedtune.parsing.loader import load_recipe
from qmedtune.plan import make_plan
from qmedtune.planning import fit
from qmedtune.planning.machine import GIB, Machine, card_of, this_machine
from qmedtune.planning.memory import Setup, full_kept_bytes_per_token
from qmedtune.planning.numerics import numerics
from qmedtune.planning.resolve import refuse_half_on_cpu, resolve
from qmedtune.recipe import ModelSection
from qmedtune.run import run
from qmedtune.training import checkpoints
from qmedtune.training.trainer import QTrainer

CPU = replace(this_machine(), kind="cpu", capability=None, bf16=True, present=True)
T4, AMPERE = card_of(16, bf16=False), card_of(24)
FULL = ("stages[0].cpt.adapter=none", "stages[0].cpt.tokens=2000")


@pytest.mark.parametrize(
    ("machine", "full", "seq_len", "dtype", "expected"),
    [
        (CPU, False, 64, "bfloat16", ("bfloat16", False, False, "eager")),
        (CPU, False, 2048, "bfloat16", ("bfloat16", False, False, "varlen")),
        (CPU, True, 64, "bfloat16", ("float32", False, False, "eager")),
        (AMPERE, False, 64, "bfloat16", ("bfloat16", False, False, "varlen")),
        (AMPERE, True, 2048, "bfloat16", ("bfloat16", True, False, "varlen")),
        (AMPERE, True, 2048, "float32", ("float32", False, False, "sdpa")),
        (T4, False, 2048, "float16", ("float16", False, True, "sdpa")),
        (T4, True, 2048, "float16", ("float16", True, True, "sdpa")),
    ],
)
def test_the_decision(machine: Machine, full: bool, seq_len: int, dtype, expected):
    decided = numerics(ModelSection(base="x", compute_dtype=dtype), full=full, seq_len=seq_len, machine=machine)
    assert (decided.dtype, decided.autocast, decided.scaled, decided.attention) == expected


class Asked(Exception):
    """What the trainer was about to load."""


@pytest.mark.parametrize(
    ("machine", "seq_len", "full"), product((CPU, T4, AMPERE), (64, 512), (False, True)), ids=lambda value: str(value)
)
def test_planner_and_trainer_say_the_same(
    micro_run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, seq_len: int, full: bool
):
    settings = [f"stages[0].cpt.seq_len={seq_len}", *(FULL if full else ())]
    recipe, _ = resolve(load_recipe(MICRO, settings).recipe, machine)
    planned = fit.setup_of(recipe, 0)

    def asked(folder, section, *, attention, **_):
        raise Asked(attention)

    monkeypatch.setattr(train, "this_machine", lambda: machine)
    monkeypatch.setattr(train, "check_card", lambda *_: None)
    monkeypatch.setattr(models, "load_base", asked)
    with pytest.raises(Asked) as loading:
        train.train_stage(recipe, 0, micro_run.inputs(), tmp_path)
    assert str(loading.value) == planned.attention


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set]:
    """dtypes inside the real trainer: what q_proj gives in training and in evaluation mode, weights, gradients, and
    optimiser states."""
    found: dict[str, set] = {name: set() for name in ("products", "validation", "weights", "gradients", "states")}
    accumulate, save = QTrainer._accumulate, train.StageCallback.on_step_end

    def accumulated(self, model, inputs, supervised):
        loss = accumulate(self, model, inputs, supervised)
        found["weights"] |= {p.dtype for p in model.parameters()}
        found["gradients"] |= {p.grad.dtype for p in model.parameters() if p.grad is not None}
        return loss

    def ended(self, args, state, control, **kwargs):
        states = self.trainer.optimizer.state.values()
        found["states"] |= {s["exp_avg"].dtype for s in states}
        save(self, args, state, control, **kwargs)

    def watched(load):
        def loaded(*args, **kwargs):
            model = load(*args, **kwargs)
            q_proj = model.model.layers[0].self_attn.q_proj
            q_proj.register_forward_hook(
                lambda module, _, out: found["products" if module.training else "validation"].add(out.dtype)
            )
            return model

        return loaded

    monkeypatch.setattr(QTrainer, "_accumulate", accumulated)
    monkeypatch.setattr(train.StageCallback, "on_step_end", ended)
    monkeypatch.setattr(models, "load_full", watched(models.load_full))
    monkeypatch.setattr(models, "from_scratch", watched(models.from_scratch))
    return found


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / checkpoints.METRICS).read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_full_stage_computes_in_what_the_plan_says(
    micro_run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: dict[str, set]
):
    """On the CPU fp32; as for a card bf16 products over fp32 weights, gradients and states, and about the same loss."""
    loaded = load_recipe(MICRO, FULL)
    assert make_plan(loaded.recipe)["stages"][0]["dtype"] == "float32"
    recipe, _ = resolve(loaded.recipe)
    train.train_stage(recipe, 0, micro_run.inputs(), tmp_path / "cpu")
    assert all(dtypes == {torch.float32} for dtypes in seen.values()), seen
    for dtypes in seen.values():
        dtypes.clear()
    as_card = replace(this_machine(), kind="cuda", capability=7.5, bf16=True, memory_bytes=16 * GIB)
    monkeypatch.setattr(train, "this_machine", lambda: as_card)
    monkeypatch.setattr(train, "check_card", lambda *_: None)
    on_card, _ = resolve(loaded.recipe, as_card)
    assert fit.setup_of(on_card, 0).compute_dtype == "bfloat16"
    train.train_stage(on_card, 0, micro_run.inputs(), tmp_path / "card")
    assert seen["products"] == seen["validation"] == {torch.bfloat16}
    assert seen["weights"] == seen["gradients"] == seen["states"] == {torch.float32}
    pairs = list(zip(losses(tmp_path / "cpu"), losses(tmp_path / "card"), strict=True))
    assert max(abs(a - b) for a, b in pairs) < 0.05 and pairs[0][0] != pairs[0][1]


def test_the_plan_says_what_a_full_stage_computes_in():
    for machine, dtype, why in ((CPU, "float32", "a CPU trains"), (AMPERE, "bfloat16", "autocast")):
        _, decisions = resolve(load_recipe(MICRO, FULL).recipe, machine)
        said = next(d for d in decisions if d["key"] == "stages[0].cpt computes in")
        assert said["value"] == dtype and why in said["why"]


def test_fp16_on_a_cpu_is_refused_before_a_model_is_used(tmp_path: Path):
    """By run and plan, before anything is written; its data may be prepared there for a card elsewhere."""
    loaded = load_recipe(MICRO, ["model.compute_dtype=float16"])
    refusal = "(?s)float16 given, for a run on a CPU.*allowed on a CPU: auto, bfloat16"
    with pytest.raises(RecipeError, match=refusal):
        refuse_half_on_cpu(loaded.recipe, CPU)
    if not this_machine().is_gpu:
        with pytest.raises(RecipeError, match=refusal):
            make_plan(loaded.recipe)
        with pytest.raises(RecipeError, match=refusal):
            run(loaded.recipe, loaded.text, tmp_path / "run", offline=True)
        assert not (tmp_path / "run").exists()
    refuse_half_on_cpu(loaded.recipe, AMPERE)


SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2}


@pytest.mark.parametrize(("dtype", "attention"), [("bfloat16", "sdpa"), ("float32", "sdpa"), ("float32", "eager")])
def test_saved_activations_of_a_full_stage_are_what_torch_saves(dtype: str, attention: str):
    def saved(layers: int) -> int:
        config = LlamaConfig(**SHAPE, vocab_size=512, num_hidden_layers=layers, attn_implementation=attention)
        model = LlamaForCausalLM(config).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept, alive = {}, []

        def keep(tensor):
            alive.append(tensor)
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        positions = torch.arange(64).repeat(2)[None]
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(input_ids=positions, position_ids=positions, use_cache=False)
        return sum(size for place, size in kept.items() if place not in weights)

    facts = facts_from_config("x", {**SHAPE, "model_type": "llama", "num_hidden_layers": 3, "vocab_size": 512}, "test")
    setup = Setup(128, 1, False, "adamw", dtype, full=True, attention=attention)
    copies = 2 * facts.linear_parameters // facts.layers if dtype == "bfloat16" else 0
    predicted = 128 * full_kept_bytes_per_token(facts, setup) + copies
    assert predicted == pytest.approx(saved(3) - saved(2), rel=0.03)


def test_variable_lengths_take_what_autocast_leaves_in_fp32():
    """Rotation promotes queries and keys to fp32 under autocast; the kernels take 16 bit alone."""
    query, value = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 8, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = varlen(None, query, query, value, None, position_ids=torch.arange(8)[None])
    assert output.dtype == torch.bfloat16


def test_the_loss_is_computed_in_the_products_dtype_under_autocast():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=512, num_hidden_layers=1))
    ids, positions = torch.arange(64)[None], torch.arange(64)[None]
    seen = []
    head = model.lm_head.weight
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append((tuple(t.shape), t.dtype)) or t, lambda t: t
    ):  # fmt: skip
        loss = token_nll(model, ids, ids, positions)
    assert loss.dtype == torch.float32
    assert (tuple(head.shape), torch.bfloat16) in seen or ((head.shape[1], head.shape[0]), torch.bfloat16) in seen
