"""Gains on the experts of a mixture: a linear map an expert, and the weighted sum of what a token's experts make.

    Product      z = x @ W[e].T + b[e]           saves an alias of the weight, no activation
    RowScale     y = gain[e] * z + b[e]          saves z, if delta needs a gradient
    Combine      y = sum of w * (gain[e] * z)    saves z, which the router's gradient needs as well

The GEMM is the vendor's, so a side of a linear map is two of them, one after the other. The gain in the experts' activation is
in glu.py. Where rows are sorted by expert, ``offsets`` are the ends of the experts' rows, as those of
torch.nn.functional.grouped_mm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gain_ops import reference
from gain_ops.ops import raw
from gain_ops.ops.arguments import check_device, check_expert_rows, check_floating, check_offsets
from gain_ops.ops.autograd import Gradients, cast_to, differentiable, gradients_of, outside_autocast, remember
from gain_ops.ops.calling import call
from gain_ops.ops.entering import entry, gemm
from gain_ops.reference import SIDES
from gain_ops.utils.errors import UsageError


def gain_grouped_linear(
    x: Tensor,
    weight: Tensor,
    delta: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    side: str = "output",
    backend: str = "auto",
) -> Tensor:
    r"""The frozen linear maps of a mixture's experts, each scaled by a learned diagonal, ``gain = 1 + delta``.

    ::

        side="output":   y[s] = gain[e] * (x[s] @ W[e].T) + b[e]        row s of expert e:  offsets[e-1] <= s < offsets[e]
        side="input":    y[s] = (x[s] * gain[e]) @ W[e].T + b[e]

        dx[s]     = (dy[s] * gain[e]) @ W[e]                 or  gain[e] * (dy[s] @ W[e])
        ddelta[e] = sum over the rows of e of dy[s] * z[s]   or  of (dy[s] @ W[e]) * x[s],      z[s] = x[s] @ W[e].T

    The GEMM is torch.nn.functional.grouped_mm, and one pass applies the gain. Where torch has none for the operands (float64,
    rows that are no multiple of 16 bytes, other devices), one GEMM an expert runs. dW is never formed.

    Args:
        x: [S, in_features], rows sorted by expert; float64, float32, bfloat16 or float16.
        weight: [E, out_features, in_features], x's dtype, any strides: for one stored as [E, in, out] give
            ``weight.transpose(1, 2)``, which is not copied. Frozen: it must not require a gradient.
        delta: [E, out_features] on the output side, [E, in_features] on the input side; any floating dtype, zeros at the start.
        offsets: [E] int32, not decreasing, at most S: the end of each expert's rows. An expert may have none.
        bias: [E, out_features] or None; any floating dtype. The gain does not scale it.
        side: which features the gain scales, "output" or "input".
        backend: as in gain_linear.

    Returns:
        y [S, out_features] in x's dtype (in autocast's dtype under autocast). Products with the gain run in float32 (float64
        for float64) and round once; what the GEMM makes is rounded before.

    Rows past offsets[-1] belong to nobody and may hold anything (expert parallelism leaves them uninitialised, as grouped_mm
    does): they are never read, and y and the gradient of x are zero there. ddelta of an expert without rows is zero. A sum
    over rows is added in a fixed order.

    Saved for backward: z [S, out] on the output side and x on the input side, if delta needs a gradient, and no other
    activation. Use gain_combine where a router's weights follow: it saves z for both.

    Raises:
        ValueError: shapes, devices, placements, ``side`` or ``backend`` that do not fit, or a weight that requires a gradient.
        TypeError: dtypes that do not fit.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: GAIN, arXiv 2604.04516.

    """
    _check_linear(x, weight, delta, offsets, bias, side)
    return _linear(x, weight, delta, bias, offsets, side, backend)


def gain_combine(
    z: Tensor,
    delta: Tensor,
    weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""The end of a mixture's layer: a gain an expert, and the weighted sum of a token's k experts, in one pass each way.

    ::

        y[t]      = sum over j of w[t, j] * (gain[e] * z[s] + b[e])          gain = 1 + delta,  order[s] = k * t + j
        dz[s]     = w[t, j] * gain[e] * dy[t]                                row s of expert e:  offsets[e-1] <= s < offsets[e]
        dw[t, j]  = sum over features of dy[t] * (gain[e] * z[s] + b[e])
        ddelta[e] = sum over the rows of e of w[t, j] * dy[t] * z[s]

    z is what the frozen down projections make (grouped_mm), without their bias, so the gain is their output side. The router's
    gradient dw needs z in a frozen model too: a gain here saves no new byte.

    Args:
        z: [T * k, n], rows sorted by expert; float64, float32, bfloat16 or float16.
        delta: [E, n], any floating dtype.
        weights: [T, k], the router's weights of each token's experts; any floating dtype.
        order: [T * k] int64, a permutation: the slot of each row of z, of the slots of ``weights.flatten()``. It is what
            ``torch.sort(experts.flatten())`` returns second.
        offsets: [E] int32, not decreasing, at most T * k: the end of each expert's rows.
        bias: [E, n] or None; the projections' own bias, which the gain does not scale.
        backend: as in gain_linear.

    Returns:
        y [T, n] in z's dtype, computed in float32 (float64 for float64) and rounded once; the terms are added in the order of
        j. Autocast changes nothing.

    Rows past offsets[-1] belong to nobody, as in gain_grouped_linear: their slots add nothing and have a zero gradient.

    Saved for backward: z and the weights, once, if delta or the weights need a gradient.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown backend.
        TypeError: dtypes that do not fit.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: GAIN, arXiv 2604.04516; sparsely-gated mixtures, arXiv 1701.06538.

    """
    _check_combine(z, delta, weights, order, offsets, bias)
    return _combine(weights, z, delta, bias, order, offsets, backend)


