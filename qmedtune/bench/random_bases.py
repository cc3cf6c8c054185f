"""Random LLaMAs of well-known shapes for benchmarks, written straight to disk: nothing is downloaded or quantised.

In 16 bit, as a merge reads it, or in NF4 as bitsandbytes stores it (twice quantised scales), which every trainer under
test can load: 8 billion parameters take 6 GB and no time to quantise. Deliberately not here: what is done with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmedtune import store

if TYPE_CHECKING:
    import torch

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden": 256, "intermediate": 704, "layers": 3, "heads": 4, "kv_heads": 2, "vocab": 1536},
    "tiny-9-layers": {"hidden": 256, "intermediate": 704, "layers": 9, "heads": 4, "kv_heads": 2, "vocab": 1536},
    "builtin:smollm2": {
        "hidden": 576,
        "intermediate": 1536,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "vocab": 49152,
        "tied": 1,
    },
    "1b": {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "1.1b": {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocab": 32000},
    "8b": {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256},
    # A layer's cost by difference: the same widths with two and with eight layers.
    "8b-2-layers": {"hidden": 4096, "intermediate": 14336, "layers": 2, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "8b-8-layers": {"hidden": 4096, "intermediate": 14336, "layers": 8, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "13b": {"hidden": 5120, "intermediate": 13824, "layers": 40, "heads": 40, "kv_heads": 40, "vocab": 32000},
    "70b": {"hidden": 8192, "intermediate": 28672, "layers": 80, "heads": 64, "kv_heads": 8, "vocab": 128256},
}
# Trained on CPUs, where not every contender reads NF4: written in 16 bit.
SMALL = ("tiny", "tiny-9-layers", "builtin:smollm2")
SHARD_BYTES = 5_000_000_000
POSITIONS = 131_072  # as Llama 3.1: long rows must not be refused


def write_model(shape: Mapping[str, int], base: Path) -> int:
    """A bf16 model folder (std .02, as LLaMA's initialisation), never held in memory as a whole. Returns the bytes of
    the weights."""
    import torch

    from qmedtune.merging.tensors import row_blocks, write_safetensors
    from qmedtune.model_stack import INDEX, SINGLE

    base.mkdir()
    store.write_json(base / "config.json", config_of(shape))
    shapes = tensors_of(shape)
    noise = torch.randn(2**23 + 2**16, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def blocks(names: Mapping[str, tuple[int, ...]]) -> Iterator[torch.Tensor]:
        for number, size in enumerate(names.values()):
            for rows in row_blocks(size):
                part = (rows.stop - rows.start, *size[1:])
                start = (number * 7919 + rows.start) % 2**16  # the same pool of numbers, never the same tensor
                values = noise[start : start + torch.Size(part).numel()].view(part)
                if len(size) == 1:  # of a norm
                    values = torch.ones_like(values)
                yield values

    shards = _sharded(shapes)
    files: dict[str, str] = {}
    with ThreadPoolExecutor(1) as disk, ThreadPoolExecutor(1) as hasher:
        put = partial(write_safetensors, dtype=torch.bfloat16, disk=disk, hasher=hasher)
        for number, names in enumerate(shards, start=1):
            file = SINGLE
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            put(base / file, names, blocks=blocks(names))
            files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        store.write_json(base / INDEX, {"metadata": {}, "weight_map": files})
    return sum(path.stat().st_size for path in base.glob("*.safetensors"))


def config_of(shape: Mapping[str, int]) -> dict[str, Any]:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=bool(shape.get("tied")),
    )
    return config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}


def tensors_of(shape: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape["hidden"], shape["intermediate"]
    key = hidden // shape["heads"] * shape["kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab"], hidden)}
    linears = {"self_attn.q": (hidden, hidden), "self_attn.k": (key, hidden), "self_attn.v": (key, hidden)}
    linears |= {"self_attn.o": (hidden, hidden), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden)}
    linears |= {"mlp.down": (hidden, inner)}
    for layer in range(shape["layers"]):
        for name, size in linears.items():
            shapes[f"model.layers.{layer}.{name}_proj.weight"] = size
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not shape.get("tied"):
        shapes["lm_head.weight"] = (shape["vocab"], hidden)
    return shapes


def _sharded(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    held_bytes = 0
    for name, size in shapes.items():
        bytes_ = 2 * math.prod(size)
        if held_bytes + bytes_ > SHARD_BYTES:
            shards.append({})
            held_bytes = 0
        shards[-1][name] = size
        held_bytes += bytes_
    return shards


# ------------------------------------------------------------------------------------------------------------- in NF4


def write_nf4_model(shape: Mapping[str, int], folder: Path) -> int:
    """A model folder whose linears are random NF4 as bitsandbytes 0.50 saves it (block 64, nested scales, bf16), one
    file per layer. Random nibbles have a deviation of .58 of their scale: scales of .035 make the usual .02. Returns
    the bytes of the weights."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    config = config_of(shape) | {"quantization_config": NF4_CONFIG}
    store.write_json(folder / "config.json", config)
    generator = torch.Generator().manual_seed(0)
    pools = (
        torch.randint(0, 256, (POOL,), dtype=torch.uint8, generator=generator),
        torch.randn(POOL, generator=generator).mul_(0.02).bfloat16(),
    )
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in tensors_of(shape).items():
        layer = "ends"
        if ".layers." in name:
            layer = f"layer-{int(name.split('.')[2]):03d}"
        files.setdefault(f"model-{layer}.safetensors", {})[name] = size
    places = {}
    for file, names in files.items():
        tensors: dict[str, torch.Tensor] = {}
        for name, size in names.items():
            start = len(places) + len(tensors)
            if "_proj" in name:
                tensors |= _nf4_tensors(name, size, pools[0], start)
            else:
                tensors[name] = _plain(size, pools[1])
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    store.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


NF4_CONFIG = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip


# Numbers drawn once, laid end to end from another start in each tensor: to draw 35 GB of the 70B shape takes minutes.
POOL = 2**24 + 2**12 + 1


def _laid(pool: torch.Tensor, count: int, start: int) -> torch.Tensor:
    start = start * 7919 % POOL
    return pool.repeat(-(-(start + count) // POOL))[start : start + count].clone()


def _plain(size: tuple[int, ...], pool: torch.Tensor) -> torch.Tensor:
    import torch

    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return _laid(pool, size[0] * size[1], size[0]).view(size)


def _nf4_tensors(name: str, size: tuple[int, ...], pool: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """The six tensors of one linear, under bitsandbytes' names."""
    import bitsandbytes.functional as bnb
    import torch

    rows, columns = size
    blocks = rows * columns // 64
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns], "nested_blocksize": 256,
        "nested_dtype": "float32", "nested_offset": 0.035,
    }  # fmt: skip
    return {
        name: _laid(pool, rows * columns // 2, start)[:, None],
        f"{name}.absmax": _laid(pool, blocks, start + 1),
        f"{name}.quant_map": bnb.get_4bit_type("nf4", device="cpu"),
        f"{name}.nested_absmax": torch.full((-(-blocks // 256),), 0.005),
        f"{name}.nested_quant_map": bnb.create_dynamic_map(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
