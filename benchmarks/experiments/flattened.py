"""The forward with the loop over tiles flattened into the loop over k: linear_forward.py with ``config.flatten``.

The next tile's loads are then in flight under this one's epilogue, where the other loop drains and starts cold. Triton found
it slower once (triton-lang/triton#9279), so a GPU decides (benchmarks/NOTES.md): no heuristic picks it, a table may.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gain_ops.backends.operands import fuses
from gain_ops.kernels import linear_forward, tables
from gain_ops.kernels.aot import Call

STAGES = (3, 4)


def linear(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, stages: int, keep_z: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``gain * (x @ W.T) + b`` as linear_forward.linear, and z where it is kept, in the heuristic's tile.

    Raises:
        ValueError: operands that do not go by TMA.

    """
    if not serves(x, weight):
        raise ValueError(
            f"the flattened loop reads by TMA: expected operands of 16 bits with aligned rows on sm_90 or later, got "
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} in {x.dtype}"
        )
    config = replace(tables.gemm_config("linear", x, weight), num_stages=stages, flatten=True)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    z = torch.empty_like(y) if keep_z else None
    linear_forward.launch(x, weight, delta, bias, y, z, config)
    return y, z


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel runs on these operands."""
    config = tables.gemm_config("linear", x, weight)
    return fuses(x, weight) and config.use_tma and config.persistent


_ARGUMENTS = ("x", "weight", "delta_out", "bias")
CALLS = {
    "flattened, 3 stages": Call(partial(linear, stages=3), _ARGUMENTS, {"bias": None}),
    "flattened, 4 stages": Call(partial(linear, stages=4), _ARGUMENTS, {"bias": None}),
    "flattened, bias and z, 3 stages": Call(partial(linear, stages=3, keep_z=True), _ARGUMENTS),
    "flattened, bias and z, 4 stages": Call(partial(linear, stages=4, keep_z=True), _ARGUMENTS),
}
"""What gain_ops.kernels.aot compiles of it."""
