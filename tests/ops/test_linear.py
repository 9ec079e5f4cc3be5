"""gain_linear and gain_scale as a user meets them: values, gradients, dtypes, strides, autocast, errors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from gain_ops import gain_linear, gain_scale, reference
from gain_ops.testing import assert_no_worse_than_torch

SIDE_AND_SAVE = [("output", "auto"), ("output", "output"), ("output", "input"), ("input", "auto"), ("input", "input")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

side_and_save = pytest.mark.parametrize(("side", "save"), SIDE_AND_SAVE)


def _inputs(
    side: str, *lead: int, in_features: int = 6, out_features: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.randn(*lead, in_features, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(out_features, in_features, dtype=torch.float64) / max(in_features, 1) ** 0.5).to(dtype)
    features = out_features if side == "output" else in_features
    delta = (0.3 * torch.randn(features, dtype=torch.float64)).to(reference.accumulation_dtype(dtype)).requires_grad_()
    bias = torch.randn(out_features, dtype=torch.float64).to(dtype)
    return x, weight, delta, bias


@side_and_save
@pytest.mark.parametrize("bias", [None, "frozen", "trained"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 2)])
def test_gradcheck_to_second_order_and_forward_mode(
    side: str, save: str, bias: str | None, lead: tuple[int, ...]
) -> None:
    x, weight, delta, b = _inputs(side, *lead)
    inputs = (x, delta, None if bias is None else b.requires_grad_(bias == "trained"))

    def run(x: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        return gain_linear(x, weight, delta, bias, side=side, save=save)

    assert gradcheck(run, inputs, check_forward_ad=True)
    assert gradgradcheck(run, inputs)


def test_gradcheck_of_gain_scale() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(gain_scale, (x, delta), check_forward_ad=True)
    assert gradgradcheck(gain_scale, (x, delta))


@side_and_save
def test_torch_func_transforms(side: str, save: str) -> None:
    x, weight, delta, bias = (t.detach() for t in _inputs(side, 3))

    def loss(delta: Tensor, x: Tensor) -> Tensor:
        return gain_linear(x, weight, delta, bias, side=side, save=save).pow(3).sum()

    def plain(delta: Tensor, x: Tensor) -> Tensor:
        return reference.BY_SIDE[side](x, weight, delta, bias).pow(3).sum()

    torch.testing.assert_close(torch.func.grad(loss)(delta, x), torch.func.grad(plain)(delta, x))
    torch.testing.assert_close(torch.func.hessian(loss)(delta, x), torch.func.hessian(plain)(delta, x))
    per_token = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    torch.testing.assert_close(
        per_token(delta, x), torch.func.vmap(torch.func.grad(plain), in_dims=(None, 0))(delta, x)
    )
    deltas = torch.stack([delta, 2 * delta])
    each = torch.func.vmap(lambda d: gain_linear(x, weight, d, bias, side=side, save=save))(deltas)
    torch.testing.assert_close(each[1], gain_linear(x, weight, deltas[1], bias, side=side))


@side_and_save
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_no_worse_than_plain_torch(side: str, save: str, dtype: torch.dtype, with_bias: bool) -> None:
    x, weight, delta, bias = _inputs(side, 3, 50, in_features=64, out_features=48, dtype=dtype)
    bias = bias if with_bias else None
    dy = torch.randn(3, 50, 48).to(dtype)

    def gradients(run, *tensors: Tensor | None) -> list[Tensor]:
        x, weight, delta, bias, dy = tensors
        x, delta = x.detach().requires_grad_(), delta.detach().requires_grad_()
        y = run(x, weight, delta, bias)
        return [y.detach(), *torch.autograd.grad(y, (x, delta), dy)]

    ours = gradients(lambda *t: gain_linear(*t, side=side, save=save), x, weight, delta, bias, dy)
    plain = gradients(reference.BY_SIDE[side], x, weight, delta, bias, dy)
    truth = gradients(
        reference.BY_SIDE[side],
        *(None if t is None else t.double() for t in (x, weight, delta, bias, dy)),
    )
    for name, result, torchs, exact in zip(("y", "dx", "ddelta"), ours, plain, truth, strict=True):
        assert result.dtype == torchs.dtype
        assert_no_worse_than_torch(name, result, torchs, exact)


@side_and_save
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_zero_delta_gives_the_bits_of_the_plain_linear(side: str, save: str, dtype: torch.dtype) -> None:
    x, weight, delta, bias = _inputs(side, 9, in_features=32, out_features=16, dtype=dtype)
    zero = torch.zeros_like(delta).requires_grad_()
    assert torch.equal(gain_linear(x, weight, zero, side=side, save=save), F.linear(x, weight))
    if side == "input":
        assert torch.equal(gain_linear(x, weight, zero, bias, side=side), F.linear(x, weight, bias))


@side_and_save
def test_dead_gains_and_dead_rows_have_exact_finite_gradients(side: str, save: str) -> None:
    x, weight, delta, bias = _inputs(side, 5)
    weight = weight.clone()
    weight[1], weight[:, 2] = 0, 0
    delta = delta.detach().clone()
    delta[0] = -1
    delta.requires_grad_()
    y = gain_linear(x, weight, delta, bias, side=side, save=save)
    plain = reference.BY_SIDE[side](x, weight, delta, bias)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, delta), dy)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, (x, delta), dy))
    assert all(g.isfinite().all() for g in ours)
    assert ours[1][0] != 0, "a dead gain still has a gradient that can revive it"


@side_and_save
@pytest.mark.parametrize(
    ("needs_x", "needs_delta", "needs_bias"), [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
)
def test_only_what_is_needed_gets_a_gradient(
    side: str, save: str, needs_x: int, needs_delta: int, needs_bias: int
) -> None:
    x, weight, delta, bias = (t.detach() for t in _inputs(side, 5))
    x.requires_grad_(bool(needs_x))
    delta.requires_grad_(bool(needs_delta))
    bias.requires_grad_(bool(needs_bias))
    y = gain_linear(x, weight, delta, bias, side=side, save=save)
    assert y.requires_grad == bool(needs_x or needs_delta or needs_bias)
    if not y.requires_grad:
        return
    dy = torch.randn_like(y)
    wanted = [t for t in (x, delta, bias) if t.requires_grad]
    expected = torch.autograd.grad(reference.BY_SIDE[side](x, weight, delta, bias), wanted, dy)
    torch.testing.assert_close(torch.autograd.grad(y, wanted, dy), expected)


@side_and_save
def test_a_wide_bias_gets_its_gradient_unrounded(side: str, save: str) -> None:
    x, weight, delta, bias = _inputs(side, 300, dtype=torch.bfloat16)
    bias = bias.float().requires_grad_()
    y = gain_linear(x, weight, delta, bias, side=side, save=save)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, bias, dy)[0], dy.float().sum(0))


@side_and_save
def test_gradients_come_in_the_dtype_of_what_they_belong_to(side: str, save: str) -> None:
    x, weight, delta, bias = _inputs(side, 5, dtype=torch.bfloat16)
    delta = delta.detach().to(torch.float16).requires_grad_()
    bias = bias.float().requires_grad_()
    gain_linear(x, weight, delta, bias, side=side, save=save).sum().backward()
    assert (x.grad.dtype, delta.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float16, torch.float32)


@side_and_save
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_strides_of_x_w_and_dy(side: str, save: str, data: st.DataObject) -> None:
    t, i, o = (data.draw(st.integers(1, 9), label=name) for name in ("T", "in", "out"))
    torch.manual_seed(t * 100 + i * 10 + o)

    def laid_out(rows: int, columns: int, name: str) -> Tensor:
        base = torch.randn(2 * rows + 2, 2 * columns + 2, dtype=torch.float64)
        layout = data.draw(st.sampled_from(["contiguous", "transposed", "strided", "offset", "expanded"]), label=name)
        if layout == "transposed":
            return base.T[: 2 * columns + 2, :].T[:rows, :columns].T.contiguous().T
        if layout == "strided":
            return base[: 2 * rows : 2, : 2 * columns : 2]
        if layout == "offset":
            return base[1 : rows + 1, 1 : columns + 1]
        if layout == "expanded":
            return base[:1, :columns].expand(rows, columns)
        return base[:rows, :columns].contiguous()

    x = laid_out(t, i, "x").detach().requires_grad_()
    weight = laid_out(o, i, "weight")
    dy = laid_out(t, o, "dy")
    delta = torch.randn(o if side == "output" else i, dtype=torch.float64, requires_grad=True)
    y = gain_linear(x, weight, delta, side=side, save=save)
    expected = reference.BY_SIDE[side](x, weight, delta, None)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, (x, delta), dy), torch.autograd.grad(expected, (x, delta), dy))


@side_and_save
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3, 2)])
def test_no_tokens(side: str, save: str, lead: tuple[int, ...]) -> None:
    x, weight, delta, bias = _inputs(side, *lead)
    y = gain_linear(x, weight, delta, bias, side=side, save=save)
    assert y.shape == (*lead, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(delta.grad, torch.zeros_like(delta))


@side_and_save
def test_the_result_may_be_changed_in_place(side: str, save: str) -> None:
    x, weight, delta, bias = _inputs(side, 2, 3)
    y = F.relu(gain_linear(x, weight, delta, bias, side=side, save=save), inplace=True)
    expected = F.relu(reference.BY_SIDE[side](x, weight, delta, bias))
    torch.testing.assert_close(
        torch.autograd.grad(y.pow(2).sum(), (x, delta)), torch.autograd.grad(expected.pow(2).sum(), (x, delta))
    )


@side_and_save
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(side: str, save: str, use_reentrant: bool) -> None:
    x, weight, delta, bias = _inputs(side, 3)

    def block(x: Tensor) -> Tensor:
        return torch.tanh(gain_linear(x, weight, delta, bias, side=side, save=save))

    expected = torch.autograd.grad(block(x).sum(), (x, delta))
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(delta.grad, expected[1])


@side_and_save
@pytest.mark.parametrize("checkpointed", ["no", "reentrant", "non-reentrant"])
def test_only_a_double_backward_leaves_the_raw_ops(
    side: str, save: str, checkpointed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, delta, bias = _inputs(side, 3)
    recorded: list[str] = []
    for name in ("scale", "ddelta", "ddelta_recompute"):
        one = getattr(reference, name)
        monkeypatch.setattr(
            reference,
            name,
            lambda *t, one=one, name=name: recorded.append(name) or one(*t),
        )

    def block(x: Tensor) -> Tensor:
        return gain_linear(x, weight, delta, bias, side=side, save=save)

    y = block(x) if checkpointed == "no" else checkpoint(block, x, use_reentrant=checkpointed == "reentrant")
    y.sum().backward()
    assert recorded == []
    torch.autograd.grad(block(x).sum(), delta, create_graph=True)
    assert recorded


@side_and_save
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(side: str, save: str, x_dtype: torch.dtype, w_dtype: torch.dtype, backward_inside: bool) -> None:
    x, weight, delta, bias = _inputs(side, 5, dtype=torch.float32)
    x = x.detach().to(x_dtype).requires_grad_()
    weight, bias = weight.to(w_dtype), bias.to(w_dtype)
    dy = torch.randn(5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = gain_linear(x, weight, delta, bias, side=side, save=save)
        if backward_inside:
            grads = torch.autograd.grad(y, (x, delta), dy)
    if not backward_inside:
        grads = torch.autograd.grad(y, (x, delta), dy)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [x_dtype, torch.float32]
    low = x.detach().bfloat16().requires_grad_()
    bias = bias.bfloat16() if side == "input" else bias
    expected = gain_linear(low, weight.bfloat16(), delta, bias, side=side, save=save)
    assert torch.equal(y, expected)
    for got, wanted in zip(grads, torch.autograd.grad(expected, (low, delta), dy), strict=True):
        assert torch.equal(got, wanted.to(got.dtype))


def test_an_fp32_backward_called_under_autocast_stays_fp32() -> None:
    x, weight, delta, _ = _inputs("output", 5, dtype=torch.float32)
    dy = torch.randn(5, 4)
    for side, save in SIDE_AND_SAVE:
        d = delta if side == "output" else torch.randn(6, requires_grad=True)
        y = gain_linear(x, weight, d, side=side, save=save)
        expected = torch.autograd.grad(y, (x, d), dy, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(y, (x, d), dy)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_float64_is_left_alone_by_autocast_as_in_torch() -> None:
    x, weight, delta, bias = _inputs("output", 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert gain_linear(x, weight, delta, bias).dtype == F.linear(x, weight, bias).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_a_second_run(dtype: torch.dtype) -> None:
    for side, save in SIDE_AND_SAVE:
        x, weight, delta, bias = _inputs(side, 300, in_features=40, out_features=24, dtype=dtype)

        def run(x=x, weight=weight, delta=delta, bias=bias, side=side, save=save) -> list[Tensor]:
            y = gain_linear(x, weight, delta, bias, side=side, save=save)
            return [y, *torch.autograd.grad(y.float().pow(2).sum(), (x, delta))]

        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def _good() -> dict[str, object]:
    return {"x": torch.randn(2, 6), "weight": torch.randn(4, 6), "delta": torch.zeros(4), "bias": torch.zeros(4)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(2, 5)}, ValueError, r"x must be \[\.\.\., in_features=6\].*got shape \(2, 5\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"got shape \(\)"),
        ({"weight": torch.randn(4)}, ValueError, r"weight must be \[out_features, in_features\], got shape \(4,\)"),
        (
            {"delta": torch.zeros(6)},
            ValueError,
            r"delta must be \[4\] \(out_features on the output side\), got shape \(6,\)",
        ),
        ({"delta": torch.zeros(4, 1)}, ValueError, r"delta must be \[4\].*\(4, 1\)"),
        ({"side": "input"}, ValueError, r"delta must be \[6\] \(in_features on the input side\), got shape \(4,\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must be \[out_features=4\] or None, got shape \(6,\)"),
        ({"weight": torch.randn(4, 6, requires_grad=True)}, ValueError, r"frozen.*requires_grad_\(False\)"),
        ({"x": torch.randn(2, 6).bfloat16()}, TypeError, r"x is torch.bfloat16 and weight is torch.float32.*autocast"),
        ({"x": torch.ones(2, 6, dtype=torch.int64)}, TypeError, r"x must be float64.*got torch.int64"),
        ({"weight": torch.ones(4, 6, dtype=torch.uint8)}, TypeError, r"weight must be float64.*got torch.uint8"),
        ({"delta": torch.ones(4, dtype=torch.bool)}, TypeError, r"delta must be float64.*got torch.bool"),
        ({"delta": torch.zeros(4, device="meta")}, ValueError, r"x is on cpu and delta is on meta"),
        ({"weight": torch.zeros(4, 6, device="meta")}, ValueError, r"x is on cpu and weight is on meta"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, r"x is on cpu and bias is on meta"),
        ({"side": "rows"}, ValueError, r"side='rows' is not one of 'output', 'input'"),
        ({"save": "z"}, ValueError, r"save='z' is not one of"),
        (
            {"side": "input", "delta": torch.zeros(6), "save": "output"},
            ValueError,
            r"no use on the input side.*save='auto'",
        ),
        ({"backend": "cuda13"}, ValueError, r"backend='cuda13' is not one of auto, eager, triton"),
    ],
)
def test_one_clear_error(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = _good() | change
    before = copy.deepcopy(arguments)
    with pytest.raises(error, match=message):
        gain_linear(**arguments)
    for name, value in arguments.items():
        assert not isinstance(value, Tensor) or value.is_meta or torch.equal(value, before[name])


def test_gain_scale_errors() -> None:
    with pytest.raises(ValueError, match=r"delta must be \[6\] \(x.shape\[-1\]\), got shape \(5,\)"):
        gain_scale(torch.randn(2, 6), torch.zeros(5))
    with pytest.raises(TypeError, match="x must be float64"):
        gain_scale(torch.ones(2, 6, dtype=torch.int32), torch.zeros(6))


def test_meta_tensors_give_shapes() -> None:
    x, weight = torch.empty(2, 3, 6, device="meta", requires_grad=True), torch.empty(4, 6, device="meta")
    delta = torch.empty(4, device="meta", requires_grad=True)
    y = gain_linear(x, weight, delta)
    assert y.is_meta
    assert y.shape == (2, 3, 4)
    y.sum().backward()
    assert delta.grad.shape == (4,)
