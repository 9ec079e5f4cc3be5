"""A linear map with a gain: the public functions, and three autograd Functions, one a way of saving.

    KeepOutput   output side   saves z [T, out]   one more activation, the frozen linear's two GEMMs
    KeepInput    output side   saves x [T, in]    no new byte where another op already holds x, a third GEMM
                 input side    saves x [T, in]    the same two GEMMs
    Scale        no GEMM       saves x [T, n]     around another linear map, such as a quantised one

Each also saves delta and an alias of W (the caller's own tensor, never a copy, also under autocast). A gradient that is not
needed is not computed, and nothing is saved for it: only delta -> no dx GEMM and no W; only x -> no activation.

Under autocast x has autocast's dtype. W is cast to it inside the forward and inside the backward, so no cast copy outlives
the call. Double backward recomputes with reference.py's differentiable lines. KeepOutput returns z as a second output for this
reason: a saved output carries the graph back to x.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gain_ops import reference
from gain_ops.ops import raw
from gain_ops.ops.arguments import check_features, check_floating, check_frozen_map
from gain_ops.ops.autograd import Gradients, bias_gradient, cast_to, differentiable, outside_autocast, remember
from gain_ops.ops.calling import call
from gain_ops.ops.entering import entry, gemm
from gain_ops.reference import SIDES
from gain_ops.utils.errors import UsageError

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

    The gain scales the weight and not the bias. dW is never formed, and a gradient that is not needed is not computed.

    Args:
        x: [..., in_features], any strides; float64, float32, bfloat16 or float16.
        weight: [out_features, in_features], x's dtype, any strides (a transposed view is not copied). Frozen: it must not
            require a gradient.
        delta: [out_features] on the output side, [in_features] on the input side; gain minus one, zeros at the start. Any
            floating dtype; use float32, where steps near zero are not lost.
        bias: [out_features] or None; any floating dtype.
        side: which features the gain scales, "output" or "input".
        save: what an output-side gain saves for backward. "output": z [..., out_features], fast. "input": x, and one more
            GEMM recomputes z in the backward; this adds no byte where another op already holds x. "auto": "output". The
            input side always saves x ("auto" or "input"). No activation is saved unless delta needs a gradient.
        backend: "auto", or "triton" | "cuda" | "eager" by name (gain_ops.ops.dispatch). With "auto", GAIN_OPS_BACKEND decides.

    Returns:
        y [..., out_features] in x's dtype (in autocast's dtype under autocast). The products with the gain run in float32
        (float64 for float64); the kernels round once, and the eager backend rounds z first, as plain torch does. With
        delta = 0 and no bias the bits are those of torch.nn.functional.linear wherever that runs the same GEMM.

    Under autocast x, weight and the input side's bias are cast to autocast's dtype, and delta is not; the cast weight is not
    saved for backward. torch.func transforms, forward-mode and double backward work through plain torch, unfused.

    DTensors are computed shard by shard where their placements fit together; y is a DTensor, and nothing is gathered (see
    gain_ops.ops.sharding). With a row-parallel weight, y is a Partial sum over the ranks, whose terms are scaled already.

    Raises:
        ValueError: shapes, devices, placements, ``side``, ``save`` or ``backend`` that do not fit, or a weight that requires
            a gradient.
        TypeError: dtypes that do not fit.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: GAIN, arXiv 2604.04516.

    """
    _check(x, weight, delta, bias, side, save)
    return _linear(x, weight, delta, bias, side, save, backend)


