"""The gain before the residual stream: values, gradients, what is kept, every context of autograd."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gain_ops import gain_add, gain_add_layer_norm, gain_add_rms_norm, gain_rms_norm, gain_rms_norm_add
from gain_ops.measure.saved_bytes import saved_bytes
from gain_ops.testing import assert_no_worse_than_torch

T, N = 7, 6
EPS = 0.1

Results = tuple[Tensor, ...]
Op = Callable[..., Results]


@pytest.fixture(autouse=True)
def _no_compiled_graphs() -> None:
    torch._dynamo.reset()


def add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor) -> Results:
    return (gain_add(residual, z, delta, bias),)


def add_rms_norm(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor) -> Results:
    return gain_add_rms_norm(residual, z, delta, weight, EPS, bias=bias)


def add_layer_norm(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor) -> Results:
    return gain_add_layer_norm(residual, z, delta, weight, weight.flip(0), EPS, bias=bias)


def add_plain_layer_norm(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor) -> Results:
    return gain_add_layer_norm(residual, z, delta, weight, eps=EPS, bias=bias)


def rms_norm_add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor) -> Results:
    return (gain_rms_norm_add(residual, z, delta, weight, EPS),)


def plain_add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor) -> Results:
    gained = (z * (1 + delta)).to(z.dtype)
    return (residual + gained if bias is None else residual + (gained + bias).to(z.dtype),)


def plain_add_rms_norm(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor) -> Results:
    (h,) = plain_add(residual, z, delta, bias, weight)
    return h, F.rms_norm(h, h.shape[-1:], weight, EPS)


def plain_add_layer_norm(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor) -> Results:
    (h,) = plain_add(residual, z, delta, bias, weight)
    return h, F.layer_norm(h, h.shape[-1:], weight, weight.flip(0), EPS)


def plain_add_plain_layer_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor
) -> Results:
    (h,) = plain_add(residual, z, delta, bias, weight)
    return h, F.layer_norm(h, h.shape[-1:], weight, None, EPS)


def plain_rms_norm_add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor) -> Results:
    gained = (z * (1 + delta)).to(z.dtype)
    return (residual + F.rms_norm(gained, gained.shape[-1:], weight.to(z.dtype), EPS),)


PLAIN: dict[Op, Op] = {
    add: plain_add,
    add_rms_norm: plain_add_rms_norm,
    add_layer_norm: plain_add_layer_norm,
    add_plain_layer_norm: plain_add_plain_layer_norm,
    rms_norm_add: plain_rms_norm_add,
}
BIASED = [op for op in PLAIN if op is not rms_norm_add]
every_op = pytest.mark.parametrize("op", PLAIN, ids=lambda op: op.__name__)


def draw(
    op: Op,
    *lead: int,
    n: int = N,
    dtype: torch.dtype = torch.float64,
    narrow: torch.dtype | None = None,
    biased: bool = True,
) -> list[Tensor | None]:
    """residual, z, delta, bias (None where the op takes none), which need gradients, and a frozen weight."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = [
        torch.randn(*lead, n, dtype=dtype),
        torch.randn(*lead, n, dtype=narrow or dtype),
        0.3 * torch.randn(n, dtype=wide),
        torch.randn(n, dtype=narrow or dtype) if biased and op in BIASED else None,
    ]
    return [*(t if t is None else t.requires_grad_() for t in made), torch.randn(n, dtype=dtype)]


def gradients(results: Results, wanted: list[Tensor | None], cotangents: list[Tensor | None]) -> list[Tensor]:
    """Of those results that have a cotangent, by what is wanted and not None."""
    wanted = [t for t in wanted if t is not None]
    used = [(r, c.to(r.dtype)) for r, c in zip(results, cotangents, strict=False) if c is not None]
    return list(torch.autograd.grad([r for r, _ in used], wanted, [c for _, c in used]))


@every_op
@pytest.mark.parametrize("biased", [False, True])
def test_gradcheck_and_double_backward(op: Op, biased: bool) -> None:
    *tensors, weight = draw(op, 2, 3, biased=biased)
    wanted = [t for t in tensors if t is not None]

    def run(*t: Tensor) -> Results:
        return op(*t[:3], t[3] if len(t) > 3 else None, weight)

    assert torch.autograd.gradcheck(run, wanted)
    assert torch.autograd.gradgradcheck(run, wanted)


