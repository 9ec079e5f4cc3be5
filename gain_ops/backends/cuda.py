"""The C++/CUDA backend (csrc/): the functions of reference.py over ``torch.ops.gain_ops_cuda``.

A GEMM's epilogue does the work where a fused kernel serves the operands: sm_90, bfloat16 or float16, rows that TMA can
address. Elsewhere (other cards, float32, odd sizes) the vendor's GEMM runs, with tf32 only where torch allows it, and one
hand-written pass follows, which reads and writes [T, out] once more (the count is in benchmarks/NOTES.md).

The ops of experts and of the residual stream are plain torch's here; the Triton backend has kernels for them.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from gain_ops import reference
from gain_ops.backends import eager, operands
from gain_ops.backends.composed import Composed

# the residual stream; the passes that exist here would round dx before ddelta is summed from it
from gain_ops.backends.eager import add as add
from gain_ops.backends.eager import add_layer_norm as add_layer_norm
from gain_ops.backends.eager import add_layer_norm_backward as add_layer_norm_backward
from gain_ops.backends.eager import add_rms_norm_backward as add_rms_norm_backward

# the ops of experts, an expert after the other
from gain_ops.backends.eager import combine as combine
from gain_ops.backends.eager import combine_backward as combine_backward
from gain_ops.backends.eager import grouped_backward as grouped_backward
from gain_ops.backends.eager import grouped_ddelta as grouped_ddelta
from gain_ops.backends.eager import grouped_glu as grouped_glu
from gain_ops.backends.eager import grouped_glu_backward as grouped_glu_backward
from gain_ops.backends.eager import grouped_glu_ddelta as grouped_glu_ddelta
from gain_ops.backends.eager import grouped_mm as grouped_mm
from gain_ops.backends.eager import grouped_scale as grouped_scale
from gain_ops.backends.eager import rms_norm_add as rms_norm_add
from gain_ops.reference import ACTIVATIONS

_ops: Any = torch.ops.gain_ops_cuda

_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS)}
_NORM_COLUMNS = 24_000  # kNormColumns of csrc/rms_norm.h: wider rows are left to plain torch


def rms_norm_add_backward(dh: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Line (18): -> dz [T, n], ddelta [n]; the eager backend's sums err more where a row has one feature."""
    return reference.rms_norm_add_backward(dh.contiguous(), z.contiguous(), delta, weight, r)


def scale(x: Tensor, delta: Tensor) -> Tensor:
    """``x * gain``: x [T, n], delta [n] -> [T, n]."""
    return _scale_and_shift(x, delta, None, False)


def scale_rows(x: Tensor, delta: Tensor) -> Tensor:
    """``gain[:, None] * x``: x [n, k], delta [n] -> [n, k]."""
    scaled: Tensor = _ops.scale_rows(x, _fp32(delta))
    return scaled


def linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Lines (1), (2): -> y [T, out]."""
    if not _fuses(x, weight):
        return COMPOSED.linear(x, weight, delta, bias)
    y: Tensor = _ops.linear(x, weight, _fp32(delta), _like(bias, x))
    return y


def linear_z(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lines (1), (2), and z: -> y [T, out], z [T, out]."""
    if not _fuses(x, weight):
        return COMPOSED.linear_z(x, weight, delta, bias)
    y, z = _ops.linear_z(x, weight, _fp32(delta), _like(bias, x))
    return y, z


def linear_input(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Line (5): -> y [T, out]; the smaller operand is scaled before the GEMM."""
    return operands.linear_input(x, weight, delta, bias, scale, scale_rows)


def backward(dy: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (3), (4) from a saved z, in one pass: -> dz [T, out], ddelta [out]."""
    dz, sums = _ops.backward(dy, z, _fp32(delta))
    return dz, sums


def ddelta(dy: Tensor, z: Tensor) -> Tensor:
    """Line (4) alone: -> [out]."""
    sums: Tensor = _ops.ddelta(dy, z)
    return sums


def backward_recompute(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (1), (3), (4) from a saved x: -> dz [T, out], ddelta [out]."""
    if not _fuses(x, weight, dy):
        return COMPOSED.backward_recompute(dy, x, weight, delta)
    dz, sums = _ops.backward_recompute(dy, x, weight, _fp32(delta))
    return dz, sums


def ddelta_recompute(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Lines (1), (4): -> [out]. Only a first layer calls it, where no dx is needed; z goes through memory."""
    return COMPOSED.ddelta_recompute(dy, x, weight)


def backward_input(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (6), (7): -> dx [T, in], ddelta [in]."""
    if not _fuses(dy, weight.t(), x):
        return COMPOSED.backward_input(dy, x, weight, delta)
    dx, sums = _ops.backward_input(dy, x, weight, _fp32(delta))
    return dx, sums


def glu(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> Tensor:
    """Line (8): -> h [T, n]."""
    h: Tensor = _ops.glu(gate, up, _fp32(delta), _ACTIVATIONS[activation])
    return h


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Lines (9), (10): -> dg and du side by side [T, 2n] (without up: dg [T, n]), ddelta [n]."""
    dgate_up, sums = _ops.glu_backward(dh, gate, up, _fp32(delta), _ACTIVATIONS[activation])
    return dgate_up, sums


def glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Line (10) alone: -> [n]."""
    sums: Tensor = _ops.glu_ddelta(dh, gate, up, _ACTIVATIONS[activation])
    return sums


def rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Line (11): -> y [T, n], r [T]."""
    if not 0 < x.shape[1] <= _NORM_COLUMNS:
        return eager.rms_norm(x, weight, delta, eps)
    y, r = _ops.rms_norm(x, _fp32(weight), _fp32(delta), eps)
    return y, r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (12), (13): -> dx [T, n], ddelta [n]."""
    if not 0 < x.shape[1] <= _NORM_COLUMNS:
        return eager.rms_norm_backward(dy, x, weight, delta, r)
    dx, sums = _ops.rms_norm_backward(dy, x, _fp32(weight), _fp32(delta), r)
    return dx, sums


def add_rms_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines (14), (15): -> h [T, n], y [T, n], r [T]; h is read once more than by one kernel."""
    h = add(residual, z, delta, bias)
    return h, *rms_norm(h, weight, torch.zeros_like(weight), eps)


def _scale_and_shift(z: Tensor, delta: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
    # the C++ op has a result of its own, also where z's memory would do
    y: Tensor = _ops.scale(z, _fp32(delta), _like(bias, z))
    return y


COMPOSED = Composed(_scale_and_shift, backward, ddelta)
"""The GEMMs by the vendor's product and these passes."""


def _fuses(a: Tensor, weight: Tensor, *tiles: Tensor) -> bool:
    """Whether a fused GEMM serves a [M, K], weight [N, K] and the [M, N] tiles that it reads, on this card."""
    return card_fuses(a.device.index) and operands.fuses(a, weight, *tiles)


@functools.cache
def card_fuses(index: int | None) -> bool:
    """Whether the fused GEMMs were built and this card runs them: sm_90 code does not run on any other."""
    return hasattr(_ops, "linear") and torch.cuda.get_device_capability(index) == (9, 0)


def _fp32(delta: Tensor) -> Tensor:
    return _vector(delta, torch.float32)


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else _vector(bias, x.dtype)


def _vector(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The vector, contiguous and aligned to 16 bytes: with another start the passes would move one element at a time."""
    t = t.to(dtype).contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
