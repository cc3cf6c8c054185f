"""Training is exact: equal settings give equal trajectories, a resumed run is the uninterrupted one, bad steps stop."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import MICRO, MicroRun
from qmedtune_kernels import lora
from safetensors.torch import load_file
from stages import losses, stop_after
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qmedtune import interrupt, plan, store, train
from qmedtune import model as models
from qmedtune.data.packing.pack import PackedRows
from qmedtune.errors import RunError
from qmedtune.modeling import collation, fused, loss
from qmedtune.parsing.loader import load_recipe
from qmedtune.recipe import Recipe
from qmedtune.results import Kernels
from qmedtune.training import checkpoints, stage_callback, trainer

# TRL's own tolerances for trajectories that must be equal but for rounding: the largest difference of the loss, and the
# mean of the signed differences, which catches a one-sided bias.
MAX_DEVIATION, MEAN_DEVIATION = 1e-3, 1e-5
FP32 = ("model.compute_dtype=float32",)


def micro(*settings: str) -> Recipe:
    recipe, _ = plan.resolve(load_recipe(MICRO, settings).recipe)
    return recipe


def trained(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def run_stage(micro_run: MicroRun, out: Path, *settings: str) -> list[float]:
    out.mkdir(exist_ok=True)
    train.train_stage(micro(*FP32, *settings), 0, micro_run.inputs(), out)
    return losses(out)


def assert_equal_trajectories(a: list[float], b: list[float]) -> None:
    differences = [x - y for x, y in zip(a, b, strict=True)]
    assert max(map(abs, differences)) <= MAX_DEVIATION
    assert abs(sum(differences)) / len(differences) <= MEAN_DEVIATION


@pytest.fixture(scope="module")
def whole(micro_run: MicroRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted stage, in fp32, the batch in one piece."""
    out = tmp_path_factory.mktemp("whole")
    run_stage(micro_run, out)
    return out


@pytest.mark.parametrize(
    "setting",
    ["stages[0].cpt.micro_batch=1", "stages[0].cpt.gradient_checkpointing=true"],
)
def test_equal_settings_give_equal_trajectories(micro_run: MicroRun, whole: Path, tmp_path: Path, setting: str):
    assert_equal_trajectories(run_stage(micro_run, tmp_path / "out", setting), losses(whole))


