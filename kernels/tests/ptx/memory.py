"""Global memory with exact bounds, and shared memory whose accesses are watched for hazards.

A hazard is a pair of accesses that a GPU may order either way: two threads at one address, one of them writing, without
a barrier (or, within a warp, `bar.warp.sync`) between; bytes read before `cp.async` or `wgmma` is known to be done;
bytes that `wgmma` reads through the async proxy without a fence after they were written.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass

import numpy as np
from torch import Tensor

NOBODY, SEVERAL = -1, -2


class Fault(Exception):
    """What stops a kernel on a GPU: an access out of bounds or misaligned, a barrier that not all threads reach."""


class Global:
    """The memory of CPU tensors at their own addresses; nothing else may be touched."""

    def __init__(self, tensors: list[Tensor]):
        spans = sorted({_span(tensor) for tensor in tensors if tensor.numel()})
        self.starts, self.memory = [], []
        for start, size in spans:
            if self.starts and start < self.starts[-1] + len(self.memory[-1]):  # views of one buffer
                first = self.starts.pop()
                start, size = first, max(start + size, first + len(self.memory.pop())) - first
            self.starts.append(start)
            self.memory.append(np.frombuffer((ctypes.c_uint8 * size).from_address(start), dtype=np.uint8))

    def views(self, addresses: np.ndarray, width: int, text: str):
        """(typed memory, element indices, positions in `addresses`) of each buffer that is touched."""
        if (addresses % np.uint64(width)).any():
            raise Fault(f"misaligned: {text} at {int(addresses[addresses % np.uint64(width) != 0][0]):#x}")
        owners = np.searchsorted(np.array(self.starts, dtype=np.uint64), addresses, side="right") - 1
        for owner in np.unique(owners):
            chosen = np.flatnonzero(owners == owner)
            if owner < 0:
                raise Fault(f"out of bounds: {text} at {int(addresses[chosen[0]]):#x}")
            memory, start = self.memory[owner], np.uint64(self.starts[owner])
            offsets = (addresses[chosen] - start).astype(np.int64)
            over = offsets + width > len(memory)
            if over.any():
                beyond = int(offsets[over][0]) + width - len(memory)
                raise Fault(f"out of bounds: {text} reaches {beyond} bytes beyond a buffer of {len(memory)}")
            yield memory, offsets, chosen

    def load(self, addresses: np.ndarray, width: int, text: str) -> np.ndarray:
        """[lanes, width] bytes."""
        out = np.empty((len(addresses), width), dtype=np.uint8)
        for memory, offsets, chosen in self.views(addresses, width, text):
            out[chosen] = memory[offsets[:, None] + np.arange(width)]
        return out

    def store(self, addresses: np.ndarray, data: np.ndarray, text: str) -> None:
        width = data.shape[1]
        for memory, offsets, chosen in self.views(addresses, width, text):
            index = offsets[:, None] + np.arange(width)
            memory[index] = data[chosen]
            if (memory[index] != data[chosen]).any():
                raise Fault(f"two threads write different values at one address: {text}")


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (reach + 1) * tensor.element_size()


@dataclass
class Copy:
    """A `cp.async` that has been issued: each lane's target grains and bytes, and the group it belongs to."""

    lanes: np.ndarray
    at: np.ndarray
    data: np.ndarray
    group: np.ndarray


