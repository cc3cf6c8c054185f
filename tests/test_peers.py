"""Several processes train what one would: two on the CPU over gloo, started as `run --gpus 2` starts them."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MICRO, MicroRun
from safetensors.torch import load_file
from stages import losses, stop_after
from torch.distributed.tensor import DTensor

from qmedtune import cli, interrupt, peers, plan, train
from qmedtune import model as models
from qmedtune.errors import RunError
from qmedtune.group import Group
from qmedtune.parsing.loader import load_recipe
from qmedtune.planning.machine import this_machine
from qmedtune.resolved import ResolvedRecipe
from qmedtune.results import Trained
from qmedtune.training import checkpoints

LOSS, ADAPTER = 2e-6, 1e-5  # how far sums in another order may lead, over the steps of a stage in fp32
# Three rows a step for two processes; prompts count a third; the last batch is short.
SETTINGS = (
    "model.compute_dtype=float32",
    "stages[1].sft.batch=3",
    "stages[1].sft.micro_batch=3",
    "stages[1].sft.epochs=1.5",
    "stages[1].sft.loss_on=0.3",
    "data.literature.max_records=30",
    "stages[0].cpt.tokens=2500",
    "save.every=3",
)
NO_MEMORY = "has no memory to score"
IN_4_BITS = "linears are kept in 4 bits"  # what a GPU does; a CPU decodes them once
# In the process that follows: what a test writes into $FAULTS is done wrong in every batch, or at the start of a stage.
FAULTY = """
import os, sys
if sys.argv[:1] == ["-m"]:
    import test_peers
    test_peers.plant(os.environ["FAULTS"])
"""


def plant(path: str) -> None:
    """Make this process do what the file at `path` says is to be wrong."""
    from qmedtune.evaluation import measure
    from qmedtune.training import trainer

    share, add_up, weigh, follow = Group.share, Group.add_up, trainer.supervised_weight, train.follow_stage
    place: dict[str, Group] = {}

    def wrong() -> str:
        return Path(path).read_text()

    if wrong() == "dies at start":
        os._exit(7)

    def shared(self, arrays):
        place["here"] = self
        return share(self, arrays)

    def added(self, loss, parameters):
        if wrong() == "each its own gradient":
            return loss
        return add_up(self, loss, parameters)

    def weighed(inputs):
        here = place.get("here")
        if wrong() != "each its own denominator" or here is None:
            return weigh(inputs)
        return weigh(share(here, inputs)) * here.size

    def followed(*given):
        if wrong() == "ends":
            os._exit(9)
        if wrong() == "has no data":
            raise RunError("/data/02-sft: not there\nmore words")
        return follow(*given)

    def looked(self: Path, **more: bool) -> bool:
        return exists(self, **more) and not (self.name == "model" and wrong() == "sees no base")

    def scored(*given):
        if wrong() == NO_MEMORY:
            raise torch.OutOfMemoryError("planted")
        return score(*given)

    def kept_or_decoded(*given):
        return 0 if wrong() == IN_4_BITS else decode(*given)

    decode, models.dequantize_linears = models.dequantize_linears, kept_or_decoded
    exists = Path.exists
    if "qmedtune.follower" in sys.orig_argv:  # the machine of rank 0 sees all
        Path.exists = looked
        score, measure._score = measure._score, scored
    Group.share, Group.add_up, trainer.supervised_weight, train.follow_stage = shared, added, weighed, followed


def recipe(*settings: str, cards: int = 1) -> ResolvedRecipe:
    machine = replace(this_machine(), cards=cards)
    resolved, _ = plan.resolve(load_recipe(MICRO, [*SETTINGS, *settings]).recipe, machine)
    return resolved


def train_sft(packed: MicroRun, out: Path, *settings: str, cards: int = 1) -> Trained:
    out.mkdir(exist_ok=True)
    return train.train_stage(recipe(*settings, cards=cards), 1, packed.inputs("02-sft"), out)


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def differs(a: Path, b: Path) -> tuple[float, float]:
    """(most that a loss differs by, most that a weight does)."""
    loss = max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))
    ours, theirs = adapter(a), adapter(b)
    assert ours.keys() == theirs.keys()
    return loss, max(float((weights - theirs[name]).abs().max()) for name, weights in ours.items())


@pytest.fixture(scope="module")
def packed(micro_run: MicroRun, tmp_path_factory: pytest.TempPathFactory) -> MicroRun:
    from qmedtune.run import run

    loaded = load_recipe(MICRO, SETTINGS)
    folder = tmp_path_factory.mktemp("packed") / "run"
    run(loaded.recipe, loaded.text, folder, offline=True, until="data")
    return MicroRun(folder, micro_run.base)


@pytest.fixture(scope="module")
def one(packed: MicroRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage, trained by one process."""
    out = tmp_path_factory.mktemp("one")
    train_sft(packed, out)
    return out


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file: what both processes are to do wrong. Empty: nothing."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "sitecustomize.py").write_text(FAULTY)
    file = folder / "wrong"
    file.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS", str(file))
        patch.setenv("PYTHONPATH", os.pathsep.join((str(folder), str(Path(__file__).parent))))
        patched = ((Group, "share"), (Group, "add_up"), (train, "follow_stage"), (models, "dequantize_linears"))
        for owner, name in patched:
            patch.setattr(owner, name, getattr(owner, name))  # put back in the end
        patch.setattr("qmedtune.training.trainer.supervised_weight", train_weight())
        plant(str(file))
        yield file


