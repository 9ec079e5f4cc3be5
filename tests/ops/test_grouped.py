"""Gains on the experts of a mixture: values, gradients, what is kept, rows of nobody, every context of autograd."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gain_ops import gain_activation, gain_combine, gain_glu, gain_grouped_linear
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.testing import assert_no_worse_than_torch

K = 2
ENDS = (3, 3, 5, 8)  # the second expert has no rows; of ten rows, two belong to nobody
ROWS, IN, OUT = 10, 8, 16

Given = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _no_compiled_graphs() -> None:
    torch._dynamo.reset()


def linear(t: Given, side: str, biased: bool = True) -> Tensor:
    delta = t["delta_out" if side == "output" else "delta_in"]
    return gain_grouped_linear(t["x"], t["weight"], delta, t["offsets"], t["bias"] if biased else None, side=side)


def combine(t: Given) -> Tensor:
    return gain_combine(t["z"], t["delta_out"], t["router"], t["order"], t["offsets"], t["bias"])


def glu(t: Given) -> Tensor:
    return gain_glu(t["x"], t["up"], t["delta_in"], offsets=t["offsets"])


def packed_glu(t: Given) -> Tensor:
    return gain_glu(t["z"], None, t["delta_in"], offsets=t["offsets"])


def activation(t: Given) -> Tensor:
    return gain_activation(t["x"], t["delta_in"], activation="relu2", offsets=t["offsets"])


def loop(t: Given, row: Callable[[Given, int, int], Tensor], width: int) -> Tensor:
    """One row after the other."""
    y = [torch.zeros(width, dtype=t["x"].dtype)] * len(t["x"])
    starts = [0, *t["offsets"].tolist()]
    for e, (start, end) in enumerate(itertools.pairwise(starts)):
        for s in range(start, end):
            y[s] = row(t, e, s)
    return torch.stack(y)


def plain_linear(t: Given, side: str, biased: bool = True) -> Tensor:
    def row(t: Given, e: int, s: int) -> Tensor:
        if side == "output":
            y = (F.linear(t["x"][s], t["weight"][e]) * (1 + t["delta_out"][e])).to(t["x"].dtype)
        else:
            y = F.linear((t["x"][s] * (1 + t["delta_in"][e])).to(t["x"].dtype), t["weight"][e])
        return (y + t["bias"][e]).to(t["x"].dtype) if biased else y

    return loop(t, row, OUT)


def plain_combine(t: Given) -> Tensor:
    def row(t: Given, e: int, s: int) -> Tensor:
        y = (t["z"][s] * (1 + t["delta_out"][e])).to(t["z"].dtype) + t["bias"][e]
        return (y * t["router"].flatten()[t["order"][s]]).to(t["z"].dtype)

    rows = loop(t, row, OUT)
    return torch.zeros_like(rows).index_copy(0, t["order"], rows).view(-1, K, OUT).sum(1)


def plain_glu(t: Given, activation: Callable[[Tensor], Tensor], gate: str, up: str | None) -> Tensor:
    def row(t: Given, e: int, s: int) -> Tensor:
        if gate == up:
            g, u = t[gate][s].chunk(2)
        else:
            g, u = t[gate][s], 1 if up is None else t[up][s]
        return (activation(g) * u * (1 + t["delta_in"][e])).to(g.dtype)

    return loop(t, row, IN)


# the op, plain torch, and what has gradients
OPS: dict[str, tuple[Callable[[Given], Tensor], Callable[[Given], Tensor], tuple[str, ...]]] = {
    "output side": (
        partial(linear, side="output"),
        partial(plain_linear, side="output"),
        ("x", "delta_out", "bias"),
    ),
    "input side": (partial(linear, side="input"), partial(plain_linear, side="input"), ("x", "delta_in", "bias")),
    "input side without bias": (
        partial(linear, side="input", biased=False),
        partial(plain_linear, side="input", biased=False),
        ("x", "delta_in"),
    ),
    "combine": (combine, plain_combine, ("z", "delta_out", "bias", "router")),
    "glu": (glu, partial(plain_glu, activation=F.silu, gate="x", up="up"), ("x", "up", "delta_in")),
    "packed glu": (packed_glu, partial(plain_glu, activation=F.silu, gate="z", up="z"), ("z", "delta_in")),
    "activation": (
        activation,
        partial(plain_glu, activation=lambda g: F.relu(g).square(), gate="x", up=None),
        ("x", "delta_in"),
    ),
}
every_op = pytest.mark.parametrize("op", OPS)


def draw(
    dtype: torch.dtype = torch.float64,
    ends: tuple[int, ...] = ENDS,
    rows: int = ROWS,
    of_nobody: float = float("nan"),
) -> Given:
    """What an op may take; rows past the last end hold ``of_nobody``."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    experts = len(ends)
    t = {
        "x": torch.randn(rows, IN, dtype=dtype),
        "up": torch.randn(rows, IN, dtype=dtype),
        "z": torch.randn(rows, OUT, dtype=dtype),
        "weight": torch.randn(experts, OUT, IN, dtype=dtype),
        "bias": torch.randn(experts, OUT, dtype=dtype),
        "delta_out": 0.3 * torch.randn(experts, OUT, dtype=wide),
        "delta_in": 0.3 * torch.randn(experts, IN, dtype=wide),
        "router": torch.rand(rows // K, K, dtype=wide),
        "order": torch.randperm(rows),
        "offsets": torch.tensor(ends, dtype=torch.int32),
    }
    for name in ("x", "up", "z"):
        t[name][ends[-1] :] = of_nobody
    return t


def with_gradients(t: Given, *wanted: str) -> Given:
    return {name: value.detach().requires_grad_() if name in wanted else value for name, value in t.items()}


def outcome(run: Callable[[Given], Tensor], t: Given, wanted: tuple[str, ...]) -> list[Tensor]:
    """y and the gradients; its own cotangent is a function of the shape."""
    t = with_gradients(t, *wanted)
    y = run(t)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t[name] for name in wanted], dy)]


