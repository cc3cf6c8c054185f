"""Predicts the peak memory of a training step by parts, and host RAM and disk of a run. Arithmetic only, no torch.

The parts follow what model.py, fused.py, loss.py and trainer.py allocate; each constant names its source. GPU figures
are predictions that no GPU has confirmed yet; the saved activations were counted on the CPU (tests/test_memory.py).
Deliberately not here: choosing settings (resolve.py), and the choice per layer (layers.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

from qmedtune.llama_shape import BYTES_OF, LINEARS, BaseFacts

MIB, GIB = 1024**2, 1024**3

# bitsandbytes NF4: 4 bits, and per block of 64 a scale: fp32, or 8 bits + an fp32 per 256 blocks when quantised twice.
NF4_BYTES = 0.5 + 4 / 64
NF4_DOUBLE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes of optimiser state per trained parameter. 8-bit AdamW: two codes + two fp32 scales per 256 (bitsandbytes 0.50).
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 0.0}
# loss.py on CUDA: tiles of 4096 tokens (TRL's TOKEN_CHUNK_SIZE) x 8192 vocabulary columns; on the CPU 2**24 logits.
LOSS_TILE = (4096, 8192)
CPU_LOGITS = 2**24
# Under a frozen head, cross_entropy.py of qmedtune_kernels: logits of one piece, GPU_LOGITS and CPU_LOGITS there.
FROZEN_HEAD_LOGITS = {True: 2**26, False: 2**22 + 2**21}
# CUDA context, cuBLAS workspaces (32 MiB on Hopper) and loaded kernels: 0.4 to 0.7 GiB on cards of sm_75 to sm_90,
# as people report it; not measured by us.
CUDA_CONTEXT_BYTES = int(0.6 * GIB)
# What allocators hold beyond what is asked of them, as a share of all that comes and goes: torch's caching allocator
# 5 % (assumed), glibc 28 % (measured on the CPU: 447 MiB resident for 348 MiB of saved activations).
FRAGMENTATION = {"cuda": 0.05, "cpu": 0.3}
# Resident memory of Python with torch, transformers, peft, trl, bitsandbytes and datasets imported, before any model:
# 593 MiB measured with the CPU build of torch 2.13; with the CUDA libraries and pinned buffers 1.8 GiB (assumed).
HOST_BASE_BYTES = {"cpu": 600 * MIB, "cuda": int(1.8 * GIB)}
# What a run holds besides: readers, tokenizers, the trainer, what earlier steps left. A whole run of recipes/micro.yaml
# peaked at 972 MiB, of which its model, adapters and activations are under 70 MiB.
RUN_BYTES = 300 * MIB


# Of gradients summed at once, as in group.py, and what NCCL holds for its channels: assumed.
BUCKET_BYTES = 64 * MIB
NCCL_BYTES = 256 * MIB
# Offloaded layers pass this many tokens at a time through their MLP (modeling/activations.py).
TILE_TOKENS = 4096
WAYS = ("keep", "cheap", "recompute", "offload")


@dataclass(frozen=True)
class Setup:
    """Training configuration as the memory model sees it.

    What memory depends on. Lengths in tokens, `micro_batch` in rows. `full`: all parameters are trained, from fp32
    weights, with products in `compute_dtype` (numerics.py)."""

    seq_len: int
    micro_batch: int
    checkpointing: bool
    optimizer: str
    compute_dtype: str
    quantized: bool = True
    double_quantization: bool = True
    rank: int = 16
    targets: tuple[str, ...] = LINEARS
    train_embeddings: bool = False
    frozen_adapters: int = 0
    full: bool = False
    attention: str = "sdpa"
    dropout: bool = False
    ways: tuple[int, int, int, int] | None = None  # layers by WAYS; None: all recompute (`checkpointing`) or keep
    cards: int = 1  # that share the rows, and exchange gradients
    cards_here: int = 1  # of these, on one machine
    sharded: bool = False  # they hold the frozen base together

    @property
    def tokens(self) -> int:
        return self.seq_len * self.micro_batch

    @property
    def element_bytes(self) -> int:
        return BYTES_OF[self.compute_dtype]

    @property
    def stream_bytes(self) -> int:
        """Of an element of the residual stream: autocast leaves it in fp32."""
        return 4 if self.full else self.element_bytes


def adapter_parameters(facts: BaseFacts, rank: int, targets: tuple[str, ...] = LINEARS) -> int:
    """LoRA parameters: r x (inputs + outputs) per target and layer."""
    widths = 0
    for target in targets:
        if target in facts.linear_shapes:
            widths += sum(facts.linear_shapes[target])
    return facts.layers * rank * widths


def trained_parameters(facts: BaseFacts, setup: Setup) -> int:
    """Adapters, plus whole copies of embed_tokens and lm_head (PEFT copies both, tied or not) when these train."""
    if setup.full:
        return facts.parameters
    trained = adapter_parameters(facts, setup.rank, setup.targets)
    if setup.train_embeddings:
        trained += 2 * facts.vocab * facts.hidden
    return trained


def weight_bytes(facts: BaseFacts, setup: Setup, *, gpu: bool) -> dict[str, int]:
    """On the CPU the linears hold the dequantised NF4 values (model.py). LoRA on an unquantised base keeps it in the
    compute dtype. A full stage has fp32 weights, and autocast's 16-bit copy of each linear until its gradient is
    there."""
    rest = facts.parameters - facts.linear_parameters
    if setup.full:
        copies = 0
        if setup.element_bytes < 4:
            copies = facts.linear_parameters * setup.element_bytes
        return {"weights (fp32)": 4 * facts.parameters, "weights (16-bit copies)": copies}
    if setup.sharded:
        return _sharded_weights(facts, setup, gpu=gpu)
    if not (gpu and setup.quantized):
        return {f"weights ({setup.compute_dtype})": facts.parameters * setup.element_bytes}
    per_weight = NF4_DOUBLE_BYTES if setup.double_quantization else NF4_BYTES
    return {
        "weights (NF4)": int(facts.linear_parameters * per_weight),
        "embeddings and norms": rest * setup.element_bytes,
    }


def linear_bytes(facts: BaseFacts, setup: Setup, *, gpu: bool) -> float:
    """Of all linear weights, without the scales of NF4: what FSDP shards and gathers."""
    per_weight = 0.5 if gpu and setup.quantized else setup.element_bytes
    return per_weight * facts.linear_parameters


def gathered_bytes(facts: BaseFacts, setup: Setup, *, gpu: bool) -> float:
    """Of all that FSDP gathers for a pass over the model: linears, and embedding and head where they are sharded."""
    return linear_bytes(facts, setup, gpu=gpu) + 2 * _vocabulary_bytes(facts, setup)


def _vocabulary_bytes(facts: BaseFacts, setup: Setup) -> int:
    """Of an embedding, or a head, that is sharded: neither is where they are trained or one matrix is both."""
    if facts.tied or setup.train_embeddings:
        return 0
    return facts.vocab * facts.hidden * setup.element_bytes


def _sharded_weights(facts: BaseFacts, setup: Setup, *, gpu: bool) -> dict[str, int]:
    """This card's part of the base (modeling/sharding.py). The scales of NF4 stay whole; so do embedding and head where
    they are trained or one matrix is both. Gathered at a time: two layers (one computes, the next is on its way), each
    once as it arrives and once in its place, or embedding or head."""
    linears = linear_bytes(facts, setup, gpu=gpu)
    rest = (facts.parameters - facts.linear_parameters) * setup.element_bytes
    vocabulary = _vocabulary_bytes(facts, setup)
    scales = 0.0
    if gpu and setup.quantized:
        per_weight = NF4_DOUBLE_BYTES if setup.double_quantization else NF4_BYTES
        scales = (per_weight - 0.5) * facts.linear_parameters
    gathered = max(4 * linears / facts.layers, 2 * vocabulary)
    return {
        f"weights (1 of {setup.cards} parts)": int(linears / setup.cards),
        "scales of NF4": int(scales),
        "embeddings and norms": int(rest / setup.cards if vocabulary else rest),
        "gathered layers": int(gathered),
    }


def exchange_workspace(facts: BaseFacts, setup: Setup, *, gpu: bool) -> int:
    """What sums between several processes take beside the gradients: a bucket of them (group.py) and NCCL's buffers."""
    if setup.cards == 1:
        return 0
    bucket = min(BUCKET_BYTES, 4 * trained_parameters(facts, setup))
    return bucket + (NCCL_BYTES if gpu else 0)


