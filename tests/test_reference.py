"""reference.py against autograd of the equations themselves, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gain_ops import reference

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


@pytest.mark.parametrize("side", ["output", "input"])
def test_composite_is_the_reference(side: str) -> None:
    t = _tensors()
    delta, one = (t["delta_out"], reference.linear) if side == "output" else (t["delta_in"], reference.linear_input)
    flat = one(t["x"], t["weight"], delta, t["bias"])
    got = reference.composite(t["x"].view(1, T, IN), t["weight"], delta, t["bias"], side)
    torch.testing.assert_close(got, flat.view(1, T, OUT))
