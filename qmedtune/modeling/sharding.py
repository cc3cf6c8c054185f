"""A frozen base that several processes hold together: FSDP2 (torch's `fully_shard`) over its layers.

Each process keeps a part of every linear weight; a layer's are gathered for its forward pass, freed, and gathered again
for its backward pass. NF4 bytes are stored under the compute dtype, as FSDP-QLoRA does, and never cast. Adapters, norms
and the scales of NF4 stay whole, so checkpoints, adapters and the merge are those of one process.
Deliberately not here: gradients (group.py sums them), stages that train the base itself, scoring.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qmedtune.modeling.forward import causal_model


def shard(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Leave this process its part of the model's frozen weights, on `device`; the other processes do the same. NF4
    weights are stored under `dtype`.

    Embeddings and head are sharded too, but where they are trained or one matrix is both. Call it with the process
    group open, after the adapters are attached and the kernels installed; fused.recheck looks at them again.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    lm = causal_model(model)
    decoder, embedding, head = lm.get_decoder(), lm.get_input_embeddings(), lm.get_output_embeddings()
    for layer in decoder.layers:
        _shard_layer(layer, mesh, dtype)
    if _apart(embedding, head):
        fully_shard(embedding, mesh=mesh, reshard_after_forward=True)
        weight = distribute_tensor(head.weight.detach().to(device), mesh, [Shard(0)])
        head.weight = nn.Parameter(weight, requires_grad=False)
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=set(decoder.parameters()))
    _move_whole(model, device)


def is_sharded(weight: Tensor) -> bool:
    return isinstance(weight, DTensor)


def whole(weight: Tensor) -> Tensor:
    """A weight that may be sharded, gathered for as long as somebody holds it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _shard_layer(layer: Any, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """The frozen weights of its linears; what is small (norms, biases, adapters) stays whole."""
    from bitsandbytes.nn import Linear4bit

    split: set[Tensor] = set()
    for linear in _linears(layer):
        if linear.weight.requires_grad:
            continue
        if isinstance(linear, Linear4bit):
            _store_in(linear, dtype)
        split.add(linear.weight)
    kept = {parameter for parameter in layer.parameters() if parameter not in split}
    fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)


def _linears(layer: nn.Module) -> list[nn.Linear]:
    """Those of the base, in the order of the layer's modules."""
    adapters: set[nn.Module] = set()
    found: list[nn.Linear] = []
    for module in layer.modules():
        if isinstance(module, LoraLayer):
            adapters.update(module.lora_A.values())
            adapters.update(module.lora_B.values())
        elif isinstance(module, nn.Linear):
            found.append(module)
    return [linear for linear in found if linear not in adapters]


def _store_in(linear: Any, dtype: torch.dtype) -> None:
    """The bytes of an NF4 weight under another dtype; bitsandbytes' description goes to the module, because FSDP puts
    plain parameters in the place of Params4bit."""
    weight = linear.weight
    if weight.quant_state is not None:
        linear.quant_state = weight.quant_state
    stored = weight.data.as_subclass(Tensor).reshape(-1).view(torch.uint8)
    if stored.numel() % dtype.itemsize == 0:
        stored = stored.view(dtype)
        linear.quant_storage = dtype
    linear.weight = nn.Parameter(stored[:, None], requires_grad=False)


def _apart(embedding: Any, head: Any) -> bool:
    """Whether both are frozen matrices of their own."""
    for module in (embedding, head):
        if type(module) not in (nn.Embedding, nn.Linear) or module.weight.requires_grad:
            return False
    return embedding.weight is not head.weight


def _move_whole(model: nn.Module, device: torch.device) -> None:
    """What is not sharded was loaded where there is room for all of the base."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        if (state := getattr(module, "quant_state", None)) is not None:
            state.to(device)