@cache
def varlen_repeats() -> bool:
    """Whether variable lengths are left to a kernel that takes as many heads of keys as of queries: torch's own before
    2.12 (modeling/attention.py). Found without importing torch."""
    major, minor = version("torch").split(".")[:2]
    return (int(major), int(minor)) < (2, 12) and find_spec("flash_attn") is None


def attention_elements(facts: BaseFacts, attention: str) -> int:
    """Elements per token that attention keeps for its backward pass: q, k, v and the output, which o_proj reads.

    transformers' sdpa with a mask (isolated documents need one) first repeats k and v to all heads, and so does varlen
    on an older torch.
    """
    query, key = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    repeated = attention in ("sdpa", "eager") or (attention == "varlen" and varlen_repeats())
    return 2 * query + 2 * (query if repeated else key)


def score_elements(facts: BaseFacts, setup: Setup) -> int:
    """Elements per token that attention keeps for scores: eager all of them (under autocast in fp32 as well), sdpa its
    mask as a bias, both per layer (torch converts the boolean mask at every call); kernels for variable lengths 0."""
    if setup.attention == "eager" and setup.full and setup.element_bytes == 2:
        return 3 * facts.heads * setup.seq_len
    return {"eager": facts.heads * setup.seq_len, "sdpa": setup.seq_len}.get(setup.attention, 0)


