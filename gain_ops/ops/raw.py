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

from gain_ops.backends import fakes
from gain_ops.ops.dispatch import Backend, implementation

P = ParamSpec("P")
R = TypeVar("R")

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
"""The function that each op runs."""

_library = torch.library.Library("gain_ops", "DEF")
_fakes: Backend = fakes  # mypy checks them as it checks a backend


def _op(schema: str, fake: Callable[..., R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as the op of its name; the op itself, typed as the function, takes its place."""

    def register(run: Callable[P, R]) -> Callable[P, R]:
        name = run.__name__
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
        # for every device: dispatch.py finds the backend that serves it
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gain_ops::{name}", lambda *args: fake(*args[:-1]), lib=_library)
        op: Callable[P, R] = getattr(torch.ops.gain_ops, name).default
        FUNCTIONS[op] = run
        return op

    return register


@_op("(Tensor x, Tensor delta, str backend) -> Tensor", _fakes.scale)
def scale(x: Tensor, delta: Tensor, backend: str) -> Tensor:
    return implementation(backend, x).scale(x, delta)


@_op("(Tensor x, Tensor weight, Tensor delta, Tensor? bias, str backend) -> Tensor", _fakes.linear)
def linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return implementation(backend, x).linear(x, weight, delta, bias)


@_op("(Tensor x, Tensor weight, Tensor delta, Tensor? bias, str backend) -> (Tensor y, Tensor z)", _fakes.linear_z)
def linear_z(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend, x).linear_z(x, weight, delta, bias)


@_op("(Tensor x, Tensor weight, Tensor delta, Tensor? bias, str backend) -> Tensor", _fakes.linear_input)
def linear_input(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return implementation(backend, x).linear_input(x, weight, delta, bias)


@_op("(Tensor dy, Tensor z, Tensor delta, str backend) -> (Tensor dz, Tensor ddelta)", _fakes.backward)
def backward(dy: Tensor, z: Tensor, delta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend, dy).backward(dy, z, delta)


@_op("(Tensor dy, Tensor z, str backend) -> Tensor", _fakes.ddelta)
def ddelta(dy: Tensor, z: Tensor, backend: str) -> Tensor:
    return implementation(backend, dy).ddelta(dy, z)


@_op(
    "(Tensor dy, Tensor x, Tensor weight, Tensor delta, str backend) -> (Tensor dz, Tensor ddelta)",
    _fakes.backward_recompute,
)
def backward_recompute(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend, dy).backward_recompute(dy, x, weight, delta)


@_op("(Tensor dy, Tensor x, Tensor weight, str backend) -> Tensor", _fakes.ddelta_recompute)
def ddelta_recompute(dy: Tensor, x: Tensor, weight: Tensor, backend: str) -> Tensor:
    return implementation(backend, dy).ddelta_recompute(dy, x, weight)


@_op(
    "(Tensor dy, Tensor x, Tensor weight, Tensor delta, str backend) -> (Tensor dx, Tensor ddelta)",
    _fakes.backward_input,
)
def backward_input(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend, dy).backward_input(dy, x, weight, delta)


@_op("(Tensor gate, Tensor? up, Tensor delta, str activation, str backend) -> Tensor", _fakes.glu)
def glu(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str, backend: str) -> Tensor:
    return implementation(backend, gate).glu(gate, up, delta, activation)


@_op(
    "(Tensor dh, Tensor gate, Tensor? up, Tensor delta, str activation, str backend) -> (Tensor dgate_up, Tensor ddelta)",
    _fakes.glu_backward,
)
def glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(backend, dh).glu_backward(dh, gate, up, delta, activation)


@_op("(Tensor dh, Tensor gate, Tensor? up, str activation, str backend) -> Tensor", _fakes.glu_ddelta)
def glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    return implementation(backend, dh).glu_ddelta(dh, gate, up, activation)


@_op("(Tensor x, Tensor weight, Tensor delta, float eps, str backend) -> (Tensor y, Tensor r)", _fakes.rms_norm)
def rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return implementation(backend, x).rms_norm(x, weight, delta, eps)


@_op(
    "(Tensor dy, Tensor x, Tensor weight, Tensor delta, Tensor r, str backend) -> (Tensor dx, Tensor ddelta)",
    _fakes.rms_norm_backward,
)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(backend, dy).rms_norm_backward(dy, x, weight, delta, r)


@_op("(Tensor residual, Tensor z, Tensor delta, Tensor? bias, str backend) -> Tensor", _fakes.add)
def add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return implementation(backend, z).add(residual, z, delta, bias)


@_op(
    "(Tensor residual, Tensor z, Tensor delta, Tensor? bias, Tensor weight, float eps, str backend)"
    " -> (Tensor h, Tensor y, Tensor r)",
    _fakes.add_rms_norm,
)
def add_rms_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(backend, z).add_rms_norm(residual, z, delta, bias, weight, eps)


@_op(
    "(Tensor dy, Tensor? dh, Tensor h, Tensor z, Tensor delta, Tensor weight, Tensor r, str backend)"
    " -> (Tensor dx, Tensor dz, Tensor ddelta)",
    _fakes.add_rms_norm_backward,
)
def add_rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(backend, dy).add_rms_norm_backward(dy, dh, h, z, delta, weight, r)


@_op(
    "(Tensor residual, Tensor z, Tensor delta, Tensor? bias, Tensor weight, Tensor? shift, float eps, str backend)"
    " -> (Tensor h, Tensor y, Tensor mean, Tensor r)",
    _fakes.add_layer_norm,
)
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


@_op(
    "(Tensor dy, Tensor? dh, Tensor h, Tensor z, Tensor delta, Tensor weight, Tensor mean, Tensor r, str backend)"
    " -> (Tensor dx, Tensor dz, Tensor ddelta)",
    _fakes.add_layer_norm_backward,
)
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


@_op(
    "(Tensor residual, Tensor z, Tensor delta, Tensor weight, float eps, str backend) -> (Tensor h, Tensor r)",
    _fakes.rms_norm_add,
)
def rms_norm_add(
    residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(backend, z).rms_norm_add(residual, z, delta, weight, eps)


@_op(
    "(Tensor dh, Tensor z, Tensor delta, Tensor weight, Tensor r, str backend) -> (Tensor dz, Tensor ddelta)",
    _fakes.rms_norm_add_backward,
)
def rms_norm_add_backward(
    dh: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation(backend, dh).rms_norm_add_backward(dh, z, delta, weight, r)
