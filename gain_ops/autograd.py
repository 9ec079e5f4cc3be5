"""What is saved for backward, and which kernel computes which gradient: three autograd Functions, one a way of keeping.

    KeepOutput   output side   keeps z [T, out]   one more activation, the frozen linear's two GEMMs
    KeepInput    output side   keeps x [T, in]    no new byte where x is alive anyway, a third GEMM
                 input side    keeps x [T, in]    the same two GEMMs
    Scale        no GEMM       keeps x [T, n]     round a linear map that is not ours

Beside it an alias of W (as the caller's own tensor: never a copy, under autocast neither) and delta. A gradient that nobody
needs is not computed and nothing is kept for it: only delta -> no dx GEMM and no W; only x -> no activation at all.

``compute_dtype`` is autocast's dtype or None: W is cast inside, forward and backward, so that no cast copy outlives the call.
Double backward recomputes with reference.py's differentiable lines; KeepOutput returns z as a second output for that reason:
a saved output carries the graph back to x.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gain_ops import ops, reference

Gradients = tuple[Tensor | None, ...]


# asked once: torch.compile cannot trace the question in torch 2.10
_AUTOCAST_TYPES = tuple(name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name))


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; never for one that has none, such as meta."""
    return device_type in _AUTOCAST_TYPES and torch.is_autocast_enabled(device_type)


