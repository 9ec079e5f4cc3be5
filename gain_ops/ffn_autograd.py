"""What the gains of an FFN and of a norm save for backward: autograd.py's counterpart for lines (8) to (13).

    Glu        keeps gate and up (packed: the packed tensor) as the caller's own tensors; h is not kept by anybody
    RmsNorm    keeps x and r, one number a token

Both keep delta, and nothing where no gradient is wanted. Double backward goes through reference.py's differentiable lines.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gain_ops import ops, reference
from gain_ops.autograd import Gradients, differentiable, outside_autocast


class Glu(Function):
    """``h = act(gate) * up * gain``; with ``packed`` gate and up are the two halves of the first argument's rows."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str, packed: bool, backend: str
    ) -> Tensor:
        """gate [T, n] and up [T, n] or None, or packed [T, 2n] and None; delta [n] -> h [T, n]."""
        ctx.set_materialize_grads(False)
        ctx.device_type, ctx.delta_dtype = gate.device.type, delta.dtype
        ctx.activation, ctx.packed, ctx.backend = activation, packed, backend
        ctx.save_for_backward(gate, up, delta)
        h: Tensor = ops.glu(*halves(gate, up, packed), delta, activation, backend)
        return h

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dh: Tensor | None) -> Gradients:
        """dh [T, n] -> dgate, dup, ddelta."""
        if dh is None:
            return (None,) * 6
        gate, up, delta = ctx.saved_tensors
        g, u = halves(gate, up, ctx.packed)
        needs_gate, needs_up, needs_delta = ctx.needs_input_grad[:3]
        if differentiable():
            parts, ddelta = reference.composite_glu_backward(dh, g, u, delta, ctx.activation)
            dgate_up = torch.cat(parts, 1) if len(parts) == 2 else parts[0]
        elif needs_gate or needs_up:
            dgate_up, ddelta = ops.glu_backward(dh, g, u, delta, ctx.activation, ctx.backend)
        else:
            dgate_up, ddelta = None, ops.glu_ddelta(dh, g, u, ctx.activation, ctx.backend)
        dgate, dup = (None, None) if dgate_up is None else halves(dgate_up, None, up is not None)
        if ctx.packed:
            dgate, dup = dgate_up, None
        return (
            dgate if needs_gate else None,
            dup if needs_up else None,
            ddelta.to(ctx.delta_dtype) if needs_delta else None,
            None,
            None,
            None,
        )


class RmsNorm(Function):
    """``y = r * x * weight * gain`` that keeps x and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, delta: Tensor, eps: float, backend: str) -> Tensor:
        """x [T, n], weight [n], delta [n] -> y [T, n]."""
        ctx.set_materialize_grads(False)
        ctx.device_type, ctx.delta_dtype, ctx.eps, ctx.backend = x.device.type, delta.dtype, eps, backend
        y: Tensor
        y, r = ops.rms_norm(x, weight, delta, eps, backend)
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
            # r is x's too: it is made again, so that the graph reaches x through it
            r = torch.rsqrt(x.to(r.dtype).square().mean(1) + ctx.eps)
            dx, ddelta = reference.rms_norm_backward(dy, x, weight, delta, r)
        else:
            dx, ddelta = ops.rms_norm_backward(dy, x, weight, delta, r, ctx.backend)
        needs_x, _, needs_delta = ctx.needs_input_grad[:3]
        return dx if needs_x else None, None, ddelta.to(ctx.delta_dtype) if needs_delta else None, None, None


def halves(gate: Tensor, up: Tensor | None, packed: bool) -> tuple[Tensor, Tensor | None]:
    """gate and up as they are, or as views of the packed tensor."""
    if not packed:
        return gate, up
    n = gate.shape[1] // 2
    return gate[:, :n], gate[:, n:]
