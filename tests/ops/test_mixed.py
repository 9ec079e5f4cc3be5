"""Several gain sets in one batch: each row is its own set's, sums are exact zeros elsewhere, and wrong ids are refused."""

import pytest
import torch

from gain_ops import gain_linear, saved_bytes
from gain_ops.ops.mixed import mixed_linear, mixed_scale

T, IN, OUT, N = 23, 12, 20, 3
SIDES = ["output", "input"]


def inputs(side, dtype=torch.float32, n=N):
    torch.manual_seed(0)
    x, w, b = torch.randn(T, IN, dtype=dtype), torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    delta = torch.randn(n, OUT if side == "output" else IN, dtype=wide)
    return x, w, delta, b, torch.randint(-1, n, (T,), dtype=torch.int32)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("biased", [False, True])
def test_each_row_has_the_bits_of_its_set_alone(side, dtype, biased):
    x, w, delta, b, index = inputs(side, dtype)
    b = b if biased else None
    y = mixed_linear(x, w, delta, index, b, side=side)
    rows = [*delta, torch.zeros_like(delta[0])]
    alone = torch.stack([gain_linear(x, w, row, b, side=side, backend="eager") for row in rows])
    assert torch.equal(y, alone[index.long(), torch.arange(T)])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("ordered", [False, True])
def test_gradients_and_double_backward(side, ordered):
    x, w, delta, b, index = inputs(side, torch.float64)
    index = index.sort().values if ordered else index

    def f(x, delta, b):
        return mixed_linear(x, w, delta, index, b, side=side)

    given = tuple(t.requires_grad_() for t in (x, delta, b))
    assert torch.autograd.gradcheck(f, given)
    assert torch.autograd.gradgradcheck(f, given)


@pytest.mark.parametrize("side", SIDES)
def test_a_set_without_rows_gets_exact_zeros_even_beside_infinities(side):
    x, w, delta, _, _ = inputs(side)
    index = torch.tensor([0, -1] * T, dtype=torch.int32)[:T]
    x[index == -1] = torch.inf
    delta.requires_grad_()
    y = mixed_linear(x, w, delta, index, side=side)
    y[index == 0].sum().backward()
    assert torch.equal(delta.grad[1:], torch.zeros_like(delta.grad[1:]))
    assert delta.grad[0].isfinite().all()
    assert delta.grad[0].any()


def test_what_is_saved_and_the_same_bits_twice():
    x, w, delta, _, index = inputs("output", torch.bfloat16)
    delta.requires_grad_()

    def gradient():
        return torch.autograd.grad(mixed_linear(x, w, delta, index).sum(), delta)[0]

    assert torch.equal(gradient(), gradient())
    assert saved_bytes(lambda: mixed_linear(x, w, delta, index)).total == T * OUT * 2 + T * 4


def test_scale_takes_any_rank_and_compiles_once_for_other_ids():
    x, _, delta, _, index = inputs("input")
    compiled = torch.compile(mixed_scale, backend="eager", fullgraph=True)
    with torch.compiler.set_stance("default"):
        first = compiled(x, delta, index)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x, delta, index.flip(0)), mixed_scale(x, delta, index.flip(0)))
    assert torch.equal(mixed_scale(x.view(1, T, IN), delta, index), first[None])


@pytest.mark.parametrize("side", SIDES)
def test_autocast_is_the_cast_by_hand(side):
    x, w, delta, b, index = inputs(side)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed_linear(x, w, delta, index, b, side=side)
    low = mixed_linear(x.bfloat16(), w.bfloat16(), delta, index, b, side=side)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, low)


def test_what_does_not_fit_is_refused():
    x, w, delta, _, index = inputs("output")
    with pytest.raises(TypeError, match=r"index must be int32, got torch.int64"):
        mixed_linear(x, w, delta, index.long())
    with pytest.raises(ValueError, match=r"index must be \[23\]"):
        mixed_linear(x, w, delta, index[:5])
    with pytest.raises(ValueError, match=r"delta must be \[N, 20\]"):
        mixed_linear(x, w, delta[:, :7], index)
    with pytest.raises(ValueError, match="frozen"):
        mixed_linear(x, w.clone().requires_grad_(), delta, index)