def train_weight():
    from qmedtune.training import trainer

    return trainer.supervised_weight


@pytest.fixture
def right(faults: Path) -> Iterator[Path]:
    yield faults
    faults.write_text("")


@pytest.fixture(scope="module")
def pair(faults: Path) -> Iterator[None]:
    """A second process that waits to be called, for all tests of this module."""
    with peers.called("2"):
        yield


# ---- what ends a run: before `pair` is there, since a process leads one group at a time ------------------------------


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("has no data", "process 2 of 2: /data/02-sft: not there"),
        ("ends", "process 2 of 2 ended by itself (exit code 9)"),
        ("dies at start", "process 2 of 2 ended by itself (exit code 7)"),
        (
            "sees no base",
            "process 2 of 2: {node} does not see {base}: run folder and base must lie",
        ),
    ],
)
def test_a_process_that_cannot_is_named(
    packed: MicroRun, right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
):
    right.write_text(fault)
    started = keep_what_is_started(monkeypatch)
    with pytest.raises(RunError) as caught, peers.called("2"):
        train_sft(packed, tmp_path)
    expected = said.format(node=platform.node(), base=packed.base.resolve())
    assert str(caught.value).splitlines()[0].startswith(expected)
    assert len(started) == 1 and started[0].poll() is not None


def keep_what_is_started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """The processes that are started from here on."""
    start, started = peers._started, []

    def kept(size: int):
        found = start(size)
        started.extend(found.processes.values())
        return found

    monkeypatch.setattr(peers, "_started", kept)
    return started


def test_other_versions_are_refused(faults: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "versions", lambda: {"torch": "0.1"})
    with pytest.raises(RunError, match=r"process 2 of 2 has other versions: .*torch 2.*, here 0\.1"), peers.called("2"):
        pass


# ---- two train what one does -----------------------------------------------------------------------------------------


def test_two_processes_train_what_one_does(packed: MicroRun, one: Path, pair: None, tmp_path: Path):
    assert len(losses(one)) > 12 and len({round(loss, 6) for loss in losses(one)}) == len(losses(one))
    trained = train_sft(packed, tmp_path)
    assert len(trained.processes) == 2 and len(set(trained.processes)) == 1 and not trained.warnings
    loss, weight = differs(tmp_path, one)
    assert loss <= LOSS and weight <= ADAPTER
    assert (tmp_path / "metrics.jsonl").read_text().count('"tokens"') == len(losses(one))
    rows = [path.name for path in tmp_path.iterdir()]
    assert sorted(rows) == sorted(path.name for path in one.iterdir())  # the second writes nothing of its own


@pytest.mark.parametrize("fault", ["each its own gradient", "each its own denominator"])
def test_a_wrong_exchange_would_be_seen(
    packed: MicroRun, one: Path, pair: None, right: Path, tmp_path: Path, fault: str
):
    right.write_text(fault)
    train_sft(packed, tmp_path)
    loss, weight = differs(tmp_path, one)
    assert loss > 10 * LOSS and weight > 10 * ADAPTER


# ---- FSDP2: the frozen base is held together -------------------------------------------------------------------------

SHARDED = ("shard=true",)
FROZEN_EMBEDDINGS = ("adapter.train_embeddings=false",)


