"""The raw ops in torch's dispatcher: schemas, fakes with true strides, every device.

Each op is one function of reference.py, with the backend's name as its last argument: ``torch.ops.gain_ops.linear`` and so
on. The ops know nothing of autograd, which lives in the file of each family, such as linear.py: a plain ``define``/``impl``
costs a third of the host time of ``torch.library.custom_op`` with ``register_autograd``. No output aliases an input, and
every output is contiguous. The rules for DTensors are in sharding.py.

The dispatcher runs the functions below. The name of a function in this module is the op, ``torch.ops.gain_ops.<name>.default``;
mypy checks the op as the function that it runs. calling.py calls the function itself where nothing listens to the dispatcher.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gain_ops.backends.interface import FAKES
from gain_ops.ops.dispatch import gemms, implementation

P = ParamSpec("P")
R = TypeVar("R")

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""The function that each op runs."""

_library = torch.library.Library("gain_ops", "DEF")


def _op(run: Callable[P, R]) -> Callable[P, R]:
    """Register the decorated function as the op of its name; the op itself, typed as the function, takes its place."""
    name = run.__name__
    schema = torch.library.infer_schema(run, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    # for every device: dispatch.py finds the backend that serves it
    _library.impl(name, run, "CompositeExplicitAutograd")
    fake = getattr(FAKES, name)
    torch.library.register_fake(f"gain_ops::{name}", lambda *args: fake(*args[:-1]), lib=_library)
    op: Callable[P, R] = getattr(torch.ops.gain_ops, name).default
    FUNCTIONS[op] = run
    return op


@_op
def scale(x: Tensor, delta: Tensor, backend: str) -> Tensor:
    return implementation(backend, x).scale(x, delta)


@_op
def linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return gemms("linear", backend, x, weight).linear(x, weight, delta, bias)


@_op
def linear_z(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return gemms("linear_z", backend, x, weight).linear_z(x, weight, delta, bias)


@_op
def linear_input(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return implementation(backend, x).linear_input(x, weight, delta, bias)


@_op
def backward(dy: Tensor, z: Tensor, delta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend, dy).backward(dy, z, delta)


@_op
def ddelta(dy: Tensor, z: Tensor, backend: str) -> Tensor:
    return implementation(backend, dy).ddelta(dy, z)


@_op
def backward_recompute(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return gemms("backward_recompute", backend, dy, weight).backward_recompute(dy, x, weight, delta)


@_op
def ddelta_recompute(dy: Tensor, x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return gemms("ddelta_recompute", backend, dy, weight).ddelta_recompute(dy, x, weight)


@_op
def backward_input(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return gemms("backward_input", backend, dy, weight).backward_input(dy, x, weight, delta)


@_op
def glu(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str, backend: str) -> Tensor:
    return implementation(backend, gate).glu(gate, up, delta, activation)


@_op
def glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(backend, dh).glu_backward(dh, gate, up, delta, activation)


@_op
def glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    return implementation(backend, dh).glu_ddelta(dh, gate, up, activation)


@_op
def rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend, x).rms_norm(x, weight, delta, eps)


@_op
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(backend, dy).rms_norm_backward(dy, x, weight, delta, r)


@_op
def add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return implementation(backend, z).add(residual, z, delta, bias)


@_op
def add_rms_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(backend, z).add_rms_norm(residual, z, delta, bias, weight, eps)


@_op
def add_rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(backend, dy).add_rms_norm_backward(dy, dh, h, z, delta, weight, r)


@_op
def add_layer_norm(
    residual: Tensor,
    z: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation(backend, z).add_layer_norm(residual, z, delta, bias, weight, shift, eps)


@_op
def add_layer_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    z: Tensor,
    delta: Tensor,
    weight: Tensor,
    mean: Tensor,
    r: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(backend, dy).add_layer_norm_backward(dy, dh, h, z, delta, weight, mean, r)


@_op
def rms_norm_add(
    residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(backend, z).rms_norm_add(residual, z, delta, weight, eps)


@_op
def rms_norm_add_backward(
    dh: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(backend, dh).rms_norm_add_backward(dh, z, delta, weight, r)


@_op
def grouped_mm(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, backend: str) -> Tensor:
    return implementation(backend, x).grouped_mm(x, weight, bias, offsets)


@_op
def grouped_scale(x: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor, backend: str) -> Tensor:
    return implementation(backend, x).grouped_scale(x, delta, bias, offsets)


@_op
def grouped_backward(dy: Tensor, z: Tensor, delta: Tensor, offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend, dy).grouped_backward(dy, z, delta, offsets)


@_op
def grouped_ddelta(dy: Tensor, z: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return implementation(backend, dy).grouped_ddelta(dy, z, offsets)


@_op
def grouped_glu(
    gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str, backend: str
) -> Tensor:
    return implementation(backend, gate).grouped_glu(gate, up, delta, offsets, activation)


@_op
def grouped_glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(backend, dh).grouped_glu_backward(dh, gate, up, delta, offsets, activation)


@_op
def grouped_glu_ddelta(
    dh: Tensor, gate: Tensor, up: Tensor | None, offsets: Tensor, activation: str, backend: str
) -> Tensor:
    return implementation(backend, dh).grouped_glu_ddelta(dh, gate, up, offsets, activation)


@_op
def combine(
    z: Tensor, delta: Tensor, bias: Tensor | None, weights: Tensor, order: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    return implementation(backend, z).combine(z, delta, bias, weights, order, offsets)


@_op
def combine_backward(
    dy: Tensor,
    z: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(backend, dy).combine_backward(dy, z, delta, bias, weights, order, offsets)
