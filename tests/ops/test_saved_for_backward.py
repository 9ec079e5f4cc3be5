"""Exact bytes that gain_linear and gain_scale keep for backward: by save, side, who needs a gradient, dtype and autocast."""

import pytest
import torch

from gain_ops import gain_linear, gain_scale
from gain_ops.measure.saved_bytes import saved_bytes

T, IN, OUT = 12, 40, 24
LEAD = (3, 4)


def _kept(side: str, save: str, *, x_grad: bool, delta_grad: bool, dtype=torch.float32, w_dtype=None, autocast=False):
    x = torch.randn(*LEAD, IN, dtype=dtype, requires_grad=x_grad)
    weight = torch.randn(OUT, IN, dtype=w_dtype or dtype)
    delta = torch.zeros(OUT if side == "output" else IN, requires_grad=delta_grad)
    bias = torch.zeros(OUT, dtype=dtype)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return gain_linear(x, weight, delta, bias, side=side, save=save)

    return saved_bytes(forward, exclude=[weight, delta, bias], inputs=[x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "save", "x_grad", "delta_grad", "new", "held"),
    [
        # an output-side gain keeps z ...
        ("output", "auto", True, True, T * OUT, 0),
        ("output", "output", True, True, T * OUT, 0),
        ("output", "output", False, True, T * OUT, 0),
        # ... or x, which is the caller's own storage
        ("output", "input", True, True, 0, T * IN),
        ("output", "input", False, True, 0, T * IN),
        # an input-side gain keeps x
        ("input", "auto", True, True, 0, T * IN),
        ("input", "input", False, True, 0, T * IN),
        # and without a gradient for delta nothing that is activation-sized
        ("output", "auto", True, False, 0, 0),
        ("output", "input", True, False, 0, 0),
        ("input", "auto", True, False, 0, 0),
        ("output", "auto", False, False, 0, 0),
        ("input", "auto", False, False, 0, 0),
    ],
)
def test_one_activation_or_none(side, save, x_grad, delta_grad, new, held, dtype) -> None:
    kept = _kept(side, save, x_grad=x_grad, delta_grad=delta_grad, dtype=dtype)
    size = torch.empty((), dtype=dtype).element_size()
    assert (kept.new, kept.inputs) == (new * size, held * size)


@pytest.mark.parametrize(
    ("side", "save", "new"), [("output", "output", T * OUT), ("output", "input", T * IN), ("input", "auto", T * IN)]
)
def test_autocast_keeps_one_low_precision_activation_and_no_copy_of_w(side: str, save: str, new: int) -> None:
    kept = _kept(side, save, x_grad=True, delta_grad=True, autocast=True)
    assert (kept.new, kept.inputs) == (new * 2, 0), "x in bfloat16 is new, W in bfloat16 is not kept"
    already_low = _kept(
        side, save, x_grad=True, delta_grad=True, dtype=torch.bfloat16, w_dtype=torch.float32, autocast=True
    )
    assert already_low.total == new * 2


def test_the_frozen_linear_under_autocast_keeps_a_copy_of_w_and_we_do_not() -> None:
    x = torch.randn(T, IN, requires_grad=True)
    weight, delta = torch.randn(OUT, IN), torch.zeros(OUT)

    def frozen() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.linear(x, weight)

    def gained() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return gain_linear(x, weight, delta)

    assert saved_bytes(frozen, exclude=[weight], inputs=[x]).new == OUT * IN * 2
    assert saved_bytes(gained, exclude=[weight, delta], inputs=[x]).new == 0


@pytest.mark.parametrize(
    ("x_grad", "delta_grad", "held"), [(True, True, T * IN), (False, True, T * IN), (True, False, 0)]
)
def test_gain_scale(x_grad: bool, delta_grad: bool, held: int) -> None:
    x, delta = torch.randn(*LEAD, IN, requires_grad=x_grad), torch.zeros(IN, requires_grad=delta_grad)
    kept = saved_bytes(lambda: gain_scale(x, delta), exclude=[delta], inputs=[x])
    assert (kept.new, kept.inputs) == (0, held * 4)


@pytest.mark.parametrize(("side", "save"), [("output", "output"), ("output", "input"), ("input", "auto")])
def test_a_transposed_weight_is_kept_as_a_view(side: str, save: str) -> None:
    x = torch.randn(T, IN, requires_grad=True)
    stored = torch.randn(IN, OUT)
    delta = torch.zeros(OUT if side == "output" else IN, requires_grad=True)
    kept = saved_bytes(
        lambda: gain_linear(x, stored.t(), delta, side=side, save=save), exclude=[stored, delta], inputs=[x]
    )
    assert kept.new == (T * OUT * 4 if save == "output" else 0)


def test_the_eager_composite_keeps_more_in_low_precision() -> None:
    """What the Function is for: plain torch keeps z in fp32 or a second copy when delta is fp32."""
    x, weight = torch.randn(T, IN).bfloat16().requires_grad_(), torch.randn(OUT, IN).bfloat16()
    delta = torch.zeros(OUT, requires_grad=True)

    def composite() -> torch.Tensor:
        return (torch.nn.functional.linear(x, weight).float() * (1 + delta)).bfloat16()

    plain = saved_bytes(composite, exclude=[weight, delta], inputs=[x])
    ours = saved_bytes(lambda: gain_linear(x, weight, delta), exclude=[weight, delta], inputs=[x])
    assert ours.new == T * OUT * 2
    assert plain.new >= T * OUT * 4
