"""The gain on the way into the residual stream: the public functions and their autograd Functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gain_ops import reference
from gain_ops.ops import raw
from gain_ops.ops.arguments import check_device, check_features, check_floating, flatten
from gain_ops.ops.autograd import Gradients, bias_gradient, cast_to, differentiable, outside_autocast, remember
from gain_ops.ops.calling import call
from gain_ops.ops.entering import entry
from gain_ops.ops.linear import scale_gradients
from gain_ops.ops.rms_norm import check_norm_weight


def gain_add(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    r"""The output of a projection, scaled by its gain, added to the residual stream, ``gain = 1 + delta``, in one pass.

    ::

        h         = residual + gain * z + bias
        dresidual = dh           dz = dh * gain           ddelta = sum over tokens of dh * z

    z is what the frozen projection makes (o_proj, down_proj), without its bias. So the gain is the output side of that
    projection, in a pass that a frozen model makes as well. Absorbing is ``W <- gain[:, None] * W``.

    Args:
        residual: [..., n], any strides; float64, float32, bfloat16 or float16.
        z: [..., n] in residual's dtype, or in a narrower one (as under autocast).
        delta: [n], any floating dtype.
        bias: [n] or None; the projection's own bias, which the gain does not scale.
        backend: as in gain_linear.

    Returns:
        h [..., n] in residual's dtype, computed in float32 (float64 for float64) and rounded once. Autocast changes nothing.

    Saved for backward: z, if delta needs a gradient, and nothing else of its size.

    Raises:
        ValueError: shapes or devices that do not fit, or an unknown backend.
        TypeError: dtypes that do not fit.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: GAIN, arXiv 2604.04516.

    """
    _check(residual, z, delta, bias)
    return _add(residual, z, delta, bias, backend)


def gain_add_rms_norm(
    residual: Tensor,
    z: Tensor,
    delta: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""gain_add and the RMSNorm that reads the stream next, in one pass each way: ``gain = 1 + delta``.

    ::

        h         = residual + gain * z + bias                r = 1 / sqrt(mean(h^2) + eps)
        y         = n * weight,                               n = r * h
        dresidual = dh + r * (v - n * mean(v * n)),           v = dy * weight
        dz        = dresidual * gain                          ddelta = sum over tokens of dresidual * z

    dh is the gradient that reaches h through the residual stream, dy the one through the norm. In a decoder layer that norms
    before it computes (Llama, Qwen), z is o_proj's output and the norm is the FFN's, or z is down_proj's output and the norm
    is that of the next layer's attention, or the model's last.

    Args:
        residual: [..., n], any strides; float64, float32, bfloat16 or float16.
        z: [..., n] in residual's dtype, or in a narrower one (as under autocast); a projection's output without its bias.
        delta: [n], any floating dtype.
        weight: [n], any floating dtype, frozen. For a norm that multiplies by one plus its weight (Gemma) give 1 + weight.
        eps: added to the mean square.
        bias: [n] or None; the projection's own bias, which the gain does not scale.
        backend: as in gain_linear.

    Returns:
        h and y, [..., n] each in residual's dtype, computed in float32 (float64 for float64). h is rounded once, and y, the
        norm of this rounded h, once more. Autocast changes nothing.

    Saved for backward: h, r (one number a token), and z if delta needs a gradient. A frozen model saves h as well.

    Raises:
        ValueError: shapes or devices that do not fit, a weight that requires a gradient, or an unknown backend.
        TypeError: dtypes that do not fit.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: RMSNorm, arXiv 1910.07467; GAIN, arXiv 2604.04516.

    """
    _check(residual, z, delta, bias)
    check_floating(weight=weight)
    check_norm_weight(residual, delta.shape[0], weight)
    return _add_norm(residual, z, delta, bias, weight, None, eps, False, backend)


