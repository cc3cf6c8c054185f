"""The proof of an export: the file, read back, against the folder it was made from.

Logits: both run on the same tokens, weights streamed from the disk. f32 and f16 files must give the folder's logits; of
quantised ones it is reported what the quantisation changed. A large file whose every number is the folder's gives them
by that alone, and is not run. Token ids: the tokenizer that the file describes against
the folder's, over texts of numbers, units, Unicode, special tokens and blanks. Positions and shape: header against
config.json. Deliberately not here: llama.cpp itself; the tests hold all of this against a real one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qmedtune import ui
from qmedtune.data.packing.tokens import load_codec
from qmedtune.errors import RunError
from qmedtune.exporting.gguf_model import ROPE_FREQS, rope_of
from qmedtune.exporting.read_back import FileTensor, GgufFile, read_tokenizer
from qmedtune.exporting.tensor_names import Heads
from qmedtune.merging.disk_llama import DiskLlama
from qmedtune.merging.parallel import workers
from qmedtune.merging.proof import LARGE, PROBE_TOKENS, divergence
from qmedtune.merging.reference import read_base
from qmedtune.merging.streamed import Streamed, from_parameters, logits_of_all, streamed_model
from qmedtune.merging.tensors import row_blocks
from qmedtune.model_stack import EMBEDDING, HEAD

if TYPE_CHECKING:
    from transformers import LlamaConfig

TEXTS = (
    "BP 120/80 mmHg, HR 72, 3.5 mg/dL, 37.5 °C, 10⁹/L, 5–10 µg, ½ tablet, 1,000 IU, 2019-07-04, 12345678901",
    "HISTORY:\n  1. fever\n\n\n2.  cough\t\t(dry)\r\n\n   end   ",
    "naïve Ünïcödé, Straße, œdème, ﬁbrosis, ΔΨ ≥ 5 ± 2 %, пациент, 患者は発熱, مريض, 😀👍🏽, e\u0301\u200b\u00a0x",
    "It's the patient's; they'll say: \"don't\" ... ----- ====== ''' ```",
    " leading and trailing ",
    "x",
)
# KL in nats per token from the folder, on CPU fp32: f32 files differ by the order of sums alone (1e-12), f16 rounds
# 11 bits (SmolLM2-135M: 3.5e-6).
LIMITS = {"f32": 1e-9, "f16": 1e-5}
FLOAT_QUANTS = ("f32", "f16", "bf16")
GREEDY_TOKENS = 16
PROBE_TOKENS_LARGE = 16  # each costs a hundredth of an export; 16 columns suit MKL (merging/proof.py)
HELD = 200_000_000  # parameters of a model whose unpacked weights are held in memory, to be read once: 0.8 GB


@dataclass(frozen=True)
class LogitProof:
    """Divergence of the file from the folder: KL in nats per token (mean, largest), share of positions with the same
    most likely token, largest difference of two logits. greedy: of how many tokens in a row both would write the same,
    of GREEDY_TOKENS; None where that was not run (float files, large models). texts: whose ids are equal; None where
    the way in which the file splits text is not known here. probe_tokens: that the logits are of; tensors: of a large
    model, where every number is the folder's, in place of running it."""

    kl: float
    kl_max: float
    top1: float
    max_abs_logit_diff: float
    greedy: int | None
    texts: int | None
    probe_tokens: int
    tensors: int | None = None


def prove(path: Path, model: DiskLlama, quant: str, doubtful: Sequence[str] = ()) -> LogitProof:
    """Raises RunError where the file is not what the folder is. doubtful: further texts to compare token ids on."""
    file = GgufFile.open(path)
    _check_header(file, model.model.config)
    texts = check_tokens(file, model.folder, doubtful)
    ids = probe_ids(model)
    quantised = quant not in FLOAT_QUANTS
    with workers() as pool:
        parameters = read_base(model.folder, model.weights).parameters
        if quant in FLOAT_QUANTS and model.model.num_parameters() >= LARGE:
            same = _same_tensors(file, model, parameters, pool)
            if same is not None:
                return LogitProof(0.0, 0.0, 1.0, 0.0, greedy=None, texts=texts, probe_tokens=0, tensors=same)
        reference = Streamed(from_parameters(parameters), apply=pool.map)
        small = model.model.num_parameters() <= HELD
        load = from_parameters(_held(file, model)) if quantised and small else file.load
        ours = Streamed(load, apply=pool.map)  # pyright: ignore[reportArgumentType]
        models = [streamed_model(model.model, source) for source in (reference, ours)]
        with ui.progress_bar("proving the file", total=None, unit="layers"):
            [theirs], [found] = logits_of_all(models, ids, [reference, ours])
        greedy = None
        if quantised and small:
            greedy = _agreement(models, ids)
    figures = divergence(theirs, found)
    limit = LIMITS.get(quant)
    if limit is not None and not figures.kl <= limit:
        raise RunError(
            f"{path.name}: {figures.kl:.2e} nats per token from {model.folder}; {quant} gives at most {limit:.0e}\n"
            "nothing was published; --quant bf16 or f32 keeps more of these weights"
        )
    return LogitProof(**asdict(figures), greedy=greedy, texts=texts, probe_tokens=ids.numel())


