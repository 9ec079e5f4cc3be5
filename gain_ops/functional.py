"""The public functions: check the arguments, apply autocast's rule, flatten, and hand over to autograd.py."""

from functools import partial

import torch
from torch import Tensor

from gain_ops import ops, reference
from gain_ops.arguments import (
    any_sharded,
    check_device,
    check_features,
    check_floating,
    flatten,
    transformed,
    unflatten,
)
from gain_ops.autograd import KeepInput, KeepOutput, Scale, autocast_enabled

SIDES = ("output", "input")
SAVES = ("auto", "output", "input")


def gain_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    bias: Tensor | None = None,
    *,
    side: str = "output",
    save: str = "auto",
    backend: str = "auto",
) -> Tensor:
    r"""A linear map whose frozen weight is scaled by a learned diagonal, with ``gain = 1 + delta``.

    ::

        side="output":   y = gain * (x @ W.T) + b        the same as the linear map of diag(gain) @ W
        side="input":    y = (x * gain) @ W.T + b        the same as the linear map of W @ diag(gain)

        dx     = (dy * gain) @ W              or  gain * (dy @ W)
        ddelta = sum over tokens of dy * z    or  sum over tokens of (dy @ W) * x,      z = x @ W.T

    The gain scales the weight and not the bias. dW is never formed, and no gradient that nobody needs is computed.

    Args:
        x: [..., in_features], any strides; float64, float32, bfloat16 or float16.
        weight: [out_features, in_features], x's dtype, any strides (a transposed view is not copied). Frozen: it must not
            require a gradient.
        delta: [out_features] on the output side, [in_features] on the input side; gain minus one, zeros at the start. Any
            floating dtype; keep it float32, where steps near zero are not lost.
        bias: [out_features] or None; any floating dtype.
        side: which features the gain scales, "output" or "input".
        save: what an output-side gain keeps for backward. "output": z [..., out_features], fast. "input": x, and one more
            GEMM recomputes z in the backward, which adds no byte where x is alive anyway. "auto": "output". The input side
            always keeps x ("auto" or "input"). Nothing that is activation-sized is kept unless delta needs a gradient.
        backend: "auto", or "triton" | "cuda" | "eager" by name (see gain_ops.dispatch). With "auto", GAIN_OPS_BACKEND decides.

    Returns:
        y [..., out_features] in x's dtype (in autocast's dtype under autocast). The products with the gain run in float32
        (float64 for float64); the kernels round once, the eager backend rounds z first as plain torch does. With delta = 0
        and no bias the bits are those of torch.nn.functional.linear wherever that runs the same GEMM.

    Under autocast x, weight and the input side's bias go to autocast's dtype and delta stays as it is; the cast weight is
    not kept for backward. torch.func transforms, forward-mode and double backward work through plain torch, unfused.

    DTensors are computed shard by shard where their placements fit together, with y a DTensor, and nothing is gathered: see
    gain_ops.sharding. Row-parallel, y is a sum over the ranks that is left open, each of its terms scaled already.

    Raises:
        ValueError: shapes, devices, placements, ``side``, ``save`` or ``backend`` that do not fit, or a weight that requires
            a gradient.
        TypeError: dtypes that do not fit.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: GAIN, arXiv 2604.04516.

    """
    _check(x, weight, delta, bias, side, save)
    if any_sharded(x, weight, delta, bias):
        from gain_ops import sharding

        function = partial(gain_linear, side=side, save=save, backend=backend)
        rule = "linear" if side == "output" else "linear_input"
        operands = {"x": x, "weight": weight, "delta": delta, "bias": bias}
        return sharding.on_shards(rule, function, operands, weight.shape[0])
    device_type = x.device.type
    if transformed():
        return reference.composite(x, weight, delta, bias, side)
    if autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return _apply(
                x.to(dtype), weight, delta, bias, None if weight.dtype == dtype else dtype, side, save, backend
            )
    if weight.dtype != x.dtype:
        raise TypeError(
            f"x is {x.dtype} and weight is {weight.dtype}: they must agree outside autocast. Cast one, or use torch.autocast."
        )
    return _apply(x, weight, delta, bias, None, side, save, backend)