def gain_scale(x: Tensor, delta: Tensor, *, backend: str = "auto") -> Tensor:
    """``y = x * (1 + delta)`` over the last dimension, with one fused pass for both gradients.

    ::

        dx = dy * (1 + delta)        ddelta = sum over tokens of dy * x

    The gain around another linear map, such as a quantised one: scale its output, or its input.

    Args:
        x: [..., n], any strides; float64, float32, bfloat16 or float16. It is saved for backward when delta needs a gradient.
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
    return _scale(x, delta, backend)


def check_side_and_save(side: str, save: str) -> None:
    """Raise ValueError for a side or save that does not exist, or that do not go together."""
    if side not in SIDES:
        raise UsageError(f"side={side!r} is not one of {', '.join(map(repr, SIDES))}")
    if save not in SAVES:
        raise UsageError(f"save={save!r} is not one of {', '.join(map(repr, SAVES))}")
    if side == "input" and save == "output":
        raise ValueError("save='output' has no use on the input side, which saves x: use save='auto' or 'input'")


def _linear_sharding(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, side: str, save: str, backend: str
) -> tuple[str, int]:
    return "linear" if side == "output" else "linear_input", weight.shape[0]


def _linear_composite(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, side: str, save: str, backend: str
) -> Tensor:
    return reference.BY_SIDE[side](x, weight, delta, bias)


@entry(_linear_sharding, _linear_composite)
@gemm("weight is")
def _linear(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, side: str, save: str, backend: str
) -> Tensor:
    wants_grad = x.requires_grad or delta.requires_grad or (bias is not None and bias.requires_grad)
    if not (wants_grad and torch.is_grad_enabled()):
        op = raw.linear if side == "output" else raw.linear_input
        return call(op, x, cast_to(weight, x.dtype), delta, bias, backend)
    y: Tensor
    if side == "output" and save != "input" and delta.requires_grad:
        y, _ = KeepOutput.apply(x, weight, delta, bias, backend)
    else:
        y = KeepInput.apply(x, weight, delta, bias, side, backend)
    return y


def _scale_sharding(x: Tensor, delta: Tensor, backend: str) -> tuple[str, int]:
    return "scale", delta.shape[0]


def _scale_composite(x: Tensor, delta: Tensor, backend: str) -> Tensor:
    return reference.scale(x, delta)


@entry(_scale_sharding, _scale_composite)
def _scale(x: Tensor, delta: Tensor, backend: str) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
        y: Tensor = Scale.apply(x, delta, backend)
        return y
    return call(raw.scale, x, delta, backend)


def _check(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, side: str, save: str) -> None:
    check_side_and_save(side, save)
    check_frozen_map(x, weight, delta, bias)
    if side == "output":
        check_features(x, weight.shape[0], delta, "out_features on the output side")
    else:
        check_features(x, weight.shape[1], delta, "in_features on the input side")


class KeepOutput(Function):
    """``y = gain * (x @ W.T) + b`` that saves z. Returns (y, z); z is for autograd's own use."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """x [T, in], weight [out, in], delta [out], bias [out] -> y [T, out], z [T, out]. delta needs a gradient."""
        remember(ctx, x, delta, bias, backend)
        y, z = call(raw.linear_z, x, cast_to(weight, x.dtype), delta, bias, backend)
        needs_x = ctx.needs_input_grad[0]
        ctx.save_for_backward(z, weight if needs_x else None, delta if needs_x else None)
        return y, z

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None, dz_kept: Tensor | None) -> Gradients:
        """dy [T, out] -> dx, None, ddelta, dbias. dz_kept is not None only in a double backward."""
        z, weight, delta = ctx.saved_tensors
        weight = None if weight is None else cast_to(weight, z.dtype)
        if dz_kept is not None or differentiable():
            return _keep_output_composite(ctx, dy, dz_kept, z, weight, delta)
        if dy is None:
            return (None,) * 5
        dy = cast_to(dy, z.dtype)
        dx = None
        if weight is not None and ctx.needs_input_grad[0]:
            dz, ddelta = call(raw.backward, dy, z, delta, ctx.backend)
            dx = dz @ weight
        else:
            ddelta = call(raw.ddelta, dy, z, ctx.backend)
        return dx, None, cast_to(ddelta, ctx.delta_dtype), bias_gradient(ctx, dy), None


def _keep_output_composite(
    ctx: Any, dy: Tensor | None, dz_kept: Tensor | None, z: Tensor, weight: Tensor | None, delta: Tensor | None
) -> Gradients:
    dx = ddelta = dbias = None
    dz = dz_kept
    if dy is not None:
        ddelta = reference.ddelta(dy, z).to(ctx.delta_dtype)
        dbias = bias_gradient(ctx, dy)
        if delta is not None:
            scaled = reference.scale(dy, delta)
            dz = scaled if dz is None else dz + scaled
    if weight is not None and dz is not None:
        dx = dz @ weight
    return dx, None, ddelta, dbias, None


