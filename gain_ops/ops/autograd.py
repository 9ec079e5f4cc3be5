"""What every autograd Function here shares: autocast, the casts, the notes on ctx."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gain_ops import reference

Gradients = tuple[Tensor | None, ...]


# asked once: torch.compile cannot trace the question in torch 2.10
_AUTOCAST_TYPES = tuple(name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name))


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for a device type; never for one that has none, such as meta."""
    return device_type in _AUTOCAST_TYPES and torch.is_autocast_enabled(device_type)


def outside_autocast(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Run a backward with autocast off: otherwise a backward called under autocast would round fp32 GEMMs."""

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


def gradients_of(
    composite: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor
) -> Gradients:
    """The gradients of ``composite(*inputs)`` in a backward that is being recorded, None where none is needed."""
    # a view has a node of its own: a delta from which z was made gets no gradient through z here
    own = [t.view_as(t) if t is not None and need else t for t, need in zip(inputs, needed, strict=True)]
    wanted = [t for t, need in zip(own, needed, strict=True) if t is not None and need]
    found = iter(torch.autograd.grad(composite(*own), wanted, dy, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def cast_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; torch is not called where the tensor has that dtype already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def bias_gradient(ctx: Any, dy: Tensor, place: int = 3) -> Tensor | None:
    """The gradient of a bias, by default the fourth input, or None where nobody needs it."""
    if not ctx.needs_input_grad[place]:
        return None
    return dy.sum(0, dtype=reference.accumulation_dtype(dy.dtype)).to(ctx.bias_dtype)


def remember(ctx: Any, x: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> None:
    """Note on ctx what a backward needs beside the tensors saved for it."""
    ctx.set_materialize_grads(False)
    ctx.device_type = x.device.type
    ctx.delta_dtype = delta.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.backend = backend
