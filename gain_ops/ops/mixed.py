"""Gains of several sets in one batch: delta has a row a set, and ``index`` says which one scales which row of x.

::

    side="output":   y[t] = gain[index[t]] * (x[t] @ W.T) + b
    side="input":    y[t] = (x[t] * gain[index[t]]) @ W.T + b              gain = 1 + delta, and 1 where index is -1

    dz[t]     = gain[index[t]] * dy[t]
    ddelta[i] = sum over the t with index[t] = i of dy[t] * z[t]           exactly zero for a set without rows

W and its GEMMs are those of one set. For ddelta the rows are sorted by set once, stably, and summed as those of experts are
(reference.py, line 23), in a fixed order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from gain_ops.ops import raw
from gain_ops.ops.arguments import any_sharded, check_device, check_floating, check_frozen_map, flatten, unflatten
from gain_ops.ops.autograd import Gradients, bias_gradient, cast_to, differentiable, outside_autocast, remember
from gain_ops.ops.calling import call
from gain_ops.ops.entering import gemm
from gain_ops.reference import SIDES, accumulation_dtype, gain_of
from gain_ops.utils.errors import UsageError


def mixed_scale(x: Tensor, delta: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """``y[t] = x[t] * (1 + delta[index[t]])``, and x[t] where index is -1.

    Args:
        x: [..., n], T rows; float64, float32, bfloat16 or float16. It is saved for backward when delta needs a gradient.
        delta: [N, n], any floating dtype.
        index: [T] in int32, from -1 to N - 1, in any order.
        backend: of the sums of ddelta, as in gain_linear.

    Returns:
        y [..., n] in x's dtype, from a float32 product (float64 for float64), rounded once.

    Raises:
        ValueError: shapes or devices that do not fit; DTensors.
        TypeError: a dtype that is not floating, or an index that is not int32.

    """
    check_floating(x=x, delta=delta)
    flat = flatten(x)
    _check_sets(flat, delta, index, flat.shape[-1], "x.shape[-1]")
    return unflatten(_scale(flat, delta, None, index, backend), x)


def mixed_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    side: str = "output",
    backend: str = "auto",
) -> Tensor:
    """gain_linear with a gain for each row of x: ``y[t] = gain[index[t]] * (x[t] @ W.T) + b``, or the input side's.

    The output side saves z for backward, the input side x, when delta needs a gradient; W is saved as it is, also under
    autocast.

    Args:
        x: [..., in_features], T rows.
        weight: [out_features, in_features], frozen, x's dtype outside autocast.
        delta: [N, out_features] on the output side, [N, in_features] on the input side.
        index: [T] in int32, from -1 to N - 1, in any order; -1 is the base, a gain of 1.
        bias: [out_features] or None; the gain does not scale it.
        side: which features the gains scale, "output" or "input".
        backend: of the sums of ddelta, as in gain_linear.

    Returns:
        y [..., out_features] in x's dtype. Without autograd the eager backend's bits of each set alone.

    Raises:
        ValueError: shapes, devices or a side that do not fit; a weight that requires a gradient; DTensors.
        TypeError: dtypes that do not fit, or an index that is not int32.

    """
    if side not in SIDES:
        raise UsageError(f"side={side!r} is not one of {', '.join(map(repr, SIDES))}")
    check_frozen_map(x, weight, delta, bias)
    flat = flatten(x)
    features = weight.shape[0] if side == "output" else weight.shape[1]
    _check_sets(flat, delta, index, features, f"the features of the {side} side")
    return unflatten(_linear(flat, weight, delta, bias, index, side, backend), x)


def _check_sets(x: Tensor, delta: Tensor, index: Tensor, features: int, meaning: str) -> None:
    if any_sharded(x, delta, index):
        raise UsageError(
            "several gain sets in one batch do not take DTensors: run them on one device, or absorb one set"
        )
    if delta.dim() != 2 or delta.shape[0] == 0 or delta.shape[1] != features:
        raise ValueError(f"delta must be [N, {features}] (a row a set, {meaning}), got shape {tuple(delta.shape)}")
    if index.shape != x.shape[:1]:
        raise ValueError(f"index must be [{x.shape[0]}], a set for each row of x, got shape {tuple(index.shape)}")
    if index.dtype != torch.int32:
        raise TypeError(f"index must be int32, got {index.dtype}: call index.int()")
    check_device(x, delta, "delta")
    check_device(x, index, "index")


@gemm("weight is")
def _linear(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, index: Tensor, side: str, backend: str
) -> Tensor:
    if side == "output":
        return _scale(_product(x, weight, None), delta, bias, index, backend)
    return _product(_scale(x, delta, None, index, backend), weight, bias)


def _scale(x: Tensor, delta: Tensor, bias: Tensor | None, index: Tensor, backend: str) -> Tensor:
    y: Tensor = MixedScale.apply(x, delta, index, bias, backend)
    return y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = FrozenProduct.apply(x, weight, bias)
    return y


def gains_of_rows(delta: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """The gain of each row: delta [N, n], index [T] -> [T, n] in the accumulation dtype, ones where index is -1."""
    # index -1 is the last row, the base's
    return gain_of(torch.cat((delta, delta.new_zeros(1, delta.shape[1]))), dtype)[index]


def scale_rows(x: Tensor, delta: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """``x * gain[index] + b`` -> [T, n], rounded once."""
    gain = gains_of_rows(delta, index, x.dtype)
    return (x * gain if bias is None else torch.addcmul(bias, x, gain)).to(x.dtype)


def ddelta_rows(dy: Tensor, z: Tensor, index: Tensor, sets: int, backend: str) -> Tensor:
    """The sum of ``dy * z`` over each set's rows -> [N, n], in a fixed order."""
    if differentiable():
        wide = dy.new_zeros(sets + 1, dy.shape[1], dtype=accumulation_dtype(dy.dtype))
        # the base's rows add to row N, which is dropped
        return wide.index_add(0, index.remainder(sets + 1), (dy.to(wide.dtype) * z))[:sets]
    # as if the base came last: rows past the last offset belong to nobody
    ids, order = torch.sort(index.remainder(sets + 1), stable=True)
    offsets = torch.searchsorted(
        ids, torch.arange(sets, dtype=ids.dtype, device=ids.device), right=True, out_int32=True
    )
    return call(raw.grouped_ddelta, dy[order], z[order], offsets, backend)