# which of h and y the rest of a model uses
@pytest.mark.parametrize("used", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)],
)
@every_op
def test_no_worse_than_torch(op: Op, dtype: torch.dtype, narrow: torch.dtype, used: tuple[bool, bool]) -> None:
    *tensors, weight = draw(op, 2, T, n=32, dtype=dtype, narrow=narrow)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    cotangents = [torch.randn(2, T, 32, dtype=dtype) if one else None for one in used]
    if len(op(*tensors, weight)) == 1:
        cotangents[0] = cotangents[0] if used[0] else torch.randn(2, T, 32, dtype=dtype)
    outcomes = []
    for run, given_, w in (
        (op, tensors, weight),
        (PLAIN[op], tensors, weight),
        (PLAIN[op], exact, weight.double()),
    ):
        results = run(*given_, w)
        outcomes.append([*results, *gradients(results, given_, cotangents)])
    for position, (result, torchs, truth) in enumerate(zip(*outcomes, strict=True)):
        assert result.dtype == torchs.dtype
        assert_no_worse_than_torch(f"{op.__name__} {position}", result, torchs, truth, unit=narrow)


@every_op
def test_only_what_is_wanted(op: Op) -> None:
    *tensors, weight = draw(op, T)
    cotangents = [torch.randn(T, N, dtype=torch.float64) for _ in range(2)]
    whole = gradients(op(*tensors, weight), tensors, cotangents)
    for position, expected in enumerate(whole):
        given_ = [t if t is None else t.detach().requires_grad_(i == position) for i, t in enumerate(tensors)]
        (alone,) = gradients(op(*given_, weight), [given_[position]], cotangents)
        assert torch.equal(alone, expected), position


