"""The predicted time of a GEMM op on sm_90 in 16 bits, by each way: what ``auto`` goes by until a table does.

    composed   gemm + bytes of the passes / bandwidth + a launch
    fused      2 m n (k + c) / rate of its tiles

c is what an epilogue costs, in columns of k. benchmarks/NOTES.md says where the constants come from; none is measured.
"""

import math
from collections.abc import Sequence

Tiles = Sequence[tuple[int, int, float]]

FLOPS = 790e12
"""Flop/s of an 8192^3 product."""
BYTES = 3.0e12
"""B/s of a device copy, read and written."""
PASS = 0.92
"""The share of it that a pass reaches."""
LAUNCH = 2.0
"""Microseconds of one more kernel in a full stream."""
MULTIPROCESSORS = 132
E = 2  # bytes of an element

VENDOR: Tiles = ((128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.97), (128, 128, 0.93), (64, 256, 0.93), (64, 128, 0.80))
"""Tiles of a vendor's library, and the share of the best rate that each reaches."""
OURS: Tiles = ((128, 256, 1.0), (128, 128, 0.93))
"""Tiles of both fused backends."""

EPILOGUE = {
    "triton": {
        "linear": 280,
        "linear_z": 375,
        "backward_recompute": 700,
        "backward_input": 700,
        "ddelta_recompute": 650,
    },
    "cuda": {"linear": 165, "linear_z": 165, "backward_recompute": 230, "backward_input": 230},
}
"""Columns of k that an epilogue takes as long as."""
PASSES = {"linear": 2, "linear_z": 2, "backward_recompute": 3, "backward_input": 3, "ddelta_recompute": 2}
"""How often a pass reads or writes the result's [m, n]."""


def serves(way: str, op: str) -> bool:
    """Whether the way is predicted for an op; csrc has no fused ddelta_recompute."""
    return way == "composed" or op in EPILOGUE[way]


def us(way: str, op: str, m: int, n: int, k: int) -> float:
    """Microseconds of an op whose GEMM is [m, k] @ [k, n]."""
    if way == "composed":
        return gemm_us(m, n, k) + 1e6 * PASSES[op] * E * m * n / (BYTES * PASS) + LAUNCH
    return gemm_us(m, n, k + EPILOGUE[way][op], OURS)


def gemm_us(m: int, n: int, k: int, tiles: Tiles = VENDOR, flops: float = FLOPS, bandwidth: float = BYTES) -> float:
    """Microseconds of a product."""
    moved = E * (m * k + n * k + m * n)
    return 1e6 * max(2 * m * n * k / (flops * used(m, n, tiles)), moved / bandwidth)


def used(m: int, n: int, tiles: Tiles = VENDOR) -> float:
    """The share of the multiprocessors' time that a GEMM's tiles use, by the best of the tiles."""
    waves = {(bm, bn): math.ceil(math.ceil(m / bm) * math.ceil(n / bn) / MULTIPROCESSORS) for bm, bn, _ in tiles}
    return max(share * m * n / (bm * bn * MULTIPROCESSORS * waves[bm, bn]) for bm, bn, share in tiles)
