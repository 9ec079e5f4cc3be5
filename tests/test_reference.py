"""reference.py against autograd of the equations themselves, in fp64."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gain_ops import reference
from gain_ops.backends import eager

from support.parity import CALLS, run, tensors

T, IN, OUT = 7, 5, 4


def _tensors() -> dict[str, Tensor]:
    shapes = {"x": (T, IN), "weight": (OUT, IN), "delta_out": (OUT,), "delta_in": (IN,), "bias": (OUT,), "dy": (T, OUT)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def test_output_side_equals_the_linear_map_of_the_scaled_weight() -> None:
    t = _tensors()
    scaled = (1 + t["delta_out"])[:, None] * t["weight"]
    torch.testing.assert_close(
        reference.linear(t["x"], t["weight"], t["delta_out"], t["bias"]), F.linear(t["x"], scaled, t["bias"])
    )


def test_input_side_equals_the_linear_map_of_the_scaled_weight() -> None:
    t = _tensors()
    scaled = t["weight"] * (1 + t["delta_in"])
    torch.testing.assert_close(
        reference.linear_input(t["x"], t["weight"], t["delta_in"], t["bias"]), F.linear(t["x"], scaled, t["bias"])
    )


def test_output_side_gradients_equal_autograds() -> None:
    t = _tensors()
    x, delta = t["x"].requires_grad_(), t["delta_out"].requires_grad_()
    y = (1 + delta) * (x @ t["weight"].T) + t["bias"]
    dx, ddelta = torch.autograd.grad(y, (x, delta), t["dy"])
    x, delta = x.detach(), delta.detach()
    z = reference.linear_z(x, t["weight"], delta, t["bias"])[1]
    for dz, got in (
        reference.backward(t["dy"], z, delta),
        reference.backward_recompute(t["dy"], x, t["weight"], delta),
    ):
        torch.testing.assert_close(dz @ t["weight"], dx)
        torch.testing.assert_close(got, ddelta)
    torch.testing.assert_close(reference.ddelta(t["dy"], z), ddelta)
    torch.testing.assert_close(reference.ddelta_recompute(t["dy"], x, t["weight"]), ddelta)


def test_input_side_gradients_equal_autograds() -> None:
    t = _tensors()
    x, delta = t["x"].requires_grad_(), t["delta_in"].requires_grad_()
    y = (x * (1 + delta)) @ t["weight"].T + t["bias"]
    expected = torch.autograd.grad(y, (x, delta), t["dy"])
    got = reference.backward_input(t["dy"], x.detach(), t["weight"], delta.detach())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        reference.ddelta_recompute(x.detach(), t["dy"], t["weight"].t()), expected[1], msg="line (7) from line (4)"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_stay_in_the_accumulation_dtype(dtype: torch.dtype) -> None:
    t = {name: value.to(dtype) for name, value in _tensors().items()}
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert reference.ddelta(t["dy"], t["dy"]).dtype == accumulation
    assert reference.linear(t["x"], t["weight"], t["delta_out"].float(), t["bias"]).dtype == dtype


@pytest.mark.parametrize(
    "call", [call for call, arguments in CALLS.items() if {"delta_out", "delta_in"} & {*arguments}]
)
@pytest.mark.parametrize("place", [reference, eager], ids=lambda place: place.__name__)
def test_a_narrow_delta_is_widened_before_the_one_is_added(place: ModuleType, call: str) -> None:
    narrow = tensors(T, IN, OUT, torch.float32)
    narrow |= {name: narrow[name].bfloat16() for name in ("delta_out", "delta_in")}
    wide = narrow | {name: narrow[name].float() for name in ("delta_out", "delta_in")}
    for got, expected in zip(run(place, call, narrow), run(place, call, wide), strict=True):
        assert torch.equal(got, expected)


ANY_RANK = (
    "scale",
    "linear",
    "linear_z",
    "linear_input",
    "glu",
    "rms_norm",
    "add",
    "add_rms_norm",
    "add_layer_norm",
    "rms_norm_add",
)


@pytest.mark.parametrize("call", ANY_RANK)
def test_activations_of_any_rank(call: str) -> None:
    flat = tensors(6, IN, OUT, torch.float64)
    cubes = {name: v.view(2, 3, -1) if name in ("x", "dy", "z") else v for name, v in flat.items()}
    for got, expected in zip(run(reference, call, cubes), run(reference, call, flat), strict=True):
        assert torch.equal(got.flatten(0, 1), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [reference, eager], ids=lambda place: place.__name__)
def test_gain_and_bias_round_once(place: ModuleType, dtype: torch.dtype) -> None:
    x, weight = torch.randn(400, 8).to(dtype), torch.randn(500, 8).to(dtype)
    delta, bias = 0.3 * torch.randn(500), torch.randn(500).to(dtype)
    y, z = place.linear_z(x, weight, delta, bias)
    once = (z.double() * (1 + delta).double() + bias.double()).to(dtype)
    # rounded to fp32 between, a tie differs now and then; rounded to the activation's dtype, one in four would
    assert (y != once).double().mean() < 1e-3