@every_op
def test_gradcheck_and_double_backward(op: str) -> None:
    run, _, wanted = OPS[op]
    t = with_gradients(draw(of_nobody=0.5), *wanted)

    def of(*tensors: Tensor) -> Tensor:
        return run(t | dict(zip(wanted, tensors, strict=True)))

    inputs = [t[name] for name in wanted]
    assert torch.autograd.gradcheck(of, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(of, inputs, fast_mode=True)


def test_a_second_derivative_of_a_delta_that_z_was_made_from() -> None:
    """A delta that is used twice gets from each use what is the use's own."""

    def run(delta: Tensor) -> Tensor:
        t = draw_once | {"delta_out": delta, "z": draw_once["z"] * delta.sum()}
        return combine(t)

    draw_once = draw(of_nobody=0.5)
    delta = draw_once["delta_out"].requires_grad_()
    assert torch.autograd.gradgradcheck(run, (delta,), fast_mode=True)


@every_op
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_torch(op: str, dtype: torch.dtype) -> None:
    """Against a loop over rows. What the rows of nobody hold is in no result: there it is NaN for the op alone."""
    run, plain, wanted = OPS[op]
    t = draw(dtype)
    known = {name: value.nan_to_num() if value.is_floating_point() else value for name, value in t.items()}
    exact = {name: value.double() if value.is_floating_point() else value for name, value in known.items()}
    results = outcome(run, t, wanted), outcome(plain, known, wanted), outcome(plain, exact, wanted)
    for position, (result, torchs, truth) in enumerate(zip(*results, strict=True)):
        assert result.dtype == torchs.dtype
        assert_no_worse_than_torch(f"{op} {position}", result, torchs, truth, unit=dtype)


@every_op
def test_rows_of_nobody_and_experts_without_rows_are_exact_zeros(op: str) -> None:
    run, _, wanted = OPS[op]
    t = draw(torch.float32)
    y, *gradients = outcome(run, t, wanted)
    of_nobody = slice(ENDS[-1], None)
    if op == "combine":
        live = torch.ones(ROWS).index_fill(0, t["order"][of_nobody], 0).view(-1, K)
        assert not y[live.sum(1) == 0].any()
        assert not gradients[3][live == 0].any()
    else:
        assert not y[of_nobody].any()
    for name, gradient in zip(wanted, gradients, strict=True):
        if name in ("x", "up", "z"):
            assert not gradient[of_nobody].any()
        elif name != "router":
            assert gradient[0].any()
            assert not gradient[1].any()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
@every_op
def test_any_offsets(op: str, data: st.DataObject) -> None:
    """Experts without rows at any place, all rows of nobody, no rows at all."""
    run, plain, wanted = OPS[op]
    rows = K * data.draw(st.integers(0, 5), label="tokens")
    ends = sorted(data.draw(st.lists(st.integers(0, rows), min_size=1, max_size=5), label="ends"))
    t = draw(torch.float64, tuple(ends), rows)
    known = {name: value.nan_to_num() if value.is_floating_point() else value for name, value in t.items()}
    if rows == 0:
        assert run(t).shape[0] == 0
    else:
        wanted = wanted if ends[-1] else wanted[:0]  # the loop's zeros have no gradient
        for got, expected in zip(
            outcome(run, t, wanted) if wanted else [run(t)],
            outcome(plain, known, wanted) if wanted else [plain(known)],
            strict=True,
        ):
            torch.testing.assert_close(got, expected)


@every_op
def test_only_what_is_wanted(op: str) -> None:
    run, _, wanted = OPS[op]
    t = draw()
    _, *whole = outcome(run, t, wanted)
    for name, expected in zip(wanted, whole, strict=True):
        _, alone = outcome(run, t, (name,))
        assert torch.equal(alone, expected), name


@every_op
def test_the_same_bits_on_a_second_run(op: str) -> None:
    run, _, wanted = OPS[op]
    t = draw(torch.bfloat16, (100, 100, 300, 380), 400)
    assert all(map(torch.equal, outcome(run, t, wanted), outcome(run, t, wanted)))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    ("op", "inputs", "new"),
    [
        ("output side", (), ROWS * OUT),  # z
        ("input side", ("x",), 0),
        ("combine", ("z",), 0),
        ("glu", ("x", "up"), 0),
        ("packed glu", ("z",), 0),
        ("activation", ("x",), 0),
    ],
)
def test_what_is_kept(op: str, inputs: tuple[str, ...], new: int, trained: bool) -> None:
    run, _, wanted = OPS[op]
    activations = [name for name in wanted if name in ("x", "up", "z")]
    t = with_gradients(draw(torch.bfloat16), *activations, *(wanted if trained else ()))
    others = [value for name, value in t.items() if name not in activations]
    saved = saved_bytes(lambda: run(t), exclude=others, inputs=[t[name] for name in activations])
    if not trained and "glu" not in op and op != "activation":
        inputs, new = (), 0
    assert (saved.inputs, saved.new) == (sum(t[name].nbytes for name in inputs), 2 * new)
    assert saved_bytes(lambda: run({name: value.detach() for name, value in t.items()})).total == 0