def adapter_copy_bytes(facts: BaseFacts, setup: Setup) -> int:
    """One layer's adapters as qmedtune_kernels keeps them for the backward pass: stacked, in the compute dtype, the
    B matrices of q/k/v and gate/up block-diagonal."""
    if setup.full:
        return 0
    copies = 0
    for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
        inputs = facts.linear_shapes[group[0]][0]
        outputs = sum(facts.linear_shapes[name][1] for name in group)
        adapted = sum(name in setup.targets for name in group)
        copies += adapted * setup.rank * (inputs + outputs)
    return copies * setup.element_bytes


def full_kept_bytes_per_token(facts: BaseFacts, setup: Setup) -> int:
    """The same of transformers' own layer, which full stages train. In fp32: each norm's input and its scaled input
    4 h, two rstd, one log-sum-exp per head. In elements: what the linears read (under autocast q, k, v, gate and up
    cast an input each, else one copy per norm) and attention; gate, its SiLU, up and product 4 I."""
    read = 5 if setup.element_bytes < 4 else 2
    wide = read * facts.hidden + attention_elements(facts, setup.attention)
    wide += 4 * facts.intermediate + score_elements(facts, setup)
    return wide * setup.element_bytes + 4 * (4 * facts.hidden + 2 + facts.heads)