def gain_scale(x: Tensor, delta: Tensor, *, backend: str = "auto") -> Tensor:
    """``y = x * (1 + delta)`` over the last dimension, with one fused pass for both gradients.

    ::

        dx = dy * (1 + delta)        ddelta = sum over tokens of dy * x

    The gain round a linear map that is not ours (a quantised one, say): scale its output, or its input.

    Args:
        x: [..., n], any strides; float64, float32, bfloat16 or float16. It is kept for backward when delta needs a gradient.
        delta: [n], any floating dtype.
        backend: as in gain_linear.

    Returns:
        y [..., n] in x's dtype, from a float32 product (float64 for float64), rounded once. Autocast changes nothing.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown backend.
        TypeError: a dtype that is not floating.
        BackendUnavailable: a backend asked for by name that cannot run here.

    """
    check_floating(x=x, delta=delta)
    check_features(x, x.shape[-1] if x.dim() else 0, delta, "x.shape[-1]")
    if any_sharded(x, delta):
        from gain_ops import sharding

        return sharding.on_shards("scale", partial(gain_scale, backend=backend), {"x": x, "delta": delta}, x.shape[-1])
    if transformed():
        return reference.composite_scale(x, delta)
    flat = flatten(x)
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
        y = Scale.apply(flat, delta, backend)
    else:
        y = ops.scale(flat, delta, backend)
    return unflatten(y, x)


def check_side_and_save(side: str, save: str) -> None:
    """Raise ValueError for a side or save that does not exist, or that do not go together."""
    if side not in SIDES:
        raise ValueError(f"side={side!r} is not one of {', '.join(map(repr, SIDES))}")
    if save not in SAVES:
        raise ValueError(f"save={save!r} is not one of {', '.join(map(repr, SAVES))}")
    if side == "input" and save == "output":
        raise ValueError("save='output' has no use on the input side, which keeps x: use save='auto' or 'input'")


def _apply(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    compute_dtype: torch.dtype | None,
    side: str,
    save: str,
    backend: str,
) -> Tensor:
    flat = flatten(x)
    wants_grad = x.requires_grad or delta.requires_grad or (bias is not None and bias.requires_grad)
    if not (wants_grad and torch.is_grad_enabled()):
        op = ops.linear if side == "output" else ops.linear_input
        y = op(flat, weight if compute_dtype is None else weight.to(compute_dtype), delta, bias, backend)
    elif side == "output" and save != "input" and delta.requires_grad:
        y, _ = KeepOutput.apply(flat, weight, delta, bias, compute_dtype, backend)
    else:
        y = KeepInput.apply(flat, weight, delta, bias, compute_dtype, side, backend)
    return unflatten(y, x)


def _check(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, side: str, save: str) -> None:
    check_side_and_save(side, save)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [out_features, in_features], got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., in_features={weight.shape[1]}] for weight {tuple(weight.shape)}, got shape {tuple(x.shape)}"
        )
    if weight.requires_grad:
        raise ValueError(
            "weight requires a gradient, but a gained weight is frozen and dW is never formed. "
            "Call weight.requires_grad_(False) (gain_ops.apply does), or train the full weight with torch.nn.functional.linear."
        )
    if side == "output":
        check_features(x, weight.shape[0], delta, "out_features on the output side")
    else:
        check_features(x, weight.shape[1], delta, "in_features on the input side")
    if bias is None:
        check_floating(x=x, weight=weight, delta=delta)
    else:
        check_floating(x=x, weight=weight, delta=delta, bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [out_features={weight.shape[0]}] or None, got shape {tuple(bias.shape)}")
        check_device(x, bias, "bias")
    check_device(x, weight, "weight")
