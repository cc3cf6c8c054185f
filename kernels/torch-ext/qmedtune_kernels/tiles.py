"""How the fused matmul cuts its work: tile sizes, the way of decoding, ways to split the contraction."""

from __future__ import annotations

import torch

from .decode import INTERPRET


def heights(most: int) -> list[int]:
    """BM of the tiles that up to `most` rows take, the last of them that of `most` rows: 16, 32, 64; none for none."""
    return [bm for bm in (16, 32, 64) if most > bm // 2 or (bm == 16 and most)]


def tile(rows: int, blocksize: int, forward: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, int | bool]:
    """Tile sizes and pipeline depth for M rows; chosen by the static gate's counts (NOTES.md), not yet on hardware.

    fp32 has no tensor cores here: small tiles (larger ones spill kilobytes) and no pipeline, which would put the
    gathered table lookups into shared memory.
    """
    bm, warps = heights(max(rows, 1))[-1], {"num_warps": 4}
    if dtype == torch.float32:
        small = {"BM": 16, "BN": 32, "BK": 32, **warps, "num_stages": 1}
        return {**small, "POST": False} if forward else small
    if forward:
        few = bm <= 32
        return {
            "BM": bm, "BN": 128, "BK": min(64, blocksize), "POST": few, **warps, "num_stages": 4 if few else 3
        }  # fmt: skip
    bn, bk = (128, 64) if bm <= 32 else (64, 128)  # 64 x 128 spills at M <= 16 on sm_90
    return {"BM": bm, "BN": bn, "BK": bk, **warps, "num_stages": 3}


def registers(arch: int, bm: int, dtype: torch.dtype, forward: bool) -> int | None:
    """`maxnreg`, where ptxas would aim too low and spill 8 bytes: of flat scales, at 96 in the backward of 16 rows on
    sm_100 (told 128 it takes fewer instructions everywhere), at 168 in the forward of 64 rows on sm_120 (ragged sizes,
    Triton 3.9)."""
    if dtype == torch.float32:
        return None
    if forward:
        return 255 if bm == 64 and arch >= 120 else None
    return 128 if bm == 16 else None


def decode(arch: int, dtype: torch.dtype, forward: bool) -> str:
    """DECODE of decode.py. Forward below sm_90 and on sm_120, `mma.sync` takes W from registers, and an address operand
    makes Triton pass it through shared memory instead (11.3 instructions an element against 8.7): there the table is
    made; elsewhere fetching it is cheaper (backward on sm_86: 6.7 against 7.2)."""
    if INTERPRET or dtype == torch.float32:
        return "gather"
    return "make" if forward and not 90 <= arch < 120 else "fetch"


MOST_SPLITS = 64  # their partial sums are read again: 4 bytes a split, row and column
PROGRAMS = 4  # for each processor: as many as fit beside each other (128 registers, 25 KB of shared memory)


def splits(tiles: int, steps: int, processors: int) -> int:
    """Ways to split the contraction so that each processor has PROGRAMS of work. Each keeps at least two steps, or
    one where that alone gives every processor two programs (k/v of an 8B model on 132 processors)."""
    wanted, tiles = -(-PROGRAMS * processors // max(tiles, 1)), max(tiles, 1)
    ways = max(1, min(wanted, steps // 2, MOST_SPLITS))
    return ways if ways * tiles >= 2 * processors else max(1, min(wanted, steps, MOST_SPLITS))


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