def _check_linear(x: Tensor, weight: Tensor, delta: Tensor, offsets: Tensor, bias: Tensor | None, side: str) -> None:
    if side not in SIDES:
        raise UsageError(f"side={side!r} is not one of {', '.join(map(repr, SIDES))}")
    check_offsets(x, offsets)
    experts = offsets.shape[0]
    if weight.dim() != 3 or weight.shape[0] != experts:
        raise ValueError(f"weight must be [E={experts}, out_features, in_features], got shape {tuple(weight.shape)}")
    _, out_features, in_features = weight.shape
    if x.shape[1] != in_features:
        raise ValueError(
            f"x must be [S, in_features={in_features}] for weight {tuple(weight.shape)}, got shape {tuple(x.shape)}"
        )
    if weight.requires_grad:
        raise ValueError(
            "weight requires a gradient, but the weight of gained experts is frozen and dW is never formed. "
            "Call weight.requires_grad_(False)."
        )
    check_floating(x=x, weight=weight, delta=delta)
    features = out_features if side == "output" else in_features
    check_expert_rows(x, experts, features, delta, "delta", f"the features of the {side} side")
    _check_bias(x, experts, out_features, bias)
    check_device(x, weight, "weight")


def _check_combine(
    z: Tensor, delta: Tensor, weights: Tensor, order: Tensor, offsets: Tensor, bias: Tensor | None
) -> None:
    check_floating(z=z, delta=delta, weights=weights)
    check_offsets(z, offsets)
    (rows, n), experts = z.shape, offsets.shape[0]
    check_expert_rows(z, experts, n, delta, "delta", "z.shape[1]")
    _check_bias(z, experts, n, bias)
    if weights.dim() != 2 or weights.numel() != rows:
        raise ValueError(f"weights must be [T, k] with T * k = {rows}, z's rows, got shape {tuple(weights.shape)}")
    if order.shape != (rows,):
        raise ValueError(f"order must be [{rows}], the slot of each row of z, got shape {tuple(order.shape)}")
    if order.dtype != torch.int64:
        raise TypeError(f"order must be int64, as torch.sort returns it, got {order.dtype}")
    check_device(z, weights, "weights")
    check_device(z, order, "order")


def _check_bias(x: Tensor, experts: int, features: int, bias: Tensor | None) -> None:
    if bias is not None:
        check_floating(bias=bias)
        check_expert_rows(x, experts, features, bias, "bias", "out_features")


def _linear_sharding(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor, side: str, backend: str
) -> tuple[str, int]:
    return f"grouped_linear_{side}", weight.shape[1]


def _linear_composite(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor, side: str, backend: str
) -> Tensor:
    return reference.grouped(x, weight, delta, bias, offsets, side)


@entry(_linear_sharding, _linear_composite)
@gemm("weight is")
def _linear(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor, side: str, backend: str
) -> Tensor:
    y: Tensor
    if side == "output":
        y = RowScale.apply(Product.apply(x, weight, None, offsets, backend), delta, bias, offsets, backend)
    else:
        y = Product.apply(RowScale.apply(x, delta, None, offsets, backend), weight, bias, offsets, backend)
    return y


# the weights come first: y has as many rows as they


def _combine_sharding(
    weights: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, order: Tensor, offsets: Tensor, backend: str
) -> tuple[str, int]:
    return "gain_combine", delta.shape[1]