@pytest.fixture(scope="module")
def frozen(packed: MicroRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """The stage with frozen embedding and head, trained by one process."""
    out = tmp_path_factory.mktemp("frozen")
    return out, train_sft(packed, out, *FROZEN_EMBEDDINGS)


def held_here(model: torch.nn.Module) -> dict[str, int]:
    """Elements of this process by name of the weight, of those that are sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            found[name] = parameter.to_local().numel()
    return found


def test_a_sharded_base_trains_what_a_whole_one_does(
    packed: MicroRun,
    frozen: tuple[Path, Trained],
    pair: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    built = keep_what_is_built(monkeypatch)
    trained = train_sft(packed, tmp_path, *SHARDED, *FROZEN_EMBEDDINGS, cards=2)
    out, whole = frozen
    loss, weight = differs(tmp_path, out)
    assert loss <= LOSS and weight <= ADAPTER
    assert len(trained.processes) == 2 and not trained.warnings
    for ours, theirs in zip(trained.validation, whole.validation, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, abs=LOSS)
    here = held_here(built[0].model)
    config = built[0].model.config
    assert len(here) == 7 * config.num_hidden_layers + 2  # all linears, embedding and head
    (embedding,) = [size for name, size in here.items() if "embed_tokens" in name]
    assert embedding == config.vocab_size * config.hidden_size / 2


def test_sharded_nf4_weights_train_what_decoded_ones_do(
    packed: MicroRun, one: Path, pair: None, right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As on a GPU: bitsandbytes' bytes under another dtype, decoded by us in every product."""
    built = keep_what_is_built(monkeypatch)
    right.write_text(IN_4_BITS)
    train_sft(packed, tmp_path, *SHARDED, cards=2)
    loss, weight = differs(tmp_path, one)
    assert loss <= LOSS and weight <= ADAPTER
    kernels = built[0].kernels
    assert kernels is not None and not kernels.own_forward  # found by the description that bitsandbytes' module keeps
    here = held_here(built[0].model)
    config = built[0].model.config
    assert len(here) == 7 * config.num_hidden_layers
    (down,) = [size for name, size in here.items() if "layers.0.mlp.down_proj" in name]
    assert down == config.hidden_size * config.intermediate_size / 2 / 4 / 2  # 2 a byte, 4 bytes an fp32, 2 processes


def keep_what_is_built(monkeypatch: pytest.MonkeyPatch) -> list[train.Built]:
    """The models of stages that are trained from here on."""
    make, built = train._make_model, []

    def kept(*given):
        built.append(make(*given))
        return built[-1]

    monkeypatch.setattr(train, "_make_model", kept)
    return built


@pytest.mark.parametrize(
    "fault", [pytest.param("each its own gradient", marks=pytest.mark.slow), "each its own denominator"]
)
def test_a_wrong_exchange_of_a_sharded_base_would_be_seen(
    packed: MicroRun, frozen: tuple[Path, Trained], pair: None, right: Path, tmp_path: Path, fault: str
):
    right.write_text(fault)
    train_sft(packed, tmp_path, *SHARDED, *FROZEN_EMBEDDINGS, cards=2)
    loss, weight = differs(tmp_path, frozen[0])
    assert loss > 10 * LOSS and weight > 10 * ADAPTER


@pytest.mark.parametrize("begun_by", [1, 2])
def test_what_was_stopped_goes_on_with_another_number_of_processes(
    packed: MicroRun, one: Path, pair: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun_by: int
):
    with monkeypatch.context() as patch:
        patch.setattr(train.StageCallback, "on_step_end", stop_after(4))
        if begun_by == 1:
            patch.setattr(peers, "_alone", True)
        with pytest.raises(interrupt.Interrupted):
            train_sft(packed, tmp_path)
    interrupt.stop.signal = None
    found = checkpoints.last_intact(tmp_path)
    assert found is not None and found.name == "checkpoint-4"
    if begun_by == 2:
        monkeypatch.setattr(peers, "_alone", True)
    train_sft(packed, tmp_path)
    loss, weight = differs(tmp_path, one)
    assert loss <= LOSS and weight <= ADAPTER


def test_running_out_of_memory_in_one_process_halves_the_micro_batch_of_all(
    packed: MicroRun, one: Path, pair: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from qmedtune.training.trainer import QTrainer

    accumulate, failed = QTrainer._accumulate, []

    def once(self, model, inputs, supervised):
        if not failed and self.state.global_step == 2:
            failed.append(self.state.global_step)
            return None
        return accumulate(self, model, inputs, supervised)

    monkeypatch.setattr(QTrainer, "_accumulate", once)
    trained = train_sft(packed, tmp_path)
    assert failed == [2] and trained.micro_batch == 1
    loss, weight = differs(tmp_path, one)
    assert loss <= LOSS and weight <= ADAPTER


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["", NO_MEMORY])
def test_scores_are_shared_out_and_are_those_of_one_process(
    packed: MicroRun, one: Path, pair: None, right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    """Also where the other process has no room for its part: the one that leads makes it, and nothing ends."""
    from qmedtune import evaluate
    from qmedtune.evaluation import measure

    # Three draws of examples are three parts; two sources of text.
    settings = ("evaluate.tasks=[{task: facts, limit: 4, shots: 1}]", "evaluate.generate=false")
    compared = evaluate.EvaluatedModels(
        packed.inputs("02-sft", one / "adapter").start, validation=packed.folder / "data/validation"
    )
    scored, score = [], measure._score
    monkeypatch.setattr(measure, "_score", lambda *given: scored.append(1) or score(*given))
    found = []
    for folder, alone in ((tmp_path / "one", True), (tmp_path / "two", False)):
        folder.mkdir()
        monkeypatch.setattr(peers, "_alone", alone)
        scored.clear()
        right.write_text(fault)
        found.append((evaluate.evaluate_step(recipe(*settings), compared, folder).as_json(), len(scored)))
    (one_by_one, all_parts), (shared, led) = found
    assert shared == one_by_one
    assert led == all_parts if fault else 0 < led < all_parts
    for file in sorted((tmp_path / "one").glob("*.jsonl")):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("cards", "asked", "said"),
    [(1, "2", "this machine has 1"), (4, "none", "not a number of GPUs"), (0, "0", "not a number of GPUs")],
)
def test_more_than_there_is_is_refused(cards: int, asked: str, said: str, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert cli.invoke(["run", str(MICRO), "--gpus", asked, "--out", str(tmp_path / "out")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_process_whose_leader_is_gone_before_it_begins_ends(tmp_path: Path):
    words = [sys.executable, "-m", "qmedtune.follower", str(tmp_path / "store"), "1", "2", str(2**22)]
    assert subprocess.run(words, timeout=120).returncode == 1


# ---- the command line ------------------------------------------------------------------------------------------------


def command(out: Path, *more: str) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["-m", "qmedtune", "run", str(MICRO), "--offline", "--until", "02-sft", "--out", str(out), *settings, *more]


def followers_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in listed.split()]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_torchrun_starts_a_run_of_one(one: Path, tmp_path: Path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [sys.executable, *torchrun, sys.executable, *command(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Report: ") == 1
    assert len(losses(tmp_path / "run" / "02-sft")) == len(losses(one))


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["follower", "leader"])
def test_a_killed_process_ends_all_and_the_same_command_goes_on(tmp_path: Path, packed: MicroRun, killed: str):
    whole, out = tmp_path / "whole", tmp_path / "out"
    words = [sys.executable, *command(out, "--gpus", "2")]
    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(words, stdout=said, stderr=said)
        metrics = out / ".building" / "02-sft" / checkpoints.METRICS
        until = time.monotonic() + 240
        while time.monotonic() < until and not (metrics.is_file() and '"step": 4' in metrics.read_text()):
            assert run.poll() is None, (tmp_path / "said").read_text()[-2000:]
            time.sleep(0.02)
        (follower,) = followers_of(run.pid)
        os.kill(follower if killed == "follower" else run.pid, signal.SIGKILL)
        assert run.wait(60) == (1 if killed == "follower" else -signal.SIGKILL)
    until = time.monotonic() + 30
    while is_there(follower) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_there(follower)
    if killed == "follower":
        assert "another process of this run ended" in (tmp_path / "said").read_text()
    assert subprocess.run(words, capture_output=True, timeout=300).returncode == 0
    subprocess.run([sys.executable, *command(whole, "--gpus", "2")], capture_output=True, timeout=300, check=True)
    assert differs(out / "02-sft", whole / "02-sft") == (0.0, 0.0)