def experts(t: Given, gained: bool) -> Tensor:
    """transformers' grouped_mm_experts_forward from the routing on; the router's weights need a gradient."""
    gate_up = F.grouped_mm(t["x"], t["gate_up"].transpose(1, 2), offs=t["offsets"])
    gate, up = gate_up.chunk(2, -1)
    z = F.grouped_mm(F.silu(gate) * up, t["weight"].transpose(1, 2), offs=t["offsets"])
    if gained:
        return gain_combine(z, t["delta_out"], t["router"], t["order"], t["offsets"])
    weighted = z * t["router"].flatten()[t["order"], None].to(z.dtype)
    return weighted[torch.argsort(t["order"])].view(-1, K, OUT).sum(1)


def test_a_gain_on_every_down_projection_saves_no_more_than_the_frozen_experts() -> None:
    t = draw(torch.bfloat16, (30, 30, 50, 80), 80) | {"gate_up": torch.randn(4, 2 * IN, IN, dtype=torch.bfloat16)}
    t = with_gradients(t, "x", "router", "delta_out")
    t["order"] = t["order"][:80]
    parameters = [t[name] for name in ("gate_up", "weight", "delta_out", "router", "order", "offsets")]
    frozen, gained = (
        saved_bytes(lambda gained=gained: experts(t, gained), exclude=parameters, inputs=[t["x"]])
        for gained in (False, True)
    )
    assert gained.total <= frozen.total
    torch.testing.assert_close(
        experts(t | {"delta_out": torch.zeros(4, OUT)}, True), experts(t, False), atol=0.1, rtol=0.05
    )


@pytest.mark.parametrize("op", ["output side", "input side"])
def test_autocast_keeps_one_low_precision_activation_and_no_copy_of_w(op: str) -> None:
    run, _, wanted = OPS[op]
    t = with_gradients(draw(torch.float32), *wanted)

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(t)

    saved = saved_bytes(under_autocast, exclude=[value for name, value in t.items() if name != "x"], inputs=[t["x"]])
    assert (saved.inputs, saved.new) == (0, 2 * ROWS * (OUT if op == "output side" else IN))
    y = under_autocast()
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.sum(), [t[name] for name in wanted])] == [torch.float32] * 3