def kept_bytes_per_token(facts: BaseFacts, setup: Setup) -> int:
    """What one layer saves per token when nothing is recomputed (fused.py and qmedtune_kernels).

    In elements: layer input, norm outputs and residual 4 h; attention; gate, up and product 3 I; X A^T of each LoRA
    r. In fp32: two rstd and one log-sum-exp per head. With dropout each adapter reads an input of its own (4 h more),
    and a byte per element says what was dropped.
    """
    if setup.full:
        return full_kept_bytes_per_token(facts, setup)
    wide = 4 * facts.hidden + attention_elements(facts, setup.attention) + 3 * facts.intermediate
    wide += len(setup.targets) * setup.rank + score_elements(facts, setup)
    dropped = 0
    if setup.dropout:
        wide += 4 * facts.hidden
        dropped = 6 * facts.hidden + facts.intermediate
    return wide * setup.element_bytes + 4 * (2 + facts.heads) + dropped


def held_bytes_per_token(facts: BaseFacts, setup: Setup) -> dict[str, int]:
    """What a layer of each way holds on the device between its passes: everything; without norm outputs and product
    (which dropout keeps in another form); its input; nothing."""
    kept, stream = kept_bytes_per_token(facts, setup), facts.hidden * setup.stream_bytes
    cheap = kept
    if not (setup.dropout or setup.full):
        cheap -= (2 * facts.hidden + facts.intermediate) * setup.element_bytes
    return {"keep": kept, "cheap": cheap, "recompute": stream, "offload": 0}


def layers_by_way(facts: BaseFacts, setup: Setup) -> dict[str, int]:
    """How many layers go which way."""
    if setup.ways is not None:
        return dict(zip(WAYS, setup.ways, strict=True))
    counts: dict[str, int] = dict.fromkeys(WAYS, 0)
    counts["recompute" if setup.checkpointing else "keep"] = facts.layers
    return counts


def backward_bytes_per_token(facts: BaseFacts, setup: Setup) -> int:
    """Gradients alive at the widest point of a layer's backward pass: of product, gate and up, and of their input;
    and the product made again where it was not kept."""
    return (4 * facts.intermediate + 2 * facts.hidden) * setup.element_bytes


def working_bytes(facts: BaseFacts, setup: Setup, counts: dict[str, int]) -> int:
    """The layer that is differentiated: its gradients, what it has to make again, two buffers for offloaded inputs."""
    held = held_bytes_per_token(facts, setup)
    if setup.tokens > TILE_TOKENS and counts["offload"] == facts.layers:
        return tiled_bytes(facts, setup)
    per_token = backward_bytes_per_token(facts, setup)
    if counts["recompute"] or counts["offload"]:
        per_token += held["keep"]
    elif counts["cheap"]:
        per_token += held["keep"] - held["cheap"]
    if counts["offload"]:
        per_token += 2 * held["recompute"]
    return setup.tokens * per_token


def tiled_bytes(facts: BaseFacts, setup: Setup) -> int:
    """The same of an offloaded layer over long rows, whose MLP is made and differentiated a tile at a time. In elements
    of each token: four inputs and residuals, four gradients of them, two buffers, and attention's own."""
    tokenwise = (10 * facts.hidden + attention_elements(facts, setup.attention)) * setup.element_bytes
    tile = kept_bytes_per_token(facts, setup) + backward_bytes_per_token(facts, setup)
    return setup.tokens * (tokenwise + 4 * (2 + facts.heads)) + TILE_TOKENS * tile


def activation_bytes(facts: BaseFacts, setup: Setup) -> dict[str, int]:
    """Saved activations, and the working set of the layer that is being differentiated."""
    held, counts = held_bytes_per_token(facts, setup), layers_by_way(facts, setup)
    per_token = 3 * held["recompute"]  # embedding output, last residual, last norm
    for way in WAYS:
        per_token += counts[way] * held[way]
    if setup.attention == "sdpa":
        per_token += setup.seq_len  # one boolean mask for all layers
    copies, whole = adapter_copy_bytes(facts, setup), counts["keep"] + counts["cheap"]
    workspace = working_bytes(facts, setup, counts)
    if whole < facts.layers:
        workspace += copies
    return {"activations": setup.tokens * per_token + whole * copies, "layer workspace": workspace}