def gain_add_layer_norm(
    residual: Tensor,
    z: Tensor,
    delta: Tensor,
    weight: Tensor,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""gain_add and the LayerNorm that reads the stream next (GPT-2, OPT), in one pass each way: ``gain = 1 + delta``.

    ::

        h         = residual + gain * z + bias                r = 1 / sqrt(mean((h - mean(h))^2) + eps)
        y         = n * weight + norm_bias,                   n = r * (h - mean(h))
        dresidual = dh + r * (v - mean(v) - n * mean(v * n)), v = dy * weight
        dz        = dresidual * gain                          ddelta = sum over tokens of dresidual * z

    Args:
        residual: [..., n], any strides; float64, float32, bfloat16 or float16.
        z: [..., n] in residual's dtype, or in a narrower one (as under autocast); a projection's output without its bias.
        delta: [n], any floating dtype.
        weight: [n], any floating dtype, frozen.
        norm_bias: [n] or None, any floating dtype, frozen.
        eps: added to the variance.
        bias: [n] or None; the projection's own bias, which the gain does not scale.
        backend: as in gain_linear.

    Returns: as gain_add_rms_norm.

    Saved for backward: h, the mean and r (two numbers a token), and z if delta needs a gradient. A frozen model saves h too.

    Raises: as gain_add_rms_norm; ValueError also for a norm_bias that requires a gradient.

    Source: LayerNorm, arXiv 1607.06450; GAIN, arXiv 2604.04516.

    """
    _check(residual, z, delta, bias)
    n = delta.shape[0]
    check_floating(weight=weight)
    check_norm_weight(residual, n, weight)
    if norm_bias is not None:
        check_floating(norm_bias=norm_bias)
        check_norm_weight(residual, n, norm_bias, "norm_bias")
    return _add_norm(residual, z, delta, bias, weight, norm_bias, eps, True, backend)


def gain_rms_norm_add(
    residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    r"""A gain, the RMSNorm of what it scales, and the add to the residual stream, in one pass each way: ``gain = 1 + delta``.

    ::

        h         = residual + n * weight                     s = gain * z,   r = 1 / sqrt(mean(s^2) + eps),   n = r * s
        ds        = r * (v - n * mean(v * n)),                v = dh * weight
        dresidual = dh           dz = ds * gain               ddelta = sum over tokens of ds * z

    For layers that norm what attention and the FFN return (Gemma 2 and 3, OLMo 2, GLM 4): z is o_proj's or down_proj's output,
    and the gain is that projection's output side, before the norm. Absorbing is ``W <- gain[:, None] * W``.

    Args:
        residual: [..., n], any strides; float64, float32, bfloat16 or float16.
        z: [..., n] in residual's dtype, or in a narrower one (as under autocast); the projection has no bias.
        delta: [n], any floating dtype.
        weight: [n], any floating dtype, frozen. For a norm that multiplies by one plus its weight (Gemma) give 1 + weight.
        eps: added to the mean square.
        backend: as in gain_linear.

    Returns:
        h [..., n] in residual's dtype, computed in float32 (float64 for float64) and rounded once. Autocast changes nothing.

    Saved for backward: z, and r, one number a token.

    Raises: as gain_add_rms_norm.

    Source: RMSNorm, arXiv 1910.07467; GAIN, arXiv 2604.04516.

    """
    _check(residual, z, delta, None)
    check_floating(weight=weight)
    check_norm_weight(residual, delta.shape[0], weight)
    return _rms_norm_add(residual, z, delta, weight, eps, backend)


def _check(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None) -> None:
    check_floating(residual=residual, z=z, delta=delta)
    if z.shape != residual.shape:
        raise ValueError(f"z must have residual's shape {tuple(residual.shape)}, got {tuple(z.shape)}")
    if torch.promote_types(residual.dtype, z.dtype) != residual.dtype:
        raise TypeError(f"z must be {residual.dtype} as residual is, or narrower, got {z.dtype}: cast one of them")
    check_device(residual, z, "z")
    n = z.shape[-1] if z.dim() else 0
    check_features(residual, n, delta, "z.shape[-1]")
    if bias is not None:
        check_floating(bias=bias)
        if bias.shape != (n,):
            raise ValueError(f"bias must be [{n}] (z.shape[-1]) or None, got shape {tuple(bias.shape)}")
        check_device(residual, bias, "bias")


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _add_sharding(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> tuple[str, int]:
    return "add", delta.shape[0]


def _add_composite(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return reference.add(residual, z, delta, bias)


@entry(_add_sharding, _add_composite)
def _add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    z = flatten(z)
    if _wants_grad(residual, z, delta, bias):
        h: Tensor = Add.apply(residual, z, delta, bias, backend)
        return h
    return call(raw.add, residual, cast_to(z, residual.dtype), delta, bias, backend)


def _norm_sharding(
    residual: Tensor,
    z: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
    centred: bool,
    backend: str,
) -> tuple[str, int]:
    # the rule of an RMSNorm has no shift: there this None goes with the options
    return "add_layer_norm" if centred else "add_rms_norm", delta.shape[0]


def _norm_composite(
    residual: Tensor,
    z: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
    centred: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if centred:
        return reference.add_layer_norm(residual, z, delta, bias, weight, shift, eps)[:2]
    return reference.add_rms_norm(residual, z, delta, bias, weight, eps)[:2]


@entry(_norm_sharding, _norm_composite)
def _add_norm(
    residual: Tensor,
    z: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
    centred: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    z = flatten(z)
    if _wants_grad(residual, z, delta, bias):
        h, y = AddNorm.apply(residual, z, delta, bias, weight, shift, eps, centred, backend)
        return h, y
    h, y, *_ = _add_norm_op(residual, z, delta, bias, weight, shift, eps, centred, backend)
    return h, y


def _norm_add_sharding(
    residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[str, int]:
    return "rms_norm_add", delta.shape[0]


def _norm_add_composite(residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    return reference.rms_norm_add(residual, z, delta, weight, eps)[0]


@entry(_norm_add_sharding, _norm_add_composite)
def _rms_norm_add(residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    z = flatten(z)
    if _wants_grad(residual, z, delta):
        h: Tensor = RmsNormAdd.apply(residual, z, delta, weight, eps, backend)
        return h
    return call(raw.rms_norm_add, residual, cast_to(z, residual.dtype), delta, weight, eps, backend)[0]


class Add(Function):
    """``h = residual + gain * z + b``; saves z only when delta needs a gradient."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        """residual and z [T, n], delta and bias [n] -> h [T, n]."""
        _remember(ctx, residual, z, delta, bias, backend)
        _, needs_z, needs_delta, *_ = ctx.needs_input_grad
        ctx.save_for_backward(z if needs_delta else None, delta if needs_z else None)
        return call(raw.add, residual, cast_to(z, residual.dtype), delta, bias, backend)

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dh: Tensor | None) -> Gradients:
        """dh [T, n] -> dresidual, dz, ddelta, dbias."""
        if dh is None:
            return (None,) * 5
        return *_add_gradients(ctx, dh, *ctx.saved_tensors), None


_NormBackward = Callable[..., tuple[Tensor, Tensor, Tensor]]


class AddNorm(Function):
    """``h = residual + gain * z + b`` and a norm of h; saves h, the norm's statistics, and z when delta needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        z: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        shift: Tensor | None,
        eps: float,
        centred: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """residual and z [T, n], delta, bias, weight and shift [n] -> h and y [T, n]; a LayerNorm is centred."""
        _remember(ctx, residual, z, delta, bias, backend)
        ctx.eps, ctx.centred = eps, centred
        h, y, *statistics = _add_norm_op(residual, z, delta, bias, weight, shift, eps, centred, backend)
        ctx.save_for_backward(h, z if ctx.needs_input_grad[2] else None, delta, weight, *statistics)
        return h, y

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dh: Tensor | None, dy: Tensor | None) -> Gradients:
        """dh and dy [T, n] -> dresidual, dz, ddelta, dbias."""
        h, z, delta, weight, *statistics = ctx.saved_tensors
        needs_residual, needs_z, needs_delta, *_ = ctx.needs_input_grad
        nothing = (None,) * 5
        if dy is None:
            if dh is None:
                return *(None,) * 4, *nothing
            return *_add_gradients(ctx, dh, z, delta if needs_z else None), *nothing
        # z is read for ddelta alone: where nobody wants that, h, which is read anyway, stands in its place
        z = h if z is None else cast_to(z, h.dtype)
        if differentiable():
            # the statistics depend on h: they are computed again, so that the graph reaches h through them
            statistics = _statistics(h.to(statistics[0].dtype), ctx.eps, ctx.centred)
            gradients: _NormBackward = (
                reference.add_layer_norm_backward if ctx.centred else reference.add_rms_norm_backward
            )
            dx, dz, ddelta = gradients(dy, dh, h, z, delta, weight, *statistics)
        else:
            op: _NormBackward = raw.add_layer_norm_backward if ctx.centred else raw.add_rms_norm_backward
            dx, dz, ddelta = op(dy, dh, h, z, delta, weight, *statistics, ctx.backend)
        return (
            dx if needs_residual else None,
            cast_to(dz, ctx.z_dtype) if needs_z else None,
            ddelta.to(ctx.delta_dtype) if needs_delta else None,
            bias_gradient(ctx, dx),
            *nothing,
        )


