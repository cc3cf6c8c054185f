"""`qmedtune selftest`: the equalities that every run relies on, measured on this machine's own device.

A random LLaMA of two layers (grouped queries, NF4, a LoRA that is not zero) is enough: the paths taken are those of a
real model. On a GPU this is the first thing to run on a new card, driver or torch; it takes seconds.
Deliberately not here: speed (`bench`), the host's facts (`doctor`), and the tests, which go much further (`pytest`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from qmedtune import model as models
from qmedtune.errors import RunError
from qmedtune.model_stack import ModelStack
from qmedtune.modeling.loss import token_nll
from qmedtune.recipe import AdapterSection, MergeSection, ModelSection

VOCAB = 512
SEED = 17
# ||a - b|| / ||b|| that two orders of summation may differ by: about 4 roundings of the compute dtype (2**-8, 2**-11).
LIMITS = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
Check = Callable[["CheckModel"], float]


class Checked(TypedDict):
    """One check: `measured` and `limit` are relative differences unless its name says more."""

    check: str
    measured: float
    limit: float
    ok: bool
    dtype: str


class CheckModel:
    """The small model that the checks share: a base folder, its sections and a batch int64 [4, 64]."""

    def __init__(self, folder: Path, compute_dtype: str) -> None:
        self.folder = folder
        self.section = ModelSection.model_validate({"base": str(folder / "base"), "compute_dtype": compute_dtype})
        self.adapter = AdapterSection(r=8, alpha=16, train_embeddings=False)
        _write_base(folder / "base")
        generator = torch.Generator().manual_seed(SEED)
        self.ids = torch.randint(1, VOCAB, (4, 64), generator=generator).to(models.device())

    def model(self, kernels: str = "auto") -> Any:
        """NF4 base with a LoRA whose B is not zero, always the same weights."""
        torch.manual_seed(SEED)
        base = models.load_base(self.folder / "base", self.section, attention="eager")
        model = models.attach_adapter(base, self.adapter, [], continued=False)
        generator = torch.Generator().manual_seed(SEED)
        for name, parameter in models.trainable(model).items():
            if "lora_B" in name:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.02).to(parameter)
        models.install_kernels(model, kernels)
        return model.train()

    def gradient(self, model: Any, rows: int = 4) -> Tensor:
        """The adapter's gradient over the batch in steps of `rows` rows, flat fp32."""
        model.zero_grad()
        for part in self.ids.split(rows):
            self.nll(model, part).backward()
        trained: Any = models.trainable(model).values()
        return torch.cat([parameter.grad.flatten().float() for parameter in trained])

    def nll(self, model: Any, ids: Tensor, documents: int = 1) -> Tensor:
        """Summed loss of rows that hold `documents` documents of equal length; a first token is never a target."""
        length = ids.shape[1] // documents
        positions = torch.arange(ids.shape[1], device=ids.device).remainder(length).expand_as(ids)
        return token_nll(model, ids, ids.masked_fill(positions == 0, -100), positions)


def selftest() -> Iterator[Checked]:
    """One row per check: `check`, `measured`, `limit` (both relative differences unless the name says more), `ok`."""
    from qmedtune.modeling.quiet import quiet_libraries
    from qmedtune.planning.machine import this_machine

    quiet_libraries()
    dtype = this_machine().compute_dtype
    with tempfile.TemporaryDirectory() as folder:
        bench = CheckModel(Path(folder), dtype)
        for name, check, allowed in CHECKS:
            measured, limit = check(bench), LIMITS[dtype] if allowed is None else allowed
            yield {"check": name, "measured": measured, "limit": limit, "ok": measured <= limit, "dtype": dtype}


def raise_if_failed(rows: list[Checked]) -> None:
    """RunError that names what is not equal."""
    wrong = [row["check"] for row in rows if not row["ok"]]
    if wrong:
        raise RunError(
            f"not equal on this machine: {'; '.join(wrong)}\n"
            "do not train here before this is understood; `model.kernels: reference` avoids qmedtune's own kernels\n"
            "`qmedtune doctor` shows versions that differ from the tested ones"
        )


def _write_base(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def _difference(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


def _decode(bench: CheckModel) -> float:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from qmedtune_kernels import nf4

    from qmedtune.modeling.fused import nf4_weight

    # Widths that are multiples of 64: on others bitsandbytes 0.50.2's CPU kernel takes wrong scales itself.
    linear: Any = Linear4bit(384, 128, bias=False, quant_type="nf4", compress_statistics=True).to(models.device())
    ours = nf4.dequantize(nf4_weight(linear), torch.float32)
    theirs = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return float((ours != theirs.to(ours)).sum())


def _kernels(bench: CheckModel) -> float:
    return _difference(bench.gradient(bench.model("auto")), bench.gradient(bench.model("reference")))


@torch.no_grad()
def _packed(bench: CheckModel) -> float:
    model = bench.model()
    packed = bench.nll(model, bench.ids, documents=4)
    alone = sum(bench.nll(model, part) for part in bench.ids.split(16, dim=1))
    return _difference(packed, torch.as_tensor(alone))


def _accumulated(bench: CheckModel) -> float:
    model = bench.model()
    return _difference(bench.gradient(model, rows=2), bench.gradient(model))


def _checkpointed(bench: CheckModel) -> float:
    model = bench.model()
    plain = bench.gradient(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return _difference(bench.gradient(model), plain)


def _merged(bench: CheckModel) -> float:
    from qmedtune.merge import MergeJob, merge

    models.save_adapter(bench.model(), bench.folder / "adapter", "selftest")
    out = bench.folder / "merged"
    out.mkdir()
    job = MergeJob(ModelStack(bench.folder / "base", (bench.folder / "adapter",)), MergeSection(), bench.section)
    return float(merge(job, out).violations or 0)


CHECKS: list[tuple[str, Check, float | None]] = [  # name, check, what it may differ by (None: LIMITS)
    ("NF4 decode = bitsandbytes (elements that differ)", _decode, 0.0),
    ("kernels = reference, gradient", _kernels, None),
    ("packed = one by one, loss", _packed, None),
    ("4 rows = 2 + 2 rows, gradient", _accumulated, None),
    ("checkpointing on = off, gradient", _checkpointed, None),
    ("merged = base + adapter (elements that differ)", _merged, 0.0),
]