@pytest.mark.parametrize("op", ["combine", "glu"])
def test_autocast_changes_nothing(op: str) -> None:
    run, _, wanted = OPS[op]
    t = draw(torch.float32)
    expected = outcome(run, t, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        got = outcome(run, t, wanted)
    assert all(map(torch.equal, got, expected))


@every_op
def test_checkpointing(op: str) -> None:
    run, _, wanted = OPS[op]
    t = draw()
    again = outcome(lambda t: checkpoint(run, t, use_reentrant=False), t, wanted)
    assert all(map(torch.equal, again, outcome(run, t, wanted)))


@every_op
def test_one_compiled_graph(op: str) -> None:
    run, _, wanted = OPS[op]
    t = draw()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, outcome(compiled, t, wanted), outcome(run, t, wanted)))


@every_op
def test_transforms_and_forward_mode(op: str) -> None:
    run, _, wanted = OPS[op]
    t = draw(of_nobody=0.5)
    first = wanted[0]
    two = torch.stack([t[first], t[first].flip(1)])
    batched = torch.func.vmap(lambda one: run(t | {first: one}))(two)
    torch.testing.assert_close(batched, torch.stack([run(t | {first: one}) for one in two]))
    for name in wanted:
        leaf = t[name].detach().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda one, name=name: run(t | {name: one}), leaf, check_forward_ad=True, fast_mode=True
        )


def test_a_weight_stored_as_in_by_out_is_not_copied() -> None:
    t = with_gradients(draw(torch.bfloat16), "x")
    stored = t["weight"].transpose(1, 2).contiguous()
    for side in ("output", "input"):
        t["weight"] = stored.transpose(1, 2)
        saved = saved_bytes(partial(linear, t, side), exclude=[stored, *t.values()])
        assert saved.total == 0
        y, dx = outcome(partial(linear, side=side), t, ("x",))
        wanted = outcome(partial(linear, side=side), t | {"weight": t["weight"].contiguous()}, ("x",))
        torch.testing.assert_close([y, dx], wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": torch.tensor([1, 2, 3, 4])}, TypeError, "offsets must be int32"),
        ({"offsets": torch.tensor(4, dtype=torch.int32)}, ValueError, r"offsets must be \[E\]"),
        ({"offsets": torch.tensor([4], dtype=torch.int32)}, ValueError, "must be "),
        ({"delta_out": torch.zeros(OUT), "delta_in": torch.zeros(IN)}, ValueError, r"delta must be \[4, "),
        ({"bias": torch.zeros(4, 3)}, ValueError, r"bias must be \[4, 16\]"),
        ({"x": torch.zeros(2, 3, IN), "z": torch.zeros(2, 3, OUT)}, ValueError, r"must be \[S, n\]"),
        ({"x": torch.zeros(ROWS, IN).int(), "z": torch.zeros(ROWS, OUT).int()}, TypeError, "must be float64"),
    ],
)
@pytest.mark.parametrize("op", ["output side", "input side", "combine"])
def test_refusals(op: str, change: Given, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OPS[op][0](draw(torch.float32) | change)


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("output side", {"weight": torch.zeros(3, OUT, IN)}, ValueError, r"weight must be \[E=4"),
        ("output side", {"weight": torch.zeros(4, OUT, 3)}, ValueError, r"x must be \[S, in_features=3\]"),
        ("output side", {"weight": torch.zeros(4, OUT, IN).requires_grad_()}, ValueError, "requires a gradient"),
        ("output side", {"x": torch.zeros(ROWS, IN).half()}, TypeError, "weight is"),
        ("combine", {"router": torch.zeros(ROWS, K)}, ValueError, "T \\* k = 10"),
        ("combine", {"order": torch.zeros(3).long()}, ValueError, r"order must be \[10\]"),
        ("combine", {"order": torch.zeros(ROWS).int()}, TypeError, "order must be int64"),
        ("glu", {"delta_in": torch.zeros(3, IN)}, ValueError, r"delta must be \[4, 8\]"),
    ],
)
def test_refusals_of_one(op: str, change: Given, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OPS[op][0](draw(torch.float32) | change)


def test_a_side_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="side='both'"):
        linear(draw(torch.float32), "both")
