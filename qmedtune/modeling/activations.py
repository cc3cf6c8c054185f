"""What becomes of a layer's activations until its backward pass: kept, partly remade, recomputed, offloaded.

fused.py's decoder layers ask here, layer by layer; planning/layers.py says which layer goes which way. "cheap"
(norm outputs and the SwiGLU product are remade) is done where those are used, in fused.py.
Deliberately not here: the choice, and models whose layers are not ours (they take transformers' checkpointing).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qmedtune.planning.memory import TILE_TOKENS, WAYS
from qmedtune.recipe import LayersSection


def install(model: nn.Module, stated: bool | LayersSection) -> dict[str, int]:
    """Treat the layers of fused.py as a resolved `gradient_checkpointing` says; returns the counts for the report."""
    layers = sum(hasattr(module, "way") for module in model.modules())
    if isinstance(stated, LayersSection):
        counts = {way: getattr(stated, way) for way in WAYS}
    else:
        counts = {"recompute" if stated else "keep": layers}
    set_ways(model, counts)
    return {way: count for way, count in counts.items() if count}


def set_ways(model: nn.Module, counts: dict[str, int]) -> None:
    """Tell the model's layers their way: `counts` of WAYS, which sum to the number of layers.

    Offloaded layers come first (their copies have the rest of the pass to finish, and to come back), kept ones last.
    """
    layers = [module for module in model.modules() if hasattr(module, "way")]
    ways = [way for way in reversed(WAYS) for _ in range(counts.get(way, 0))]
    assert len(ways) == len(layers), f"{counts} for {len(layers)} layers"
    for layer, way in zip(layers, ways, strict=True):
        setattr(layer, "way", way)  # noqa: B010


def recomputed(compute: Callable[..., Tensor], x: Tensor, kwargs: dict[str, Any], *, offload: bool) -> Tensor:
    """compute(x, **kwargs), of which only x is kept (in host memory if `offload`) until the backward pass."""
    hooks: AbstractContextManager = (
        torch.autograd.graph.saved_tensors_hooks(_pack, _unpack) if offload else nullcontext()
    )
    with hooks:
        return checkpoint(compute, x, use_reentrant=False, **kwargs)


def tiled(compute: Callable[[Tensor], Tensor], x: Tensor, tokens: int = TILE_TOKENS) -> Tensor:
    """compute(x) for one that treats each token of x [..., C] by itself, `tokens` at a time: of each piece only the
    input is kept, so that a layer over long rows never holds the wide results of all of them (LLaMA-3.1-8B: 200 KB a
    token in its backward pass, two thirds of the layer)."""
    flat = x.flatten(0, -2)
    if len(flat) <= tokens:
        return compute(x)
    pieces = [checkpoint(compute, piece, use_reentrant=False) for piece in flat.split(tokens)]
    return torch.cat([piece for piece in pieces if isinstance(piece, Tensor)]).view(*x.shape[:-1], -1)


class _Offloaded:
    """One tensor in (pinned) host memory, and the way back. Knows which was offloaded before it: that one is needed
    next in the backward pass, so its copy is started when this one is taken.

    No `record_stream`: the allocator would give memory back only when it finds the copy done, by which time the layers
    ahead have taken new memory (about ten layers' inputs, 640 MB each at 78k tokens). Instead at most OUTGOING inputs
    wait for their copy, and what comes back is allocated, used and freed on the computing stream: two at a time.
    """

    def __init__(self, x: Tensor, before: _Offloaded | None):
        self.device, self.shape, self.back, self.event = x.device, x.shape, None, None
        self.before = weakref.ref(before) if before is not None else None
        x = x.contiguous()
        pieces = x.view(-1).split(PIECE)
        self.host = [torch.empty(piece.shape, dtype=x.dtype, pin_memory=x.is_cuda) for piece in pieces]
        streams = _streams(x.device)
        if streams is None:
            for host, piece in zip(self.host, pieces, strict=True):
                host.copy_(piece)
            return
        computing, copying = streams
        copying.wait_stream(computing)
        with _on(copying):
            for host, piece in zip(self.host, pieces, strict=True):
                host.copy_(piece, non_blocking=True)
        _hold(x, copying.record_event(), computing)

    def fetch(self) -> None:
        """Start the copy back, once."""
        if self.back is not None:
            return
        streams = _streams(self.device)
        _release(streams)
        self.back = torch.empty(self.shape, dtype=self.host[0].dtype, device=self.device)
        pieces = self.back.view(-1).split(PIECE)
        if streams is None:
            for host, piece in zip(self.host, pieces, strict=True):
                piece.copy_(host)
            return
        computing, copying = streams
        copying.wait_stream(computing)  # what used this memory before has been computed
        with _on(copying):
            for host, piece in zip(self.host, pieces, strict=True):
                piece.copy_(host, non_blocking=True)
        self.event = copying.record_event()

    def take(self) -> Tensor:
        self.fetch()
        self._wait()
        if self.before is not None and (before := self.before()) is not None:
            before.fetch()
        taken, self.back = self.back, None
        assert taken is not None
        return taken

    def _wait(self) -> None:
        if self.event is not None and (streams := _streams(self.device)) is not None:
            streams[0].wait_event(self.event)
        self.event = None

    def __del__(self) -> None:
        self._wait()  # fetched and never taken: its memory is not computed with before the copy is done


# Elements of one pinned buffer. torch rounds each up to a power of two: a row of 78k tokens in one piece (640 MB in
# LLaMA-3.1-8B) would take 1 GiB of the host's memory.
PIECE = 2**25
OUTGOING = 2  # inputs that may wait for their copy to the host: one is copied while the next layer computes
_COPYING: dict[torch.device, torch.cuda.Stream] = {}
_LEAVING: list[tuple[Tensor, Any]] = []
_LAST: list[weakref.ref[_Offloaded]] = []  # the tensor that was offloaded last, while its graph is alive


def _streams(device: torch.device) -> tuple[Any, Any] | None:
    """(the stream that computes, the one that copies); None on a CPU."""
    if device.type != "cuda":
        return None
    if device not in _COPYING:
        _COPYING[device] = torch.cuda.Stream(device)
    return torch.cuda.current_stream(device), _COPYING[device]


def _on(stream: Any) -> AbstractContextManager:
    return torch.cuda.stream(stream)


def _hold(x: Tensor, copied: Any, computing: Any) -> None:
    """Keep x until `computing` has waited for its copy: its memory is not written before. Waits for the oldest only
    where OUTGOING are on their way."""
    _LEAVING.append((x, copied))
    while len(_LEAVING) > OUTGOING:
        _, event = _LEAVING.pop(0)
        computing.wait_event(event)


def _release(streams: tuple[Any, Any] | None) -> None:
    """The forward pass is over: nothing leaves any more."""
    while streams is not None and _LEAVING:
        _, event = _LEAVING.pop(0)
        streams[0].wait_event(event)


def _pack(x: Tensor) -> _Offloaded | Tensor:
    """An empty one stays: before torch 2.12 a checkpoint saves one beside its input, and that would be copied back
    ahead of time in place of the next input."""
    if not x.numel():
        return x
    held = _Offloaded(x.detach(), _LAST[0]() if _LAST else None)
    _LAST[:] = [weakref.ref(held)]
    return held


def _unpack(held: _Offloaded | Tensor) -> Tensor:
    return held if isinstance(held, Tensor) else held.take()