class KeepInput(Function):
    """Either side, saving x: ``y = gain * (x @ W.T) + b`` or ``y = (x * gain) @ W.T + b``.

    The output side computes z again in its backward's GEMM; the input side makes both gradients from dy @ W and x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        side: str,
        backend: str,
    ) -> Tensor:
        """x [T, in], weight [out, in], delta [out] or [in], bias [out] -> y [T, out]."""
        remember(ctx, x, delta, bias, backend)
        ctx.side, ctx.compute_dtype = side, x.dtype
        needs_x, _, needs_delta, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs_delta else None,
            weight if needs_x or needs_delta else None,
            delta if needs_x else None,
        )
        op = raw.linear if side == "output" else raw.linear_input
        return call(op, x, cast_to(weight, x.dtype), delta, bias, backend)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        """dy [T, out] -> dx, None, ddelta, dbias."""
        if dy is None:
            return (None,) * 6
        x, weight, delta = ctx.saved_tensors
        dx = ddelta = None
        if weight is not None:
            weight = cast_to(weight, ctx.compute_dtype)
            dy = cast_to(dy, ctx.compute_dtype)
            gradients = _output_side_gradients if ctx.side == "output" else _input_side_gradients
            dx, ddelta = gradients(dy, x, weight, delta, ctx.backend)
            ddelta = None if ddelta is None else cast_to(ddelta, ctx.delta_dtype)
        return dx, None, ddelta, bias_gradient(ctx, dy), None, None


def _output_side_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor, delta: Tensor | None, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, ddelta) of the output side; x is None when ddelta is not needed, delta is None when dx is not."""
    if differentiable():
        return (
            None if delta is None else reference.scale(dy, delta) @ weight,
            None if x is None else reference.ddelta_recompute(dy, x, weight),
        )
    if delta is None:
        return None, None if x is None else call(raw.ddelta_recompute, dy, x, weight, backend)
    if x is None:
        # (dy * gain) @ W is the input side's forward on the transposed weight
        return call(raw.linear_input, dy, weight.t(), delta, None, backend), None
    dz, ddelta = call(raw.backward_recompute, dy, x, weight, delta, backend)
    return dz @ weight, ddelta


def _input_side_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor, delta: Tensor | None, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, ddelta) of the input side; x is None when ddelta is not needed, delta is None when dx is not."""
    if differentiable():
        dxs = dy @ weight
        return (
            None if delta is None else reference.scale(dxs, delta),
            None if x is None else reference.ddelta(dxs, x),
        )
    if delta is None:
        return None, None if x is None else call(raw.ddelta_recompute, x, dy, weight.t(), backend)
    if x is None:
        # gain * (dy @ W) is the output side's forward on the transposed weight
        return call(raw.linear, dy, weight.t(), delta, None, backend), None
    return call(raw.backward_input, dy, x, weight, delta, backend)


class Scale(Function):
    """``y = x * gain`` over the last dimension; saves x only when delta needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, backend: str) -> Tensor:
        """x [T, n], delta [n] -> y [T, n]."""
        remember(ctx, x, delta, None, backend)
        needs_x, needs_delta, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_delta else None, delta if needs_x else None)
        return call(raw.scale, x, delta, backend)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        """dy [T, n] -> dx, ddelta."""
        if dy is None:
            return (None,) * 3
        x, delta = ctx.saved_tensors
        dx, ddelta = scale_gradients(dy, x, delta, ctx.backend)
        return dx, None if ddelta is None else cast_to(ddelta, ctx.delta_dtype), None


def scale_gradients(
    dy: Tensor, x: Tensor | None, delta: Tensor | None, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, ddelta) of ``y = x * gain``; x is None when ddelta is not needed, delta is None when dx is not."""
    if differentiable():
        return (
            None if delta is None else reference.scale(dy, delta),
            None if x is None else reference.ddelta(dy, x),
        )
    if delta is None:
        return None, None if x is None else call(raw.ddelta, dy, x, backend)
    if x is None:
        return call(raw.scale, dy, delta, backend), None
    return call(raw.backward, dy, x, delta, backend)
