"""The gain in an RMSNorm: the public function and its autograd Function."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gain_ops import reference
from gain_ops.ops import raw
from gain_ops.ops.arguments import check_device, check_features, check_floating
from gain_ops.ops.autograd import Gradients, cast_to, differentiable, outside_autocast
from gain_ops.ops.calling import call
from gain_ops.ops.entering import entry


def gain_rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    r"""An RMSNorm with a gain on each feature of its output, ``gain = 1 + delta``, in one pass.

    ::

        r      = 1 / sqrt(mean(x^2) + eps)           n = r * x
        y      = n * weight * gain
        dx     = r * (v - n * mean(v * n)),          v = dy * weight * gain
        ddelta = sum over tokens of dy * n * weight

    It is one gain for the input side of every projection that reads y: q, k and v, or gate and up. Absorbing is
    ``weight <- weight * gain``.

    Args:
        x: [..., n], any strides; float64, float32, bfloat16 or float16.
        weight: [n], any floating dtype, frozen. For a norm that multiplies by one plus its weight (Gemma) give 1 + weight.
        delta: [n], any floating dtype.
        eps: added to the mean square.
        backend: as in gain_linear.

    Returns:
        y [..., n] in x's dtype, computed in float32 (float64 for float64) and rounded once. Autocast changes nothing.

    Saved for backward: x, and r, one number a token.

    Raises:
        ValueError: shapes or devices that do not fit, a weight that requires a gradient, or an unknown backend.
        TypeError: a dtype that is not floating.
        BackendUnavailable: a backend asked for by name that cannot run here.

    Source: RMSNorm, arXiv 1910.07467; GAIN, arXiv 2604.04516.

    """
    check_floating(x=x, weight=weight, delta=delta)
    n = x.shape[-1] if x.dim() else 0
    check_norm_weight(x, n, weight)
    check_features(x, n, delta, "x.shape[-1]")
    return _rms_norm(x, weight, delta, eps, backend)


def check_norm_weight(x: Tensor, n: int, weight: Tensor, name: str = "weight") -> None:
    """Raise ValueError unless weight is [n], on x's device and frozen; ``name`` is its own."""
    if weight.shape != (n,):
        raise ValueError(f"{name} must be [{n}] (x.shape[-1]), got shape {tuple(weight.shape)}")
    check_device(x, weight, name)
    if weight.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, but the norm of a gained layer is frozen: call {name}.requires_grad_(False) "
            "(gain_ops.apply does), or train it with torch.nn.functional.rms_norm"
        )


def _sharding(x: Tensor, weight: Tensor, delta: Tensor, eps: float, backend: str) -> tuple[str, int]:
    return "rms_norm", delta.shape[0]


def _composite(x: Tensor, weight: Tensor, delta: Tensor, eps: float, backend: str) -> Tensor:
    return reference.rms_norm(x, weight, delta, eps)[0]


@entry(_sharding, _composite)
def _rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float, backend: str) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad):
        y: Tensor = RmsNorm.apply(x, weight, delta, eps, backend)
        return y
    return call(raw.rms_norm, x, weight, delta, eps, backend)[0]


class RmsNorm(Function):
    """``y = r * x * weight * gain`` that saves x and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, delta: Tensor, eps: float, backend: str) -> Tensor:
        """x [T, n], weight [n], delta [n] -> y [T, n]."""
        ctx.set_materialize_grads(False)
        ctx.device_type, ctx.delta_dtype, ctx.eps, ctx.backend = x.device.type, delta.dtype, eps, backend
        y, r = call(raw.rms_norm, x, weight, delta, eps, backend)
        ctx.save_for_backward(x, weight, delta, r)
        return y

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        """dy [T, n] -> dx, None, ddelta."""
        if dy is None:
            return (None,) * 5
        x, weight, delta, r = ctx.saved_tensors
        if differentiable():
            # r depends on x: r is computed again, so that the graph reaches x through it
            r = reference.inverse_rms(x.to(r.dtype), ctx.eps)
            dx, ddelta = reference.rms_norm_backward(dy, x, weight, delta, r)
        else:
            dx, ddelta = call(raw.rms_norm_backward, dy, x, weight, delta, r, ctx.backend)
        needs_x, _, needs_delta = ctx.needs_input_grad[:3]
        return dx if needs_x else None, None, cast_to(ddelta, ctx.delta_dtype) if needs_delta else None, None, None