def offloaded_bytes(facts: BaseFacts, setup: Setup) -> int:
    """Layer inputs of a micro-batch in pinned host memory."""
    return layers_by_way(facts, setup)["offload"] * setup.tokens * facts.hidden * setup.element_bytes


def loss_bytes(facts: BaseFacts, setup: Setup, *, gpu: bool) -> int:
    """loss.py: hidden states picked for the loss with their fp32 gradient, one tile of logits, a trained head's own
    16-bit copy and fp32 gradient."""
    if not (setup.train_embeddings or setup.full):
        return _frozen_loss_bytes(facts, setup, gpu=gpu)
    hidden = setup.tokens * facts.hidden * (setup.element_bytes + 4)
    if gpu:
        tile = min(setup.tokens, LOSS_TILE[0]) * min(facts.vocab, LOSS_TILE[1]) * setup.element_bytes
    else:
        # Logits in 16 and 32 bits, their log-softmax and the gradients of all three: six fp32 tiles, measured.
        tile = 6 * 4 * min(setup.tokens * facts.vocab, CPU_LOGITS)
    return hidden + tile + facts.vocab * facts.hidden * (setup.element_bytes + 4)


def _frozen_loss_bytes(facts: BaseFacts, setup: Setup, *, gpu: bool) -> int:
    """Picked hidden states, their gradient and the same scaled; a piece's logits in fp32 and their 16-bit gradient, on
    a CPU the product they come from and their log-softmax too."""
    logits = max(facts.vocab, min(setup.tokens * facts.vocab, FROZEN_HEAD_LOGITS[gpu]))
    held = 4 + setup.element_bytes if gpu else 8 + 2 * setup.element_bytes
    return 3 * setup.tokens * facts.hidden * setup.element_bytes + held * logits


def scratch_bytes(facts: BaseFacts, setup: Setup, *, gpu: bool) -> int:
    """The buffer that NF4 is decoded into: the largest stack of linears that read one input, in the compute dtype."""
    if not (gpu and setup.quantized) or setup.full:
        return 0
    i, o = facts.linear_shapes["gate_proj"]
    return 2 * i * o * setup.element_bytes


def step_memory(facts: BaseFacts, setup: Setup, *, gpu: bool) -> dict[str, int]:
    """Peak bytes of one training step by parts, in the order they are told; their sum is the peak.

    The parts are alive together at the first layer's backward pass of the last micro-batch, when gradients,
    optimiser states, all saved activations and one layer's workspace exist; the loss tile is counted although it is
    gone by then, because the allocator keeps its block.
    """
    trained = trained_parameters(facts, setup)
    adapters = 0
    if not setup.full:
        frozen = setup.frozen_adapters * adapter_parameters(facts, setup.rank, setup.targets)
        adapters = 4 * (trained + frozen)
    passing = {
        **activation_bytes(facts, setup),
        "loss": loss_bytes(facts, setup, gpu=gpu),
        "dequantised weights": scratch_bytes(facts, setup, gpu=gpu),
    }
    parts = {
        **weight_bytes(facts, setup, gpu=gpu),
        "adapters (fp32)": adapters,
        "gradients (fp32)": 4 * trained,
        "exchange of gradients": exchange_workspace(facts, setup, gpu=gpu),
        "optimiser": int(OPTIMIZER_BYTES[setup.optimizer] * trained),
        **passing,
    }
    if gpu:
        parts["allocator"] = int(FRAGMENTATION["cuda"] * sum(passing.values()))
        parts["CUDA context"] = CUDA_CONTEXT_BYTES
    else:
        parts["allocator"] = int(FRAGMENTATION["cpu"] * sum(passing.values()))
        parts["Python and libraries"] = HOST_BASE_BYTES["cpu"] + RUN_BYTES
    return _present(parts)


def _present(parts: dict[str, int]) -> dict[str, int]:
    """The parts that take anything."""
    return {name: size for name, size in parts.items() if size}