class FrozenProduct(Function):
    """``z = x @ W.T + b``; saves W as it is, never a cast copy, and nothing of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in], weight [out, in], bias [out] -> z [T, out]."""
        ctx.device_type, ctx.compute_dtype = x.device.type, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None)
        return F.linear(x, cast_to(weight, x.dtype), None if bias is None else cast_to(bias, x.dtype))

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dz: Tensor) -> Gradients:
        """dz [T, out] -> dx, None, dbias."""
        (weight,) = ctx.saved_tensors
        dz = cast_to(dz, ctx.compute_dtype)
        dx = None if weight is None else dz @ cast_to(weight, dz.dtype)
        return dx, None, bias_gradient(ctx, dz, 2)


class MixedScale(Function):
    """``y = gain[index] * x + b``; saves x only when delta needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, index: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """x [T, n], delta [N, n], index [T], bias [n] -> y [T, n]."""
        remember(ctx, x, delta, bias, backend)
        needs_x, needs_delta, *_ = ctx.needs_input_grad
        ctx.sets = delta.shape[0]
        ctx.save_for_backward(x if needs_delta else None, delta if needs_x else None, index)
        return scale_rows(x, delta, index, bias)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        """dy [T, n] -> dx, ddelta, None, dbias."""
        if dy is None:
            return (None,) * 5
        x, delta, index = ctx.saved_tensors
        dx = None if delta is None else scale_rows(dy, delta, index, None)
        ddelta = None if x is None else cast_to(ddelta_rows(dy, x, index, ctx.sets, ctx.backend), ctx.delta_dtype)
        return dx, ddelta, None, bias_gradient(ctx, dy), None
