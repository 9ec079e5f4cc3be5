"""The Triton kernels against reference.py in fp64: on a GPU where there is one, else under Triton's interpreter.

The interpreter computes wrong bfloat16 dots, so bfloat16 runs on a GPU alone.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gain_ops import kernels, reference
from gain_ops.kernels import linear_forward, matmul_reduce, rows
from gain_ops.kernels._common import aligned
from gain_ops.kernels.config import GemmConfig

from rules import assert_no_worse_than_torch
from shapes import EMPTY, SMALL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

pytestmark = pytest.mark.usefixtures("poisoned")


def _tensors(t: int, i: int, o: int, dtype: torch.dtype) -> dict[str, Tensor]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    return {
        "x": make(t, i).to(dtype),
        "weight": (make(o, i) / max(i, 1) ** 0.5).to(dtype),
        "dy": make(t, o).to(dtype),
        "z": make(t, o).to(dtype),
        "delta_out": 0.3 * make(o),
        "delta_in": 0.3 * make(i),
        "bias": make(o).to(dtype),
        "no bias": None,
    }


CALLS = {
    "scale": ("x", "delta_in"),
    "linear": ("x", "weight", "delta_out", "bias"),
    "linear without bias": ("x", "weight", "delta_out", "no bias"),
    "linear_z": ("x", "weight", "delta_out", "bias"),
    "linear_input": ("x", "weight", "delta_in", "bias"),
    "backward": ("dy", "z", "delta_out"),
    "ddelta": ("dy", "z"),
    "backward_recompute": ("dy", "x", "weight", "delta_out"),
    "ddelta_recompute": ("dy", "x", "weight"),
    "backward_input": ("dy", "x", "weight", "delta_in"),
}


def _compare(call: str, tensors: dict[str, Tensor]) -> None:
    name = call.split()[0]
    arguments = [tensors[argument] for argument in CALLS[call]]
    ours = getattr(kernels, name)(*arguments)
    plain = getattr(reference, name)(*arguments)
    truth = getattr(reference, name)(*(None if a is None else a.double() for a in arguments))
    magnitude = getattr(reference, name)(*(None if a is None else a.double().abs() for a in arguments))
    results = (v if isinstance(v, tuple) else (v,) for v in (ours, plain, truth, magnitude))
    for position, (result, torchs, exact, size) in enumerate(zip(*results, strict=True)):
        assert (result.dtype, result.stride()) == (torchs.dtype, torchs.contiguous().stride())
        assert_no_worse_than_torch(f"{call}[{position}]", result, torchs, exact, size)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL)
def test_no_worse_than_plain_torch(call: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    _compare(call, _tensors(*shape, dtype))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", EMPTY)
def test_empty(call: str, shape: tuple[int, int, int]) -> None:
    _compare(call, _tensors(*shape, torch.float32))


@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_shape_and_strides(call: str, data: st.DataObject) -> None:
    t, i, o = (data.draw(st.integers(1, 70), label=name) for name in ("T", "in", "out"))
    torch.manual_seed(t + 100 * i + 10_000 * o)
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    tensors = _tensors(t, i, o, dtype)
    for name in ("x", "weight", "dy", "z"):
        layout = data.draw(
            st.sampled_from(["contiguous", "transposed", "padded", "every other", "expanded"]), label=name
        )
        tensors[name] = _laid_out(tensors[name], layout)
    _compare(call, tensors)


def _laid_out(t: Tensor, layout: str) -> Tensor:
    rows, columns = t.shape
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "padded":
        padded = t.new_full((rows, columns + 8), float("nan"))
        padded[:, :columns] = t
        return padded[:, :columns]
    if layout == "every other":
        spread = t.new_full((rows, 2 * columns), float("nan"))
        spread[:, ::2] = t
        return spread[:, ::2]
    if layout == "expanded":
        return t[:1].expand(rows, columns)
    return t


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_a_second_run(call: str, dtype: torch.dtype) -> None:
    tensors = _tensors(200, 48, 40, dtype)
    arguments = [tensors[argument] for argument in CALLS[call]]
    runs = [getattr(kernels, call.split()[0])(*arguments) for _ in range(2)]
    for first, second in zip(*(r if isinstance(r, tuple) else (r,) for r in runs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_gains_and_dead_rows(dtype: torch.dtype) -> None:
    tensors = _tensors(40, 32, 32, dtype)
    tensors["delta_out"][:5], tensors["delta_in"][:5] = -1, -1
    tensors["weight"][3:9] = 0
    tensors["z"][:, 3:9] = 0
    for call in CALLS:
        _compare(call, tensors)
    ddelta = kernels.backward_recompute(tensors["dy"], tensors["x"], tensors["weight"], tensors["delta_out"])[1]
    assert torch.equal(ddelta[3:9], torch.zeros(6, device=DEVICE)), "an all-zero row of W has a zero gradient, exactly"


def test_non_finite_values_stay_in_their_row_and_column() -> None:
    t = _tensors(20, 16, 24, torch.float32)
    t["x"][3, 5], t["weight"][7, 2] = float("inf"), float("nan")
    y = kernels.linear(t["x"], t["weight"], t["delta_out"], t["bias"])
    assert torch.equal(y.isfinite(), reference.linear(t["x"], t["weight"], t["delta_out"], t["bias"]).isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("use_tma", [False, True])
@pytest.mark.parametrize("subtiles", [1, 2])
@pytest.mark.parametrize("persistent", [False, True])
def test_every_path_of_the_gemm_kernels(
    dtype: torch.dtype, transposed: bool, use_tma: bool, subtiles: int, persistent: bool
) -> None:
    """Descriptors and pointers, both layouts of W, whole and split stores, a grid of tiles and a persistent one."""
    t = _tensors(72, 48, 80, dtype)
    x, dy, delta = t["x"], t["dy"], t["delta_out"]
    weight = _laid_out(t["weight"], "transposed") if transposed else t["weight"]
    assert aligned(x, weight, dy)
    config = GemmConfig(
        16, 32, 16, num_warps=4, num_stages=2, subtiles=subtiles, group_m=2, persistent=persistent, use_tma=use_tma
    )
    exact = [v.double() for v in (x, weight, delta, t["bias"], dy)]
    y, z = torch.empty_like(dy), torch.empty_like(dy)
    linear_forward.launch(x, weight, delta, t["bias"], y, z, config)
    plain, truth = reference.linear_z(x, weight, delta, t["bias"]), reference.linear_z(*exact[:4])
    assert_no_worse_than_torch("y", y, plain[0], truth[0])
    assert_no_worse_than_torch("z", z, plain[1], truth[1])
    plain_dz, plain_sum = reference.backward_recompute(dy, x, weight, delta)
    truth_dz, truth_sum = reference.backward_recompute(exact[4], exact[0], exact[1], exact[2])
    for writes in ("c", "acc", "nothing"):
        out = None if writes == "nothing" else torch.empty_like(dy)
        sums = matmul_reduce.launch(x, weight, dy, None if out is None else delta, out, writes, config)
        assert_no_worse_than_torch(f"sums, {writes}", sums, plain_sum, truth_sum)
        if writes == "c":
            assert_no_worse_than_torch("gain * c", out, plain_dz, truth_dz)
        if writes == "acc":
            unbiased = reference.linear(*exact[:3], None)
            assert_no_worse_than_torch("gain * acc", out, reference.linear(x, weight, delta, None), unbiased)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("t", "scaled"), [(16, (16, 24)), (40, (40, 24)), (41, (40, 24))])
def test_the_input_side_scales_the_smaller_operand_in_one_pass(
    t: int, scaled: tuple[int, int], transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = _tensors(t, 24, 40, torch.float32)
    if transposed:
        tensors["weight"] = _laid_out(tensors["weight"], "transposed")
    passes: list[tuple[int, ...]] = []
    one_pass = rows._scale

    def record(x: Tensor, *arguments: object, **options: object) -> Tensor:
        passes.append(tuple(sorted(x.shape, reverse=True)))
        return one_pass(x, *arguments, **options)

    monkeypatch.setattr(rows, "_scale", record)
    _compare("linear_input", tensors)
    assert passes == [tuple(sorted(scaled, reverse=True))]


@pytest.mark.gpu
@pytest.mark.slow
def test_addresses_past_two_to_the_31() -> None:
    t, n = 140_000, 16_384
    dy = torch.randn(t, n, device="cuda", dtype=torch.bfloat16)
    delta = torch.randn(n, device="cuda")
    dz, ddelta = kernels.backward(dy, dy, delta)
    last = slice(t - 128, t)
    assert torch.equal(dz[last], reference.scale(dy[last], delta))
    exact = torch.stack([part.double().square().sum(0) for part in dy.split(1024)]).sum(0)
    assert_no_worse_than_torch("ddelta", ddelta, dy.float().square().sum(0), exact)


@pytest.mark.gpu
def test_launches_follow_the_stream_and_can_be_captured() -> None:
    t = _tensors(256, 512, 256, torch.bfloat16)
    calls = [(call.split()[0], [t[argument] for argument in CALLS[call]]) for call in CALLS]
    expected = [getattr(kernels, name)(*arguments) for name, arguments in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [getattr(kernels, name)(*arguments) for name, arguments in calls]
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, expected, strict=True):
        for g, w in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, wanted)), strict=True):
            assert torch.equal(g, w)