def _combine_composite(
    weights: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, order: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    return reference.combine(z, delta, bias, weights, order, offsets)


@entry(_combine_sharding, _combine_composite)
def _combine(
    weights: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, order: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    y: Tensor = Combine.apply(z, delta, bias, weights, order, offsets, backend)
    return y


class Product(Function):
    """``z = x @ W[e].T + b[e]``; saves the weight as it is, never a cast copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, backend: str) -> Tensor:
        """x [S, in], weight [E, out, in], bias [E, out] -> z [S, out]."""
        ctx.set_materialize_grads(False)
        ctx.device_type, ctx.backend, ctx.compute_dtype = x.device.type, backend, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, offsets)
        return call(raw.grouped_mm, x, cast_to(weight, x.dtype), bias, offsets, backend)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dz: Tensor | None) -> Gradients:
        """dz [S, out] -> dx, None, dbias."""
        if dz is None:
            return (None,) * 5
        weight, offsets = ctx.saved_tensors
        dz = cast_to(dz, ctx.compute_dtype)
        dx = None
        if weight is not None:
            given = dz, cast_to(weight, dz.dtype).transpose(1, 2), None, offsets, ctx.backend
            dx = Product.apply(*given) if differentiable() else call(raw.grouped_mm, *given)
        return dx, None, _bias_gradient(ctx, dz, offsets), None, None


class RowScale(Function):
    """``y = gain[e] * x + b[e]``; saves x only when delta needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor, backend: str) -> Tensor:
        """x [S, n], delta and bias [E, n] -> y [S, n]."""
        remember(ctx, x, delta, bias, backend)
        needs_x, needs_delta, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_delta else None, delta if needs_x else None, offsets)
        return call(raw.grouped_scale, x, delta, bias, offsets, backend)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        """dy [S, n] -> dx, ddelta, dbias."""
        if dy is None:
            return (None,) * 5
        x, delta, offsets = ctx.saved_tensors
        dx = ddelta = None
        if differentiable():
            dx = None if delta is None else reference.grouped_scale(dy, delta, None, offsets)
            ddelta = None if x is None else reference.grouped_ddelta(dy, x, offsets)
        elif delta is None:
            ddelta = None if x is None else call(raw.grouped_ddelta, dy, x, offsets, ctx.backend)
        elif x is None:
            dx = call(raw.grouped_scale, dy, delta, None, offsets, ctx.backend)
        else:
            dx, ddelta = call(raw.grouped_backward, dy, x, delta, offsets, ctx.backend)
        ddelta = None if ddelta is None else cast_to(ddelta, ctx.delta_dtype)
        return dx, ddelta, _bias_gradient(ctx, dy, offsets), None, None


class Combine(Function):
    """``y = sum over j of w * (gain[e] * z + b[e])``; saves z and the weights as they are."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        order: Tensor,
        offsets: Tensor,
        backend: str,
    ) -> Tensor:
        """z [S, n], delta and bias [E, n], weights [T, k], order [S] -> y [T, n]."""
        remember(ctx, z, delta, bias, backend)
        ctx.weights_dtype = weights.dtype
        _, needs_delta, _, needs_weights, *_ = ctx.needs_input_grad
        ctx.save_for_backward(z if needs_delta or needs_weights else None, delta, bias, weights, order, offsets)
        return call(raw.combine, z, delta, bias, weights, order, offsets, backend)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        """dy [T, n] -> dz, ddelta, dbias, dweights."""
        if dy is None:
            return (None,) * 7
        z, delta, bias, weights, order, offsets = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        needs_z, needs_delta, needs_bias, needs_weights = needed
        if z is None:  # y is linear in z, and neither delta nor the weights need it: any z has the same gradients
            z = dy.new_zeros(1, 1).expand(order.shape[0], dy.shape[1])
        if differentiable():
            if needs_z and not z.requires_grad:
                z = z.requires_grad_()

            def composite(z: Tensor, delta: Tensor, bias: Tensor | None, weights: Tensor) -> Tensor:
                return reference.combine(z, delta, bias, weights, order, offsets)

            return *gradients_of(composite, (z, delta, bias, weights), needed, dy), *(None,) * 3
        dz = ddelta = dweights = dbias = None
        if needs_z or needs_delta or needs_weights:
            dz, ddelta, dweights = call(raw.combine_backward, dy, z, delta, bias, weights, order, offsets, ctx.backend)
        if needs_bias:  # the gradient of a delta where z is one
            ones = dy.new_ones(1, 1).expand_as(z)
            _, dbias, _ = call(raw.combine_backward, dy, ones, delta, bias, weights, order, offsets, ctx.backend)
        return (
            dz if needs_z else None,
            cast_to(ddelta, ctx.delta_dtype) if ddelta is not None and needs_delta else None,
            None if dbias is None else cast_to(dbias, ctx.bias_dtype),
            cast_to(dweights, ctx.weights_dtype) if dweights is not None and needs_weights else None,
            *(None,) * 3,
        )


def _bias_gradient(ctx: Any, dy: Tensor, offsets: Tensor) -> Tensor | None:
    """The sum over each expert's rows, of a bias that is the third input, or None where nobody needs it."""
    if not ctx.needs_input_grad[2]:
        return None
    ones = dy.new_ones(1, 1).expand_as(dy)
    if differentiable():
        sums = reference.grouped_ddelta(dy, ones, offsets)
    else:
        sums = call(raw.grouped_ddelta, dy, ones, offsets, ctx.backend)
    return cast_to(sums, ctx.bias_dtype)