def parameters(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def new_bytes(op: Op, residual: Tensor) -> int:
    """h where a norm reads it, which a frozen one saves as well, and r in fp32; the mean of a LayerNorm."""
    r = 4 * residual[..., 0].numel()
    if op in (add_layer_norm, add_plain_layer_norm):
        return residual.nbytes + 2 * r
    return {add: 0, add_rms_norm: residual.nbytes + r, rms_norm_add: r}[op]


@every_op
@pytest.mark.parametrize("trained", [True, False])
def test_what_is_kept(op: Op, trained: bool) -> None:
    residual, z, delta, bias, weight = draw(op, 2, T, dtype=torch.bfloat16)
    delta = delta.detach().requires_grad_(trained)
    saved = saved_bytes(
        lambda: op(residual, z, delta, bias, weight), exclude=parameters(delta, bias, weight), inputs=[residual, z]
    )
    assert saved.new == new_bytes(op, residual)
    assert saved.inputs == (z.nbytes if trained or op is rms_norm_add else 0)
    frozen = [t if t is None else t.detach() for t in (residual, z, delta, bias, weight)]
    assert saved_bytes(lambda: op(*frozen)).total == 0


@every_op
def test_a_narrow_z_is_kept_narrow(op: Op) -> None:
    residual, z, delta, bias, weight = draw(op, 2, T, dtype=torch.float32, narrow=torch.bfloat16)
    saved = saved_bytes(
        lambda: op(residual, z, delta, bias, weight), exclude=parameters(delta, bias, weight), inputs=[z]
    )
    assert (saved.inputs, saved.new) == (z.nbytes, new_bytes(op, residual))


@every_op
def test_autocast_changes_nothing(op: Op) -> None:
    *tensors, weight = draw(op, T, dtype=torch.float32)
    cotangents = [torch.randn(T, N) for _ in range(2)]
    expected = op(*tensors, weight)
    wanted = gradients(expected, tensors, cotangents)
    with torch.autocast("cpu", torch.bfloat16):
        results = op(*tensors, weight)
        got = gradients(results, tensors, cotangents)
    for a, b in zip([*results, *got], [*expected, *wanted], strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@every_op
def test_checkpointing(op: Op) -> None:
    *tensors, weight = draw(op, T)
    cotangents = [torch.randn(T, N, dtype=torch.float64) for _ in range(2)]
    again = checkpoint(op, *tensors, weight, use_reentrant=False)
    wanted = gradients(op(*tensors, weight), tensors, cotangents)
    assert all(map(torch.equal, gradients(again, tensors, cotangents), wanted))


@every_op
def test_one_compiled_graph(op: Op) -> None:
    *tensors, weight = draw(op, 2, T)
    cotangents = [torch.randn(2, T, N, dtype=torch.float64) for _ in range(2)]
    expected = op(*tensors, weight)
    results = torch.compile(op, backend="aot_eager", fullgraph=True)(*tensors, weight)
    assert all(map(torch.equal, results, expected))
    for got, wanted in zip(
        gradients(results, tensors, cotangents), gradients(expected, tensors, cotangents), strict=True
    ):
        assert torch.equal(got, wanted)


@every_op
def test_transforms_and_forward_mode(op: Op) -> None:
    residual, z, *rest = draw(op, 3, T)
    batched = torch.func.vmap(lambda residual, z: op(residual, z, *rest))(residual, z)
    for got, wanted in zip(batched, op(residual, z, *rest), strict=True):
        torch.testing.assert_close(got, wanted)
    assert torch.autograd.gradcheck(lambda *t: op(*t, *rest), (residual, z), check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda d: op(residual, z, d, *rest[1:]), rest[0], check_forward_ad=True)


@settings(max_examples=30)
@given(
    t=st.integers(0, 9), n=st.integers(1, 9), rank=st.integers(1, 3), step=st.integers(1, 3), offset=st.integers(0, 3)
)
@every_op
def test_any_strides_of_any_rank(op: Op, t: int, n: int, rank: int, step: int, offset: int) -> None:
    shape = (n,) if rank == 1 else (2,) * (rank - 2) + (t, n)
    spread = [torch.randn(*shape[:-1], n * step + offset)[..., offset::step][..., :n] for _ in range(2)]
    vectors = [torch.randn(n), torch.randn(n) if op in BIASED else None, torch.randn(n)]
    for got, wanted in zip(op(*spread, *vectors), op(*(s.contiguous() for s in spread), *vectors), strict=True):
        assert got.shape == shape
        torch.testing.assert_close(got, wanted)


def test_h_and_y_of_a_zero_delta_have_the_bits_of_the_frozen_layer() -> None:
    residual, z, _, _, weight = draw(add_rms_norm, 64, n=48, dtype=torch.bfloat16)
    zero = torch.zeros(48)
    h, y = gain_add_rms_norm(residual, z, zero, weight, EPS)
    assert torch.equal(h, residual + z)
    assert torch.equal(y, gain_rms_norm(h, weight, zero, EPS))
    assert torch.equal(gain_add(residual, z, zero), residual + z)


def test_a_decoder_layer_has_the_gradients_of_gained_projections() -> None:
    """Llama's: norm, mix, o_proj, add; norm, FFN, down_proj, add; and the norm that comes next."""
    *_, weight = draw(add_rms_norm, 1)
    x, o, down = (torch.randn(*s, dtype=torch.float64) for s in ((T, N), (N, N), (N, N)))
    deltas = [torch.randn(N, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    norm = partial(F.rms_norm, normalized_shape=(N,), weight=weight, eps=EPS)
    x.requires_grad_()

    h = x + torch.tanh(norm(x)) @ o.T * (1 + deltas[0])
    plain = norm(h + torch.tanh(norm(h)) @ down.T * (1 + deltas[1]))

    h, y = gain_add_rms_norm(x, torch.tanh(norm(x)) @ o.T, deltas[0], weight, EPS)
    _, fused = gain_add_rms_norm(h, torch.tanh(y) @ down.T, deltas[1], weight, EPS)
    torch.testing.assert_close(fused, plain)
    dy = torch.randn_like(plain)
    torch.testing.assert_close(
        torch.autograd.grad(fused, (x, *deltas), dy), torch.autograd.grad(plain, (x, *deltas), dy)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({1: torch.zeros(T, 3)}, ValueError, r"z must have residual's shape \(7, 6\), got \(7, 3\)"),
        ({1: torch.zeros(T, N, dtype=torch.float64)}, TypeError, "z must be torch.float32 as residual is, or narrower"),
        ({0: torch.zeros(T, N).half(), 1: torch.zeros(T, N).bfloat16()}, TypeError, "cast one of them"),
        ({0: torch.zeros(T, N).int()}, TypeError, "residual must be float64"),
        ({2: torch.zeros(3)}, ValueError, r"delta must be \[6\]"),
        ({3: torch.zeros(3)}, ValueError, r"bias must be \[6\]"),
        ({1: torch.zeros(T, N, device="meta")}, ValueError, "move them to one device"),
    ],
)
@every_op
def test_refusals(op: Op, change: dict[int, Tensor], error: type[Exception], message: str) -> None:
    given_ = [change.get(i, t) for i, t in enumerate(draw(op, T, dtype=torch.float32))]
    if 3 in change and op not in BIASED:
        pytest.skip("takes no bias")
    with pytest.raises(error, match=message):
        op(*given_)


@pytest.mark.parametrize("op", [op for op in PLAIN if op is not add], ids=lambda op: op.__name__)
def test_a_norm_is_frozen_and_as_wide_as_the_stream(op: Op) -> None:
    *given_, weight = draw(op, T, dtype=torch.float32)
    with pytest.raises(ValueError, match="weight requires a gradient"):
        op(*given_, weight.requires_grad_())
    with pytest.raises(ValueError, match=r"weight must be \[6\]"):
        op(*given_, torch.ones(3))


def test_the_bias_of_a_norm_is_frozen_and_as_wide_as_the_stream() -> None:
    residual, z, delta, _, weight = draw(add, T, dtype=torch.float32)
    with pytest.raises(ValueError, match="norm_bias requires a gradient"):
        gain_add_layer_norm(residual, z, delta, weight, torch.zeros(N, requires_grad=True))
    with pytest.raises(ValueError, match=r"norm_bias must be \[6\]"):
        gain_add_layer_norm(residual, z, delta, weight, torch.zeros(3))
    with pytest.raises(TypeError, match="norm_bias must be float64"):
        gain_add_layer_norm(residual, z, delta, weight, torch.zeros(N).int())
