"""Every raw op: schema, fakes with true strides and dtypes, dispatcher, no aliasing."""

import inspect
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gain_ops import reference
from gain_ops.backends import cuda, eager
from gain_ops.backends.interface import OPS
from gain_ops.kernels import backend as triton_backend
from gain_ops.ops import dispatch, raw

from support.parity import CALLS, laid_out, tensors

T, IN, OUT = 5, 6, 4


def _tensors(dtype: torch.dtype, layout: str) -> dict[str, Any]:
    return {
        name: laid_out(value, layout) if isinstance(value, Tensor) and value.dim() == 2 else value
        for name, value in tensors(T, IN, OUT, dtype).items()
    }


ARGUMENTS = {name: arguments for name, arguments in CALLS.items() if name in OPS}


def test_the_list_is_what_a_backend_offers() -> None:
    assert set(ARGUMENTS) == {call.split()[0] for call in CALLS} == set(OPS)
    assert {name for name, op in vars(raw).items() if isinstance(op, torch._ops.OpOverload)} == set(OPS)


@pytest.mark.parametrize("place", [reference, eager, triton_backend, cuda, raw], ids=lambda place: place.__name__)
def test_every_place_has_every_op_with_the_arguments_of_the_protocol(place: ModuleType) -> None:
    for name in OPS:
        _, *expected = inspect.signature(getattr(dispatch.Backend, name)).parameters
        assert hasattr(place, name), f"{place.__name__} has no {name}"
        if place is raw:
            arguments = getattr(raw, name)._schema.arguments
            assert [argument.name for argument in arguments] == [*expected, "backend"], name
        else:
            parameters = inspect.signature(getattr(place, name)).parameters.values()
            # a launcher may take its configuration beside them
            assert [p.name for p in parameters if p.default is p.empty] == expected, name


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", torch.float64),
        ("contiguous", torch.float32),
        ("transposed", torch.float16),
        ("expanded", torch.bfloat16),
    ],
)
def test_opcheck(name: str, dtype: torch.dtype, layout: str) -> None:
    given = _tensors(dtype, layout)
    arguments = [given[argument] for argument in ARGUMENTS[name]]
    torch.library.opcheck(getattr(raw, name), (*arguments, "eager"))
    if "bias" in ARGUMENTS[name]:
        without = [None if argument == "bias" else given[argument] for argument in ARGUMENTS[name]]
        torch.library.opcheck(getattr(raw, name), (*without, "eager"))


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_fakes_have_the_strides_and_dtypes_of_the_real_thing(name: str, backend: str, layout: str) -> None:
    given = _tensors(torch.float16, layout)
    arguments = [given[argument] for argument in ARGUMENTS[name]]
    real = getattr(raw, name)(*arguments, backend)
    with FakeTensorMode() as mode:
        fake = getattr(raw, name)(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments), backend)
    for r, f in zip(*(v if isinstance(v, tuple) else (v,) for v in (real, fake)), strict=True):
        assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device)


@pytest.mark.parametrize("key", ["CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1"])
def test_there_is_a_kernel_for_every_device_and_none_of_autograd(key: str) -> None:
    """dispatch.py's eager backend serves devices that no kernel here was written for."""
    for name in ARGUMENTS:
        overload = getattr(raw, name)
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(overload.name(), key)
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), f"Autograd{key}")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_inputs_are_left_alone(name: str) -> None:
    given = _tensors(torch.float32, "contiguous")
    before = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor)}
    for backend in ("eager", "triton"):
        getattr(raw, name)(*(given[argument] for argument in ARGUMENTS[name]), backend)
    assert all(torch.equal(given[key], value) for key, value in before.items())