def test_adapters_are_stacked_once_a_step_with_the_bits_of_stacking_them_for_each_micro_batch(
    micro_run: MicroRun, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls, stack = [], lora.stack_b
    monkeypatch.setattr(lora, "stack_b", lambda *given: calls.append(given) or stack(*given))
    once = run_stage(micro_run, tmp_path / "once", "stages[0].cpt.micro_batch=2")
    stacked = len(calls)
    monkeypatch.setattr(fused, "steady", lambda model: nullcontext())
    each = run_stage(micro_run, tmp_path / "each", "stages[0].cpt.micro_batch=2")
    assert once == each and stacked < len(calls) - stacked
    before, now = trained(tmp_path / "each"), trained(tmp_path / "once")
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert_equal_trajectories(once, losses(whole))


def test_kernels_on_and_off_give_equal_trajectories(
    micro_run: MicroRun, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "install_kernels", lambda model, mode, where: Kernels(mode="reference"))
    assert_equal_trajectories(run_stage(micro_run, tmp_path / "out"), losses(whole))


def test_a_loss_spike_is_logged_and_told(
    micro_run: MicroRun, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("qmedtune.training.stage_callback.SPIKE_WINDOW", 3)
    original, spiked = train.StageCallback.on_log, losses(whole)
    spiked[8] *= 3

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and state.global_step == 9:
            logs = {**logs, "loss": spiked[8]}
        original(self, args, state, control, logs, **kwargs)

    monkeypatch.setattr(train.StageCallback, "on_log", on_log)
    products = torch.backends.cuda.matmul
    products.allow_fp16_reduced_precision_reduction = products.allow_bf16_reduced_precision_reduction = True
    facts = train.train_stage(micro(*FP32), 0, micro_run.inputs(), tmp_path).as_json()
    assert not products.allow_fp16_reduced_precision_reduction and not products.allow_bf16_reduced_precision_reduction
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert losses(tmp_path) == spiked
    assert len(facts["warnings"]) == 1 and facts["warnings"][0].startswith(f"step 9: loss {spiked[8]:.3f} is a spike")


@pytest.mark.parametrize("step", [1, 6])
def test_a_resumed_stage_is_bit_identical(
    micro_run: MicroRun, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train.StageCallback, "on_step_end", stop_after(step))
        with pytest.raises(interrupt.Interrupted):
            run_stage(micro_run, out)
    interrupt.stop.signal = None
    assert checkpoints.last_intact(out)
    assert run_stage(micro_run, out) == losses(whole)
    for name, weights in trained(whole).items():
        assert torch.equal(weights, trained(out)[name]), name


def test_trained_weights_stay_fp32_across_a_resume(
    micro_run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    original = trainer.QTrainer.training_step

    def spy(self, model, inputs, num_items_in_batch=None):
        seen.append({p.dtype for p in trainer.trainable(model).values()})
        return original(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(trainer.QTrainer, "training_step", spy)
    monkeypatch.setattr(train.StageCallback, "on_step_end", stop_after(2))
    with pytest.raises(interrupt.Interrupted):
        train.train_stage(micro("model.compute_dtype=bfloat16"), 0, micro_run.inputs(), tmp_path)
    interrupt.stop.signal = None
    monkeypatch.setattr(train.StageCallback, "on_step_end", stop_after(4))
    with pytest.raises(interrupt.Interrupted):
        train.train_stage(micro("model.compute_dtype=bfloat16"), 0, micro_run.inputs(), tmp_path)
    interrupt.stop.signal = None
    assert len(seen) == 4 and all(dtypes == {torch.float32} for dtypes in seen)


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    loss.token_nll(model, **batch).backward()
    return {name: p.grad.clone() for name, p in trainer.trainable(model).items() if p.grad is not None}


def test_a_quantised_base_leaves_the_adapter_exact(micro_run: MicroRun, tmp_path: Path):
    """SFTTrainer rounds what is trained on a bitsandbytes base to bf16: a continued adapter would lose what it has."""
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(micro_run.base, quantization_config=four_bit, dtype=torch.float32)
    assert base.is_loaded_in_4bit  # as on a GPU
    recipe = micro(*FP32)
    model = models.attach_adapter(base, recipe.adapter, [], continued=True)
    before = {name: p.detach().clone() for name, p in models.trainable(model).items()}
    section = recipe.stages[0].section
    arguments = trainer.trainer_arguments(
        tmp_path, section, seed=0, save_every=10, autocast=None, deterministic=False, checkpointing=False
    )
    rows = PackedRows(micro_run.inputs().tokens)
    material = trainer.Material(model, models.load_tokenizer(micro_run.base), rows, section)
    trainer.QTrainer(material, arguments, [])
    assert all(torch.equal(p, before[name]) for name, p in models.trainable(model).items())


def test_a_stage_leaves_no_model_behind(micro_run: MicroRun, tmp_path: Path):
    """Two do not fit on a card, and Python may take long to find a cycle by itself."""

    def models_alive() -> int:
        return sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())

    gc.collect()
    before = models_alive()
    gc.disable()
    try:
        run_stage(micro_run, tmp_path / "out")
        assert models_alive() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_evaluation_in_the_middle_leaves_gradients_alone(micro_run: MicroRun, dtype: str):
    """bitsandbytes 0.50 on AVX512-BF16 CPUs repacks its linears in eval mode and then trains on wrong gradients."""
    recipe = micro(f"model.compute_dtype={dtype}")
    base = models.load_base(micro_run.base, recipe.model)
    model = models.attach_adapter(base, recipe.adapter, [], continued=True)
    models.install_kernels(model, "auto")
    rows = train.PackedRows(micro_run.inputs().tokens)
    batch = collation.collate([rows[i] for i in range(4)], pad_id=0)
    del batch["lengths"]
    with torch.no_grad():  # B starts at zero, which would hide wrong gradients of A
        for name, weights in trainer.trainable(model).items():
            if "lora_B" in name:
                weights.normal_(std=0.02)
    before = gradients(model, batch)
    stage_callback.mean_loss(model, rows, 0, 4)
    after = gradients(model, batch)
    assert before.keys() == after.keys() and len(before) > 10
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name
        assert gradient.abs().max() > 0, name


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(
    micro_run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dropout = "adapter.dropout=0.2"  # a retried batch must draw what it would have drawn at the small size
    small = run_stage(micro_run, tmp_path / "small", "stages[0].cpt.micro_batch=1", dropout)
    original = trainer.token_nll

    def greedy(model, input_ids, **rest):
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("injected")
        return original(model, input_ids, **rest)

    monkeypatch.setattr(trainer.QTrainer, "nll", staticmethod(greedy))
    (tmp_path / "large").mkdir()
    facts = train.train_stage(micro(*FP32, dropout), 0, micro_run.inputs(), tmp_path / "large").as_json()
    assert losses(tmp_path / "large") == small
    assert facts["micro_batch"] == 1 and len(facts["warnings"]) == 2  # 4 rows, 2, 1
    assert all(said.startswith("step 1: out of memory: micro-batch") for said in facts["warnings"])


def test_out_of_memory_with_one_row_names_remedies(
    micro_run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*args, **kwargs):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(trainer.QTrainer, "nll", staticmethod(never))
    with pytest.raises(RunError, match=r"01-cpt, step 1: out of memory with one row(.*\n)+ .* frees \d") as caught:
        run_stage(micro_run, tmp_path)
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize("step", [1, 4])
def test_a_nan_stops_before_the_update(
    micro_run: MicroRun, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    out, calls, original = tmp_path / "out", [], trainer.token_nll

    def poisoned(model, input_ids, **rest):
        value = original(model, input_ids, **rest)
        calls.append(model.training)
        return value * float("nan") if model.training and sum(calls) == step else value

    with monkeypatch.context() as patch:
        patch.setattr(trainer.QTrainer, "nll", staticmethod(poisoned))
        with pytest.raises(RunError, match=rf"step {step}: loss is nan.*learning rate"):
            run_stage(micro_run, out, "save.every=1")
    checkpoint = checkpoints.last_intact(out)
    assert (checkpoint is None) if step == 1 else checkpoint.name == f"checkpoint-{step - 1}"
    assert run_stage(micro_run, out) == losses(whole)


def test_a_validation_loss_that_is_not_finite_is_told_and_never_the_best(
    micro_run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = iter([1.0, 1.0, float("nan"), 3.0, 2.0, float("inf")])  # two sources: before the first step, then twice
    monkeypatch.setattr(stage_callback, "mean_loss", lambda *_, **__: next(values, 2.5))
    recipe = micro(*FP32, "validate.keep_best=true", "validate.every=4")
    texts = recipe.validation.model_copy(update={"on": ["literature", "notes"]})
    recipe = recipe.model_copy(update={"validation": texts})
    facts = train.train_stage(recipe, 0, micro_run.inputs(), tmp_path).as_json()
    assert facts["kept_step"] == 12 and [v["step"] for v in facts["validation"]][:4] == [0, 4, 8, 12]
    told = ["step 4: validation loss on literature is nan", "step 8: validation loss on notes is inf"]
    assert facts["warnings"] == told
    json.loads((tmp_path / checkpoints.METRICS).read_text().splitlines()[5], parse_constant=pytest.fail)


def test_each_stage_keeps_the_step_that_is_best_at_what_it_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Texts get worse with every sft step and instructions better, as they do: sft goes by the instructions."""
    from qmedtune.reporting.tables import stages
    from qmedtune.run import run

    calls = iter(range(1000))
    rising = {"literature": 1, "notes": 1, "instructions": -1}
    monkeypatch.setattr(
        stage_callback, "mean_loss", lambda _, rows, *__, **___: 9 + rising[rows.sources[0]] * next(calls) / 100
    )
    settings = ["validate.keep_best=true", "validate.every=2", "stages[1].sft.batch=2", "stages[0].cpt.tokens=1500"]
    loaded = load_recipe(MICRO, settings)
    result = run(loaded.recipe, loaded.text, tmp_path / "run", offline=True, until="02-sft")
    cpt, sft = result.stages
    assert (cpt.kept_step, cpt.kept_by) == (2, ["literature", "notes"])
    assert sft.kept_step == sft.steps > 4 and sft.kept_by == ["instructions"]
    added = next(choice for choice in result.resolved if choice.key == "validate.on")
    assert added.value == "literature, notes, instructions" and "held-out instructions" in added.why
    assert "(best by instructions)" in str(stages(result).rows)


def test_weights_that_are_not_finite_are_not_sealed(
    micro_run: MicroRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the last update there is no loss any more that would tell."""
    original = train.StageCallback.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.steps:
            next(iter(trainer.trainable(self.trainer.trained_model).values())).data[0] = float("inf")
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(train.StageCallback, "on_step_end", on_step_end)
    with pytest.raises(RunError, match=r"01-cpt: .* is not finite after step \d+; the stage was not sealed"):
        run_stage(micro_run, tmp_path, "validate.on=[]")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no trainer state": lambda c: (c / checkpoints.TRAINER_STATE).unlink(),
    "truncated trainer state": lambda c: (c / checkpoints.TRAINER_STATE).write_text("{"),
    "no optimizer and random states": lambda c: (c / checkpoints.STATES).unlink(),
    "truncated optimizer": lambda c: truncate(c / checkpoints.STATES),
    "no schedule": lambda c: (c / checkpoints.STATE).unlink(),
    "flipped bit in the schedule": lambda c: flip(c / checkpoints.STATE),
    "no weights": lambda c: (c / checkpoints.WEIGHTS).unlink(),
    "truncated weights": lambda c: truncate(c / checkpoints.WEIGHTS),
    "flipped bit in weights": lambda c: flip(c / checkpoints.WEIGHTS),
    "flipped bit in optimizer": lambda c: flip(c / checkpoints.STATES),
    "flipped bit in the metrics": lambda c: flip(c / checkpoints.METRICS),
    "flipped bit in the seal": lambda c: flip(c / store.SEAL),
    "no seal": lambda c: (c / store.SEAL).unlink(),
    "empty folder": lambda c: [p.unlink() for p in c.iterdir()],
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def halfway(micro_run: MicroRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage stopped after step 6 with sealed checkpoints 5 and 6."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.StageCallback, "on_step_end", stop_after(6))
        with pytest.raises(interrupt.Interrupted):
            run_stage(micro_run, out)
    interrupt.stop.signal = None
    assert {c.name for c in checkpoints.sealed(out)} == {"checkpoint-5", "checkpoint-6"}
    return out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(halfway: Path, tmp_path: Path, damage: str, capfd):
    shutil.copytree(halfway, tmp_path / "out")
    DAMAGES[damage](tmp_path / "out" / store.SCRATCH / "checkpoint-6")
    found = checkpoints.last_intact(tmp_path / "out")
    assert found is not None and found.name == "checkpoint-5"
    assert capfd.readouterr().err.count("checkpoint-6 is damaged") == 1


def test_resuming_from_the_checkpoint_before_the_damaged_one_gives_the_same_run(
    micro_run: MicroRun, whole: Path, halfway: Path, tmp_path: Path
):
    shutil.copytree(halfway, tmp_path / "out")
    flip(tmp_path / "out" / store.SCRATCH / "checkpoint-6" / checkpoints.WEIGHTS)
    assert run_stage(micro_run, tmp_path / "out") == losses(whole)
    for name, weights in trained(whole).items():
        assert torch.equal(weights, trained(tmp_path / "out")[name]), name


def test_an_attempt_from_another_machine_keeps_its_optimizer_and_says_so(
    micro_run: MicroRun, halfway: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`auto` chose AdamW where the attempt began, and would choose 8 bits here: its states fit no other optimiser."""
    shutil.copytree(halfway, tmp_path / "out")
    elsewhere, _ = plan.resolve(load_recipe(MICRO, FP32).recipe)
    stage = elsewhere.stages[0]
    section = stage.section.model_copy(update={"optimizer": "paged_adamw_8bit"})
    elsewhere = elsewhere.model_copy(update={"stages": [stage.model_copy(update={"cpt": section})]})
    made: list[str] = []
    original = trainer.make_optimizer
    monkeypatch.setattr(trainer, "make_optimizer", lambda m, s: (made.append(s.optimizer), original(m, s))[1])
    facts = train.train_stage(elsewhere, 0, micro_run.inputs(), tmp_path / "out").as_json()
    assert made == ["adamw"]
    (said,) = facts["warnings"]
    assert "optimizer adamw there, paged_adamw_8bit here" in said and "not bit-identical" in said


def test_nothing_in_a_checkpoint_is_pickled(halfway: Path):
    found = {path.suffix for path in (halfway / store.SCRATCH / "checkpoint-6").iterdir()}
    assert found == {".safetensors", ".json", ".jsonl"}


def test_retention_keeps_the_checkpoint_just_sealed_and_drops_damaged_later_ones():
    steps = [Path(f"checkpoint-{step}") for step in (10, 20, 100)]
    assert checkpoints.superseded(steps, steps[2], keep=2) == steps[:1]
    assert checkpoints.superseded(steps, steps[1], keep=1) == [steps[2], steps[0]]
    assert checkpoints.superseded(steps, steps[0], keep=2) == steps[1:]