def _same_tensors(
    file: GgufFile, model: DiskLlama, parameters: Mapping[str, Tensor], pool: ThreadPoolExecutor
) -> int | None:
    """How many tensors there are, if every number of them is the folder's; None at the first that is not."""
    names = [name for name in model.shapes if name != HEAD or not model.tied]
    for name in names:
        ours, theirs = file.load(name), parameters[name]

        def equal(rows: slice, ours: FileTensor = ours, theirs: Tensor = theirs) -> bool:
            return _same_numbers(ours[rows], theirs[rows])

        first, *rest = row_blocks(tuple(theirs.shape))
        if not equal(first) or not all(pool.map(equal, rest)):  # of rounded numbers the first block shows it
            return None
    return len(names)


def _same_numbers(ours: Tensor, theirs: Tensor) -> bool:
    if ours.dtype != theirs.dtype:
        return torch.equal(ours.float(), theirs.float())
    bits = np.int16 if ours.itemsize == 2 else np.int32
    one, two = ours.contiguous().view(torch.uint8).numpy(), theirs.contiguous().view(torch.uint8).numpy()
    return np.array_equal(one.view(bits), two.view(bits))  # a tenth of torch's time (merging/elements.py)


def probe_ids(model: DiskLlama) -> Tensor:
    """Token ids [1, length] of the texts, as many as a model of this size affords."""
    codec = load_codec(model.folder)
    limit = PROBE_TOKENS if model.model.num_parameters() < LARGE else PROBE_TOKENS_LARGE
    ids = [] if codec.bos_id is None else [codec.bos_id]
    for text in TEXTS:
        ids += codec.backend.encode(text, add_special_tokens=False).ids
    return torch.tensor([ids[: min(limit, model.model.config.max_position_embeddings)]])


def _held(file: GgufFile, model: DiskLlama) -> dict[str, Tensor]:
    held = {name: file.load(name).float() for name in model.shapes if name != HEAD or not model.tied}
    held.setdefault(HEAD, held[EMBEDDING])
    return held


def _agreement(models: list[Any], ids: Tensor) -> int:
    """How many tokens both models write alike behind the probe's first half, each choosing the most likely one."""
    written = [_greedy(model, ids[:, : ids.shape[1] // 2]) for model in models]
    for number, (one, other) in enumerate(zip(*written, strict=True)):
        if one != other:
            return number
    return GREEDY_TOKENS


def _greedy(model: Any, ids: Tensor) -> list[int]:
    written: list[int] = []
    known, step = None, ids
    with torch.no_grad():
        while len(written) < GREEDY_TOKENS:
            out = model(input_ids=step, past_key_values=known, use_cache=True)
            known, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            written.append(int(step))
    return written


# ---- header ----------------------------------------------------------------------------------------------------------


def _check_header(file: GgufFile, config: LlamaConfig) -> None:
    """The forward passes take shape and positions from config.json; the file must say the same."""
    heads = Heads.of(config)
    expected = {
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads.count,
        "attention.head_count_kv": heads.kv,
        "context_length": config.max_position_embeddings,
        "rope.dimension_count": heads.size,
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "rope.freq_base": np.float32(rope_of(config).get("rope_theta", 10000.0)),
    }
    for key, value in expected.items():
        if (found := file.header.metadata.get(f"llama.{key}")) != value:
            raise RunError(f"{file.path.name}: llama.{key} is {found}, config.json says {value}\nnothing was published")
    _check_rotation(file, config)


def _check_rotation(file: GgufFile, config: LlamaConfig) -> None:
    """Factors of the file against the frequencies that transformers computes from config.json."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotation: Any = LlamaRotaryEmbedding(config)
    exponents = torch.arange(0, 2 * len(rotation.inv_freq), 2) / (2 * len(rotation.inv_freq))
    factors = rope_of(config).get("rope_theta", 10000.0) ** -exponents / rotation.inv_freq
    told = torch.ones_like(factors)
    if tensor := file.header.tensors.get(ROPE_FREQS):
        told = torch.from_numpy(np.array(file.data[tensor.begin : tensor.end]).view(np.float32))
    if file.header.metadata.get("llama.rope.scaling.type") == "linear":
        told = told * file.header.metadata["llama.rope.scaling.factor"]
    if not torch.allclose(told, factors, rtol=1e-4):
        raise RunError(
            f"{file.path.name}: positions are stretched otherwise than by config.json\nnothing was published"
        )


# ---- tokens ----------------------------------------------------------------------------------------------------------


def probe_texts(special_tokens: list[str]) -> list[str]:
    """The texts, and those with a tokenizer's own special tokens in them, beside each other and beside words."""
    few = special_tokens[:16]
    return [*TEXTS, "".join(few), *[f"a {token} b{token}\n" for token in few]]


def check_tokens(file: GgufFile, folder: Path, more: Sequence[str] = ()) -> int | None:
    """How many texts become the same ids by the file as by the folder. RunError where one does not."""
    ours, codec = read_tokenizer(file), load_codec(folder)
    if ours is None:
        name = file.header.metadata["tokenizer.ggml.pre"]
        ui.warn(f"{file.path.name}: token ids are not proven: how {name!r} splits text is not known here")
        return None
    texts = [*probe_texts(sorted(codec.special_tokens)), *more]
    codec.backend.encode_special_tokens = False
    for text in texts:
        for marks in (True, False):
            if ours.encode(text, marks=marks) != codec.backend.encode(text, add_special_tokens=marks).ids:
                raise RunError(
                    f"{file.path.name}: {text[:40]!r} becomes other tokens than by {folder / 'tokenizer.json'}\n"
                    "nothing was published: GGUF cannot express this tokenizer; serve it with --as vllm"
                )
    return len(texts)
