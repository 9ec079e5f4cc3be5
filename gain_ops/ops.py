"""The raw ops in torch's dispatcher: schemas, fakes with true strides, CPU and CUDA. The only file that registers.

Each op is one function of reference.py, with the backend's name as its last argument: ``torch.ops.gain_ops.linear`` and so
on. They know nothing of autograd, which lives in autograd.py: a plain ``define``/``impl`` costs a third of the host time of
``torch.library.custom_op`` with ``register_autograd``. No output aliases an input, and every output is contiguous.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gain_ops import dispatch
from gain_ops.reference import accumulation_dtype

_library = torch.library.Library("gain_ops", "DEF")


def _empty(like: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _sums(like: Tensor, size: int | torch.SymInt) -> Tensor:
    return torch.empty((size,), dtype=accumulation_dtype(like.dtype), device=like.device)


def _register(schema: str, fake: Callable[..., Any]) -> Any:
    name = schema.split("(")[0]

    def run(*args: Any) -> Any:
        *tensors, backend = args
        return getattr(dispatch.implementation(backend, tensors[0]), name)(*tensors)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"gain_ops::{name}", fake, lib=_library)
    return getattr(torch.ops.gain_ops, name).default


_LINEAR = "(Tensor x, Tensor weight, Tensor delta, Tensor? bias, str backend)"

scale = _register(
    "scale(Tensor x, Tensor delta, str backend) -> Tensor",
    lambda x, delta, backend: _empty(x, *x.shape),
)
linear = _register(
    f"linear{_LINEAR} -> Tensor",
    lambda x, weight, delta, bias, backend: _empty(x, x.shape[0], weight.shape[0]),
)
linear_z = _register(
    f"linear_z{_LINEAR} -> (Tensor y, Tensor z)",
    lambda x, weight, delta, bias, backend: (
        _empty(x, x.shape[0], weight.shape[0]),
        _empty(x, x.shape[0], weight.shape[0]),
    ),
)
linear_input = _register(
    f"linear_input{_LINEAR} -> Tensor",
    lambda x, weight, delta, bias, backend: _empty(x, x.shape[0], weight.shape[0]),
)
backward = _register(
    "backward(Tensor dy, Tensor z, Tensor delta, str backend) -> (Tensor dz, Tensor ddelta)",
    lambda dy, z, delta, backend: (_empty(dy, *dy.shape), _sums(dy, dy.shape[1])),
)
ddelta = _register(
    "ddelta(Tensor dy, Tensor z, str backend) -> Tensor",
    lambda dy, z, backend: _sums(dy, dy.shape[1]),
)
backward_recompute = _register(
    "backward_recompute(Tensor dy, Tensor x, Tensor weight, Tensor delta, str backend) -> (Tensor dz, Tensor ddelta)",
    lambda dy, x, weight, delta, backend: (_empty(dy, *dy.shape), _sums(dy, dy.shape[1])),
)
ddelta_recompute = _register(
    "ddelta_recompute(Tensor dy, Tensor x, Tensor weight, str backend) -> Tensor",
    lambda dy, x, weight, backend: _sums(dy, dy.shape[1]),
)
backward_input = _register(
    "backward_input(Tensor dy, Tensor x, Tensor weight, Tensor delta, str backend) -> (Tensor dx, Tensor ddelta)",
    lambda dy, x, weight, delta, backend: (_empty(x, *x.shape), _sums(x, x.shape[1])),
)