class Shared:
    """Shared memory of `blocks` blocks, `size` bytes each, watched in grains of `grain` bytes.

    Addresses of a program begin at BASE, so that a forgotten base is out of bounds.
    """

    BASE = 1024  # 128-byte swizzles ask for 1024-byte alignment

    def __init__(self, blocks: int, threads: int, size: int, grain: int):
        self.size, self.grain, self.threads = size, grain, threads
        self.bytes = np.zeros(blocks * size, dtype=np.uint8)
        grains = blocks * size // grain
        lanes = blocks * threads
        self.block = np.arange(lanes) // threads
        self.warp = np.arange(lanes) // 32
        self.epoch, self.warp_epoch = np.zeros(lanes, dtype=np.int32), np.zeros(lanes, dtype=np.int32)
        self.writer, self.reader = (np.full(grains, NOBODY, dtype=np.int32) for _ in range(2))
        self.write_epoch, self.read_epoch, self.write_warp_epoch, self.read_warp_epoch = (
            np.full(grains, -1, dtype=np.int32) for _ in range(4)
        )
        self.flying = np.zeros(grains, dtype=bool)  # a target of cp.async that is not known to have arrived
        self.multiplied = np.zeros(grains, dtype=np.int16)  # wgmmas in flight that read it
        self.unfenced = np.zeros(grains, dtype=bool)  # written, and not yet fenced for the async proxy
        self.copies: list[Copy] = []
        self.committed = np.zeros(lanes, dtype=np.int32)
        self.hazards: Counter[str] = Counter()

    def place(self, lanes: np.ndarray, addresses: np.ndarray, width: int, text: str) -> np.ndarray:
        """Byte indices into `bytes` of each lane's first byte."""
        offsets = addresses.astype(np.int64) - self.BASE
        if (offsets < 0).any() or (offsets + width > self.size).any():
            raise Fault(f"out of bounds in shared memory: {text}, {self.size} bytes")
        if (offsets % width).any():
            raise Fault(f"misaligned in shared memory: {text}")
        return self.block[lanes] * self.size + offsets

    def grains(self, at: np.ndarray, width: int) -> np.ndarray:
        """[lanes, grains of an access]."""
        return (at // self.grain)[:, None] + np.arange(max(1, width // self.grain))

    def load(self, lanes: np.ndarray, addresses: np.ndarray, width: int, text: str) -> np.ndarray:
        at = self.place(lanes, addresses, width, text)
        self.watch_read(lanes, self.grains(at, width), text)
        return self.bytes[at[:, None] + np.arange(width)]

    def store(self, lanes: np.ndarray, addresses: np.ndarray, data: np.ndarray, text: str) -> None:
        width = data.shape[1]
        at = self.place(lanes, addresses, width, text)
        self.watch_write(lanes, self.grains(at, width), text)
        index = at[:, None] + np.arange(width)
        self.bytes[index] = data
        if (self.bytes[index] != data).any():
            self.hazards[f"two threads write different values in one instruction: {text}"] += 1

    # ------------------------------------------------------------------------------------------------- who, when

    def watch_read(self, lanes: np.ndarray, grains: np.ndarray, text: str) -> None:
        lane = np.broadcast_to(lanes[:, None], grains.shape).ravel()
        grain = grains.ravel()
        writer = self.writer[grain]
        if (writer == NOBODY).any() or self.flying[grain].any():
            unready = "before it was written" if not self.flying[grain].any() else "while cp.async writes it"
            self.hazards[f"read {unready}: {text}"] += 1
        if (self._unordered(lane, writer, self.write_epoch[grain], self.write_warp_epoch[grain])).any():
            self.hazards[f"read after write without a barrier: {text}"] += 1
        same = (self.read_epoch[grain] == self.epoch[lane]) & (self.reader[grain] != NOBODY)
        alone = ~same | (self.reader[grain] == lane)
        self.reader[grain] = np.where(alone, lane, SEVERAL)
        # several lanes of one instruction at one grain: the last one stands there, so tell it apart
        shared_ = self.reader[grain] != np.where(alone, lane, SEVERAL)
        self.reader[grain[shared_]] = SEVERAL
        self.read_epoch[grain], self.read_warp_epoch[grain] = self.epoch[lane], self.warp_epoch[lane]

    def watch_write(self, lanes: np.ndarray, grains: np.ndarray, text: str) -> None:
        lane = np.broadcast_to(lanes[:, None], grains.shape).ravel()
        grain = grains.ravel()
        if self.flying[grain].any():
            self.hazards[f"written while cp.async writes it: {text}"] += 1
        if self.multiplied[grain].any():
            self.hazards[f"written while wgmma reads it: {text}"] += 1
        if self._unordered(lane, self.writer[grain], self.write_epoch[grain], self.write_warp_epoch[grain]).any():
            self.hazards[f"write after write without a barrier: {text}"] += 1
        if self._unordered(lane, self.reader[grain], self.read_epoch[grain], self.read_warp_epoch[grain]).any():
            self.hazards[f"write after read without a barrier: {text}"] += 1
        self._written(lane, grain)

    def _written(self, lane: np.ndarray, grain: np.ndarray) -> None:
        self.writer[grain] = lane
        self.write_epoch[grain], self.write_warp_epoch[grain] = self.epoch[lane], self.warp_epoch[lane]
        self.unfenced[grain] = True

    def _unordered(self, lane, other, epoch, warp_epoch) -> np.ndarray:
        """Whether the earlier access by `other` and one now by `lane` are ordered by no barrier. Several readers of
        one warp are taken for readers of several warps: nothing here writes after them without a block's barrier."""
        here = (other != NOBODY) & (other != lane) & (epoch == self.epoch[lane])
        one_warp = (other >= 0) & (self.warp[np.maximum(other, 0)] == self.warp[lane])
        return here & ~(one_warp & (warp_epoch != self.warp_epoch[lane]))

    def barrier(self, lanes: np.ndarray) -> None:
        self.epoch[lanes] += 1
        self.warp_epoch[lanes] += 1

    def warp_barrier(self, lanes: np.ndarray) -> None:
        self.warp_epoch[lanes] += 1

    # -------------------------------------------------------------------------------------------------- cp.async

    def copy(self, lanes: np.ndarray, addresses: np.ndarray, data: np.ndarray, text: str) -> None:
        """Issued now, written when its group is waited for: as late as a GPU may."""
        width = data.shape[1]
        at = self.place(lanes, addresses, width, text)
        grains = self.grains(at, width)
        self.watch_write(lanes, grains, text)
        self.flying[grains] = True
        self.copies.append(Copy(lanes, at, data, self.committed[lanes].copy()))

    def commit(self, lanes: np.ndarray) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: np.ndarray, pending: int | None) -> None:
        """All but each lane's `pending` latest groups have arrived; None: also what is in no group."""
        waiting = np.zeros(len(self.committed), dtype=bool)
        waiting[lanes] = True
        left = []
        for copy in self.copies:
            done = waiting[copy.lanes]
            if pending is not None:
                done &= copy.group < self.committed[copy.lanes] - pending
            self._land(copy, done)
            if not done.all():
                rest = ~done
                left.append(Copy(copy.lanes[rest], copy.at[rest], copy.data[rest], copy.group[rest]))
        self.copies = left

    def _land(self, copy: Copy, done: np.ndarray) -> None:
        if not done.any():
            return
        width = copy.data.shape[1]
        grains = self.grains(copy.at[done], width)
        self.bytes[copy.at[done][:, None] + np.arange(width)] = copy.data[done]
        self.flying[grains] = False
        self._written(np.broadcast_to(copy.lanes[done][:, None], grains.shape).ravel(), grains.ravel())

    # ----------------------------------------------------------------------------------------------- async proxy

    def fence_proxy(self, lanes: np.ndarray) -> None:
        """What these lanes have written is visible to wgmma (after a barrier)."""
        fencing = np.zeros(len(self.committed), dtype=bool)
        fencing[lanes] = True
        mine = self.unfenced & (self.writer >= 0)
        self.unfenced[mine] = ~fencing[self.writer[mine]]

    def watch_multiply(self, warpgroup: np.ndarray, grains: np.ndarray, text: str) -> np.ndarray:
        """wgmma of lanes `warpgroup` begins to read `grains`; returns them once each, for `multiplied_done`."""
        grains = np.unique(grains)
        if self.unfenced[grains].any():
            self.hazards[f"wgmma reads what no fence.proxy.async followed: {text}"] += 1
        if self.flying[grains].any() or (self.writer[grains] == NOBODY).any():
            self.hazards[f"wgmma reads what is not written yet: {text}"] += 1
        if (self.write_epoch[grains] == self.epoch[warpgroup[0]]).any():
            self.hazards[f"wgmma reads what was written without a barrier: {text}"] += 1
        self.multiplied[grains] += 1
        return grains

    def multiplied_done(self, grains: np.ndarray, warpgroup: np.ndarray) -> None:
        """The warpgroup knows that its wgmma is done; others know it only after a barrier."""
        self.multiplied[grains] -= 1
        self.reader[grains] = SEVERAL
        self.read_epoch[grains] = self.epoch[warpgroup[0]]