def outside_autocast(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Run a backward with autocast off: a backward called under autocast would round fp32 GEMMs otherwise."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Gradients:
        if autocast_enabled(ctx.device_type):
            with torch.autocast(ctx.device_type, enabled=False):
                return backward(ctx, *grads)
        return backward(ctx, *grads)

    return run


def differentiable() -> bool:
    """Whether this backward is itself being recorded (create_graph=True); a traced backward never is."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _bias_gradient(ctx: Any, dy: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[3]:
        return None
    return dy.sum(0, dtype=reference.accumulation_dtype(dy.dtype)).to(ctx.bias_dtype)


def _remember(ctx: Any, x: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> None:
    ctx.set_materialize_grads(False)
    ctx.device_type = x.device.type
    ctx.delta_dtype = delta.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.backend = backend


class KeepOutput(Function):
    """``y = gain * (x @ W.T) + b`` that keeps z. Returns (y, z); z is for autograd's own use."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """x [T, in], weight [out, in], delta [out], bias [out] -> y [T, out], z [T, out]. delta needs a gradient."""
        _remember(ctx, x, delta, bias, backend)
        ctx.compute_dtype = compute_dtype
        y, z = ops.linear_z(x, _cast(weight, compute_dtype), delta, bias, backend)
        needs_x = ctx.needs_input_grad[0]
        ctx.save_for_backward(z, weight if needs_x else None, delta if needs_x else None)
        return y, z

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None, dz_kept: Tensor | None) -> Gradients:
        """dy [T, out] -> dx, None, ddelta, dbias. dz_kept comes only from a double backward."""
        z, weight, delta = ctx.saved_tensors
        weight = None if weight is None else _cast(weight, ctx.compute_dtype)
        if dz_kept is not None or differentiable():
            return _keep_output_composite(ctx, dy, dz_kept, z, weight, delta)
        if dy is None:
            return (None,) * 6
        dy = dy.to(z.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dz, ddelta = ops.backward(dy, z, delta, ctx.backend)
            dx = dz @ weight
        else:
            ddelta = ops.ddelta(dy, z, ctx.backend)
        return dx, None, ddelta.to(ctx.delta_dtype), _bias_gradient(ctx, dy), None, None


def _keep_output_composite(
    ctx: Any, dy: Tensor | None, dz_kept: Tensor | None, z: Tensor, weight: Tensor | None, delta: Tensor | None
) -> Gradients:
    dx = ddelta = dbias = None
    dz = dz_kept
    if dy is not None:
        ddelta = reference.ddelta(dy, z).to(ctx.delta_dtype)
        dbias = _bias_gradient(ctx, dy)
        if delta is not None:
            scaled = reference.composite_scale(dy, delta)
            dz = scaled if dz is None else dz + scaled
    if weight is not None and dz is not None:
        dx = dz @ weight
    return dx, None, ddelta, dbias, None, None


class KeepInput(Function):
    """Either side, keeping x: ``y = gain * (x @ W.T) + b`` or ``y = (x * gain) @ W.T + b``.

    The output side computes z again in its backward's epilogue; the input side makes both gradients from dy @ W and x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype | None,
        side: str,
        backend: str,
    ) -> Tensor:
        """x [T, in], weight [out, in], delta [out] or [in], bias [out] -> y [T, out]."""
        _remember(ctx, x, delta, bias, backend)
        ctx.compute_dtype = compute_dtype
        ctx.side = side
        needs_x, _, needs_delta, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs_delta else None,
            weight if needs_x or needs_delta else None,
            delta if needs_x else None,
        )
        op = ops.linear if side == "output" else ops.linear_input
        y: Tensor = op(x, _cast(weight, compute_dtype), delta, bias, backend)
        return y

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        """dy [T, out] -> dx, None, ddelta, dbias."""
        if dy is None:
            return (None,) * 7
        x, weight, delta = ctx.saved_tensors
        dx = ddelta = None
        if weight is not None:
            weight = _cast(weight, ctx.compute_dtype)
            dy = dy.to(weight.dtype)
            gradients = _output_side_gradients if ctx.side == "output" else _input_side_gradients
            dx, ddelta = gradients(dy, x, weight, delta, ctx.backend)
            ddelta = None if ddelta is None else ddelta.to(ctx.delta_dtype)
        return dx, None, ddelta, _bias_gradient(ctx, dy), None, None, None


def _output_side_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor, delta: Tensor | None, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, ddelta) of the output side; x is None when ddelta is not wanted, delta is None when dx is not."""
    if differentiable():
        return (
            None if delta is None else reference.composite_scale(dy, delta) @ weight,
            None if x is None else reference.ddelta_recompute(dy, x, weight),
        )
    if x is None:
        # (dy * gain) @ W is the input side's forward on the transposed weight
        return ops.linear_input(dy, weight.t(), delta, None, backend), None
    if delta is None:
        return None, ops.ddelta_recompute(dy, x, weight, backend)
    dz, ddelta = ops.backward_recompute(dy, x, weight, delta, backend)
    return dz @ weight, ddelta


def _input_side_gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor, delta: Tensor | None, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, ddelta) of the input side; x is None when ddelta is not wanted, delta is None when dx is not."""
    if differentiable():
        dxs = dy @ weight
        return (
            None if delta is None else reference.composite_scale(dxs, delta),
            None if x is None else reference.ddelta(dxs, x),
        )
    if x is None:
        # gain * (dy @ W) is the output side's forward on the transposed weight
        return ops.linear(dy, weight.t(), delta, None, backend), None
    if delta is None:
        return None, ops.ddelta_recompute(x, dy, weight.t(), backend)
    dx, ddelta = ops.backward_input(dy, x, weight, delta, backend)
    return dx, ddelta


class Scale(Function):
    """``y = x * gain`` over the last dimension; keeps x only when delta needs a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, backend: str) -> Tensor:
        """x [T, n], delta [n] -> y [T, n]."""
        _remember(ctx, x, delta, None, backend)
        needs_x, needs_delta, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_delta else None, delta if needs_x else None)
        y: Tensor = ops.scale(x, delta, backend)
        return y

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        """dy [T, n] -> dx, ddelta."""
        if dy is None:
            return (None,) * 3
        x, delta = ctx.saved_tensors
        needs_x, needs_delta, _ = ctx.needs_input_grad
        dx = ddelta = None
        if differentiable():
            if needs_x:
                dx = reference.composite_scale(dy, delta)
            if needs_delta:
                ddelta = reference.ddelta(dy, x)
        elif needs_x and needs_delta:
            dx, ddelta = ops.backward(dy, x, delta, ctx.backend)
        elif needs_delta:
            ddelta = ops.ddelta(dy, x, ctx.backend)
        elif needs_x:
            dx = ops.scale(dy, delta, ctx.backend)
        return dx, None if ddelta is None else ddelta.to(ctx.delta_dtype), None