def peak_bytes(facts: BaseFacts, setup: Setup, *, gpu: bool) -> int:
    return sum(step_memory(facts, setup, gpu=gpu).values())


def host_memory(facts: BaseFacts, setup: Setup, *, gpu: bool, merge: bool) -> dict[str, int]:
    """Host RAM by phase, in bytes: loading (one shard at a time on a GPU), training, merging (one tensor at a time,
    in fp32 with its delta and its 16-bit result)."""
    shard = facts.largest_shard_bytes or min(facts.file_bytes, 5 * 10**9)  # shards of the Hub are at most 5 GB
    if gpu:
        base = HOST_BASE_BYTES["cuda"] + RUN_BYTES
        paged = OPTIMIZER_BYTES["adamw_8bit"] * trained_parameters(facts, setup)
        loading = base + shard
        if setup.sharded:  # each process loads all of the base here before it keeps its part
            whole = sum(weight_bytes(facts, replace(setup, sharded=False), gpu=True).values())
            loading += whole
        training = base + int(paged) + offloaded_bytes(facts, setup)
        loading, training = setup.cards_here * loading, setup.cards_here * training
    else:
        base = HOST_BASE_BYTES["cpu"] + RUN_BYTES
        loading = base + facts.parameters * setup.element_bytes + shard
        training = peak_bytes(facts, setup, gpu=False)
    phases = {"loading": loading, "training": training}
    if merge:
        largest = facts.hidden * facts.intermediate
        if setup.train_embeddings:
            largest = max(largest, facts.vocab * facts.hidden)
        phases["merging"] = base + (4 + 4 + 2) * largest
    return phases


@dataclass(frozen=True)
class DiskContents:
    """What of a run stays on disk besides its stages: `checkpoints` at a time, the merged model and `folded` bases in
    `dtype`, `text_bytes` of prepared text, `tokens` packed, the best weights where they are kept. swept: a mix at a
    time is written, scored and deleted."""

    checkpoints: int
    dtype: str
    text_bytes: int
    tokens: int
    folded: int = 0
    merged: bool = True
    best: bool = False
    swept: bool = False


def disk_bytes(facts: BaseFacts, setups: list[Setup], kept: DiskContents) -> dict[str, int]:
    """Disk of a run by parts, in bytes: prepared text, packed tokens (int32 + mask), checkpoints (weights, 8-bit or
    fp32 states; one more is being written), adapters (fp32) and models (16 bit) of stages, bases into which earlier
    adapters are folded, the merged model, and the base if it has to be fetched."""
    checkpoint = 0.0
    largest = adapters = models = 0
    trains_embeddings = False
    for setup in setups:
        trained = trained_parameters(facts, setup)
        states = 8.0 if setup.optimizer == "adamw" else OPTIMIZER_BYTES["adamw_8bit"]
        checkpoint = max(checkpoint, (4 + states) * trained)
        largest = max(largest, trained)
        if setup.full:
            models += 2 * facts.parameters
        else:
            adapters += 4 * trained
        trains_embeddings |= setup.train_embeddings
    written = facts.parameters
    if facts.tied and trains_embeddings:  # merged, the head has weights of its own
        written += facts.vocab * facts.hidden
    model = written * BYTES_OF[kept.dtype]
    parts: dict[str, int] = {}
    if not (facts.folder or facts.builtin):
        parts["base (download)"] = facts.file_bytes
    parts["prepared text"] = kept.text_bytes
    parts["packed tokens"] = 5 * kept.tokens
    parts["checkpoints"] = int((kept.checkpoints + 1) * checkpoint)
    if kept.best:
        parts["best weights"] = (kept.checkpoints + 1) * 4 * largest
    parts["adapters"] = adapters
    parts["stage models"] = models
    parts["folded bases"] = kept.folded * model
    if kept.swept:
        parts["mix of the sweep"] = model
    if kept.merged:
        parts["merged model"] = model
    return _present(parts)
