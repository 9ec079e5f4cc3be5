"""reference.py against autograd of the equations themselves, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.suites.memory import allocator_peak
from gain_ops import reference
from gain_ops.measure.peak_bytes import peak_bytes
from gain_ops.testing import assert_no_worse_than_torch

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
def test_a_narrow_delta_is_widened_before_the_one_is_added(call: str) -> None:
    narrow = tensors(T, IN, OUT, torch.float32)
    narrow |= {name: narrow[name].bfloat16() for name in ("delta_out", "delta_in")}
    wide = narrow | {name: narrow[name].float() for name in ("delta_out", "delta_in")}
    for got, expected in zip(run(reference, call, narrow), run(reference, call, wide), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("side", ["output", "input"])
def test_composite_is_the_reference(side: str) -> None:
    t = _tensors()
    delta, one = (t["delta_out"], reference.linear) if side == "output" else (t["delta_in"], reference.linear_input)
    flat = one(t["x"], t["weight"], delta, t["bias"])
    got = reference.composite(t["x"].view(1, T, IN), t["weight"], delta, t["bias"], side)
    torch.testing.assert_close(got, flat.view(1, T, OUT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_composite_has_the_bits_of_the_op(dtype: torch.dtype, biased: bool) -> None:
    t = {name: value.to(dtype) for name, value in _tensors().items()}
    delta, bias = t["delta_out"].float(), t["bias"] if biased else None
    y = reference.linear(t["x"], t["weight"], delta, bias)
    assert torch.equal(reference.composite(t["x"], t["weight"], delta, bias, "output"), y)
    assert torch.equal(reference.linear_z(t["x"], t["weight"], delta, bias)[0], y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gain_and_bias_round_once(dtype: torch.dtype) -> None:
    x, weight = torch.randn(400, 8).to(dtype), torch.randn(500, 8).to(dtype)
    delta, bias = 0.3 * torch.randn(500), torch.randn(500).to(dtype)
    y, z = reference.linear_z(x, weight, delta, bias)
    once = (z.double() * (1 + delta).double() + bias.double()).to(dtype)
    # rounded to fp32 between, a tie differs now and then; rounded to the activation's dtype, one in four would
    assert (y != once).double().mean() < 1e-3


PEAKS = {  # bytes an element of [T, n], in bf16 and in fp32, of what the op makes; what it returns is in it
    "linear": (2, 4),  # y alone
    "linear_z": (4, 8),  # y and z
    "scale": (2, 4),
    "glu": (8, 8),  # the gate and its activation in fp32
    "glu_backward": (28, 28),
    "glu_ddelta": (8, 4),
    "rms_norm": (8, 8),
    "add without bias": (2, 4),
    "add_rms_norm without bias": (10, 12),
    "add_layer_norm": (10, 12),
    "rms_norm_add": (8, 8),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", PEAKS)
def test_bytes_that_an_op_makes(op: str, dtype: torch.dtype) -> None:
    """As a GPU's allocator sees them: there an op that widens does it element by element."""
    t, n = 512, 256
    given = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in tensors(t, 16, n, dtype).items()
    } | {
        "delta_in": torch.zeros(n, device="meta"),
        "x": torch.zeros(t, 16 if "linear" in op else n, dtype=dtype, device="meta"),
    }
    allowed = PEAKS[op][dtype == torch.float32] * t * n
    per_feature = 64 * (t + n)  # the gain, r, a sum
    assert peak_bytes(lambda: run(reference, op, given)) <= allowed + per_feature


@pytest.mark.parametrize("op", ["linear", "linear_z", "glu", "glu_ddelta"])
def test_bytes_that_a_cpu_gives_out(op: str) -> None:
    t, n = 512, 256
    given = tensors(t, 16, n, torch.float32)
    assert allocator_peak(lambda: run(reference, op, given)) <= PEAKS[op][1] * t * n + 64 * (t + n)


class TestSumOverManyTokens:
    """ddelta block by block: what is widened at once is bounded."""

    @pytest.fixture(autouse=True)
    def _blocks_of_four_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reference, "_WIDENED", 4 * OUT, raising=False)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("tokens", [1, 4, 5, 103])
    def test_the_sum_is_as_exact(self, dtype: torch.dtype, tokens: int) -> None:
        dy, z = torch.randn(tokens, OUT).to(dtype), torch.randn(tokens, OUT).to(dtype)
        truth, size = (dy.double() * z.double()).sum(0), (dy.double() * z.double()).abs().sum(0)
        got = reference.ddelta(dy, z)
        assert got.dtype == torch.float32
        assert_no_worse_than_torch("ddelta", got, (dy.float() * z.float()).sum(0), truth, size)

    def test_it_is_differentiable(self) -> None:
        dy, z = (torch.randn(T, OUT, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(reference.ddelta, (dy, z))

    def test_the_bytes_do_not_grow_with_the_tokens(self) -> None:
        dy = torch.empty(1000, OUT, dtype=torch.bfloat16, device="meta")
        assert peak_bytes(lambda: reference.ddelta(dy, dy), exclude=[dy]) <= 8 * 4 * OUT + 3 * 4 * OUT
        assert reference.ddelta(dy[:0], dy[:0]).shape == (OUT,)
