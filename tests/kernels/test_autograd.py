"""gain_linear and gain_scale with backend="triton", end to end: forward, backward, no worse than plain torch."""

import pytest
import torch
from torch import Tensor

from gain_ops import gain_linear, gain_scale, reference
from gain_ops.testing import assert_no_worse_than_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(("side", "save"), [("output", "output"), ("output", "input"), ("input", "auto")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", ["both", "x", "delta"])
def test_gradients(side: str, save: str, dtype: torch.dtype, needs: str) -> None:
    x, weight = torch.randn(3, 11, 32, device=DEVICE).to(dtype), (torch.randn(24, 32, device=DEVICE) / 6).to(dtype)
    delta = 0.3 * torch.randn(24 if side == "output" else 32, device=DEVICE)
    bias, dy = torch.randn(24, device=DEVICE).to(dtype), torch.randn(3, 11, 24, device=DEVICE).to(dtype)

    def run(function, *tensors: Tensor) -> list[Tensor]:
        x, weight, delta, bias, dy = tensors
        x = x.detach().requires_grad_(needs != "delta")
        delta = delta.detach().requires_grad_(needs != "x")
        y = function(x, weight, delta, bias)
        return [y.detach(), *torch.autograd.grad(y, [t for t in (x, delta) if t.requires_grad], dy)]

    tensors = (x, weight, delta, bias, dy)
    ours = run(lambda *t: gain_linear(*t, side=side, save=save, backend="triton"), *tensors)
    plain = run(reference.BY_SIDE[side], *tensors)
    truth = run(reference.BY_SIDE[side], *(t.double() for t in tensors))
    for position, results in enumerate(zip(ours, plain, truth, strict=True)):
        assert_no_worse_than_torch(f"{side}/{save} result {position}", *results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gain_scale(dtype: torch.dtype) -> None:
    x = torch.randn(3, 11, 20, device=DEVICE).to(dtype).requires_grad_()
    delta = torch.randn(20, device=DEVICE, requires_grad=True)
    y = gain_scale(x, delta, backend="triton")
    plain = gain_scale(x, delta, backend="eager")
    dy = torch.randn_like(y)
    assert torch.equal(y, plain), "one multiplication, one rounding: the same bits"
    ours, torchs = (torch.autograd.grad(v, (x, delta), dy) for v in (y, plain))
    assert torch.equal(ours[0], torchs[0])
    exact = (dy.double() * x.double()).flatten(0, 1).sum(0)
    assert_no_worse_than_torch("ddelta", ours[1], (dy.float() * x).flatten(0, 1).sum(0), exact)


def test_the_backends_keep_the_same_tensors() -> None:
    x, weight = torch.randn(4, 16, device=DEVICE, requires_grad=True), torch.randn(8, 16, device=DEVICE)
    delta = torch.zeros(8, device=DEVICE, requires_grad=True)
    kept: dict[str, list[tuple[int, ...]]] = {}
    for backend in ("eager", "triton"):
        shapes = kept.setdefault(backend, [])
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(tuple(t.shape)) or t, lambda t: t):
            gain_linear(x, weight, delta, backend=backend)
    assert kept["eager"] == kept["triton"] == [(4, 8), (8, 16), (8,)]