def _add_norm_op(
    residual: Tensor,
    z: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
    centred: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """h, y, then the statistics: mean and r of a LayerNorm, r of an RMSNorm."""
    z = cast_to(z, residual.dtype)
    if centred:
        return call(raw.add_layer_norm, residual, z, delta, bias, weight, shift, eps, backend)
    return call(raw.add_rms_norm, residual, z, delta, bias, weight, eps, backend)


def _statistics(h: Tensor, eps: float, centred: bool) -> list[Tensor]:
    """What ``_add_norm_op`` returns after y, differentiable."""
    mean = [h.mean(1)] if centred else []
    away = h - mean[0][:, None] if centred else h
    return [*mean, reference.inverse_rms(away, eps)]


class RmsNormAdd(Function):
    """``h = residual + r * gain * z * weight``; saves z and r."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float, backend: str
    ) -> Tensor:
        """residual and z [T, n], delta and weight [n] -> h [T, n]."""
        _remember(ctx, residual, z, delta, None, backend)
        ctx.eps = eps
        h, r = call(raw.rms_norm_add, residual, cast_to(z, residual.dtype), delta, weight, eps, backend)
        if any(ctx.needs_input_grad[1:3]):
            ctx.save_for_backward(z, delta, weight, r)
        return h

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dh: Tensor | None) -> Gradients:
        """dh [T, n] -> dresidual, dz, ddelta."""
        needs_residual, needs_z, needs_delta, *_ = ctx.needs_input_grad
        dz = ddelta = None
        if dh is not None and (needs_z or needs_delta):
            z, delta, weight, r = ctx.saved_tensors
            z = cast_to(z, dh.dtype)
            if differentiable():
                # r depends on z and delta: r is computed again, so that the graph reaches them through it
                r = reference.inverse_rms(reference.scale(z.to(r.dtype), delta), ctx.eps)
                dz, ddelta = reference.rms_norm_add_backward(dh, z, delta, weight, r)
            else:
                dz, ddelta = call(raw.rms_norm_add_backward, dh, z, delta, weight, r, ctx.backend)
        return (
            dh if needs_residual else None,
            cast_to(dz, ctx.z_dtype) if dz is not None and needs_z else None,
            ddelta.to(ctx.delta_dtype) if ddelta is not None and needs_delta else None,
            None,
            None,
            None,
        )


def _remember(ctx: Any, residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> None:
    remember(ctx, residual, delta, bias, backend)
    ctx.z_dtype = z.dtype


def _add_gradients(ctx: Any, dh: Tensor, z: Tensor | None, delta: Tensor | None) -> Gradients:
    """dresidual, dz, ddelta, dbias; z is None when ddelta is not needed, delta is None when dz is not."""
    dz, ddelta = scale_gradients(dh, None if z is None else cast_to(z, dh.dtype), delta, ctx.backend)
    return (
        dh if ctx.needs_input_grad[0] else None,
        None if dz is None else cast_to(dz, ctx.z_dtype),
        None if ddelta is None else ddelta.to(ctx.delta_dtype),
        bias_gradient(ctx, dh),
    )
