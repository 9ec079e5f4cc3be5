"""The result of every function of reference.py, without computing it: shape, dtype, device, contiguous strides."""

import torch
from torch import Tensor

from gain_ops.reference import accumulation_dtype


def _empty(like: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _sums(like: Tensor, size: int | torch.SymInt) -> Tensor:
    return torch.empty((size,), dtype=accumulation_dtype(like.dtype), device=like.device)


def scale(x: Tensor, delta: Tensor) -> Tensor:
    """[T, n]."""
    return _empty(x, *x.shape)


def linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """y [T, out]."""
    return _empty(x, x.shape[0], weight.shape[0])


def linear_z(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and z, [T, out] each."""
    return linear(x, weight, delta, bias), linear(x, weight, delta, bias)


def linear_input(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """y [T, out]."""
    return linear(x, weight, delta, bias)


def backward(dy: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """dz [T, out], ddelta [out]."""
    return _empty(dy, *dy.shape), _sums(dy, dy.shape[1])


def ddelta(dy: Tensor, z: Tensor) -> Tensor:
    """ddelta [out]."""
    return _sums(dy, dy.shape[1])


def backward_recompute(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """dz [T, out], ddelta [out]."""
    return _empty(dy, *dy.shape), _sums(dy, dy.shape[1])


def ddelta_recompute(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """ddelta [out]."""
    return _sums(dy, dy.shape[1])


def backward_input(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """dx [T, in], ddelta [in]."""
    return _empty(x, *x.shape), _sums(x, x.shape[1])


def glu(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> Tensor:
    """[T, n]."""
    return _empty(gate, *gate.shape)


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """[T, 2n] (without up [T, n]), ddelta [n]."""
    t, n = gate.shape
    return _empty(gate, t, n if up is None else 2 * n), _sums(gate, n)


def glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """ddelta [n]."""
    return _sums(gate, gate.shape[1])


def rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[T, n], r [T]."""
    return _empty(x, *x.shape), _sums(x, x.shape[0])


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """[T, n], ddelta [n]."""
    return _empty(x, *x.shape), _sums(x, x.shape[1])


def add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """[T, n]."""
    return _empty(z, *z.shape)


def add_rms_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h and y, [T, n] each, r [T]."""
    return _empty(z, *z.shape), _empty(z, *z.shape), _sums(z, z.shape[0])


def add_rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dz, [T, n] each, ddelta [n]."""
    return _empty(h, *h.shape), _empty(h, *h.shape), _sums(h, h.shape[1])


def add_layer_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h and y, [T, n] each, mean and r, [T] each."""
    t = z.shape[0]
    return _empty(z, *z.shape), _empty(z, *z.shape), _sums(z, t), _sums(z, t)


def add_layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dz, [T, n] each, ddelta [n]."""
    return _empty(h, *h.shape), _empty(h, *h.shape), _sums(h, h.shape[1])


def rms_norm_add(residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """h [T, n], r [T]."""
    return _empty(z, *z.shape), _sums(z, z.shape[0])


def rms_norm_add_backward(dh: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """dz [T, n], ddelta [n]."""
    return _empty(z, *z.shape), _sums(z, z.shape[1])
