"""The fused backends against reference.py in fp64: on a GPU where there is one, else on the CPU.

There Triton's kernels run under its interpreter, which computes wrong bfloat16 dots, and those of csrc/ as
host_extension.py says, in every dtype.
"""

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gain_ops import reference
from gain_ops.kernels import backend as triton_backend
from gain_ops.kernels import config
from gain_ops.testing import assert_no_worse_than_torch

from support import host_extension
from support.parity import CALLS, DEVICE, LAYOUTS, compare, laid_out, run, tensors
from support.shapes import EMPTY, FUSED, PRODUCTION, SMALL

DTYPES = {
    "triton": [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else []),
    "cuda": [torch.float32, torch.float16, torch.bfloat16],
}
BACKENDS = list(DTYPES)
BACKEND_DTYPES = [pytest.param(b, d, id=f"{b}-{str(d)[6:]}") for b in BACKENDS for d in DTYPES[b]]
HALF = {backend: [dtype for dtype in dtypes if dtype != torch.float32] for backend, dtypes in DTYPES.items()}
GEMMS = ("linear", "linear without bias", "linear_z", "backward_recompute", "ddelta_recompute", "backward_input")
# the passes of csrc/ take 16 bytes a thread at these sizes too; Triton's are the same code at every size
HALF_CALLS = [(b, d, c) for b in BACKENDS for d in HALF[b] for c in (CALLS if b == "cuda" else GEMMS)]
BACKEND_HALF = [pytest.param(b, d, c, id=f"{b}-{str(d)[6:]}-{c}") for b, d, c in HALF_CALLS]

pytestmark = pytest.mark.usefixtures("csrc_on_the_host", "poisoned")


def _module(backend: str) -> ModuleType:
    return triton_backend if backend == "triton" else host_extension.backend()


def _small_cases() -> Iterator[Any]:
    """Every backend, dtype and shape; but the interpreter takes seconds for many programs, and draws such shapes below."""
    for backend, dtypes in DTYPES.items():
        interpreted = backend == "triton" and DEVICE == "cpu"
        for dtype, (number, shape) in itertools.product(dtypes, enumerate(SMALL)):
            if interpreted and shape in ((32, 64, 48), (37, 64, 48)):
                continue
            slow = interpreted and shape == SMALL[4] and dtype == torch.float32
            marks = (pytest.mark.slow,) if slow else ()
            yield pytest.param(backend, dtype, shape, id=f"{backend}-{str(dtype)[6:]}-shape{number}", marks=marks)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("backend", "dtype", "shape"), list(_small_cases()))
def test_no_worse_than_plain_torch(call: str, backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    compare(_module(backend), call, tensors(*shape, dtype))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", EMPTY)
def test_empty(call: str, backend: str, shape: tuple[int, int, int]) -> None:
    for dtype in DTYPES[backend]:
        compare(_module(backend), call, tensors(*shape, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_shape_and_strides(call: str, backend: str, data: st.DataObject) -> None:
    # multiples of 8 as often as not: what the fused GEMMs take
    size = st.integers(1, 70) | st.integers(1, 9).map(lambda eights: 8 * eights)
    t, i, o = (data.draw(size, label=name) for name in ("T", "in", "out"))
    torch.manual_seed(t + 100 * i + 10_000 * o)
    dtype = data.draw(st.sampled_from(DTYPES[backend]), label="dtype")
    arguments = tensors(t, i, o, dtype)
    for name in ("x", "weight", "dy", "z", "dh"):
        arguments[name] = laid_out(arguments[name], data.draw(st.sampled_from(LAYOUTS), label=name))
    compare(_module(backend), call, arguments)


# the interpreter takes seconds for many tiles: in make test Triton's kernels get few
ON_FEW_TILES = {"cuda": FUSED, "triton": [(8, 16, 8), (72, 40, 136)]}
FUSED_CASES = [
    pytest.param(
        b,
        d,
        c,
        shape,
        id=f"{b}-{str(d)[6:]}-{c}-shape{n}",
        marks=() if DEVICE == "cuda" or shape in ON_FEW_TILES[b] else pytest.mark.slow,
    )
    for b, d, c in HALF_CALLS
    for n, shape in enumerate(dict.fromkeys([*FUSED, *ON_FEW_TILES[b]]))
]


@pytest.mark.parametrize(("backend", "dtype", "call", "shape"), FUSED_CASES)
@pytest.mark.parametrize("transposed", [False, True])
def test_operands_that_are_fused(
    backend: str, dtype: torch.dtype, call: str, shape: tuple[int, int, int], transposed: bool
) -> None:
    arguments = tensors(*shape, dtype)
    if transposed:
        arguments["weight"] = laid_out(arguments["weight"], "transposed")
    compare(_module(backend), call, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "dtype", "call"), BACKEND_HALF)
@pytest.mark.parametrize("shape", PRODUCTION)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_tiles_that_ship_at_sizes_of_many_tiles(
    backend: str, dtype: torch.dtype, call: str, shape: tuple[int, int, int], transposed: bool
) -> None:
    test_operands_that_are_fused(backend, dtype, call, shape, transposed)


def test_a_production_shape_reaches_triton_s_large_tiles() -> None:
    t, _, n = PRODUCTION[0]
    for arch, large in (("sm_80", (128, 128)), ("sm_90", (128, 256)), ("sm_100", (128, 256))):
        pick = config.gemm_config(arch, t, n, 132)
        assert (pick.block_m, pick.block_n) == large
        assert -(-t // pick.block_m) % 2 == 1
        assert t % pick.block_m == 1
        assert 0 < n % pick.block_n <= pick.block_n // 2, "half of the last tile is past the end"


@pytest.mark.parametrize("call", ["linear", "linear_z", "backward_recompute", "backward_input"])
@pytest.mark.parametrize("shape", [(16, 100, 64), (16, 64, 100), (16, 100, 100)])
@pytest.mark.parametrize("layout", ["contiguous", "padded", "transposed"])
def test_sums_that_the_fused_gemms_cannot_take(call: str, shape: tuple[int, int, int], layout: str) -> None:
    """Rows of 16 bytes whose last 16 are not all of the sum's: TMA could read them, but not this k."""
    arguments = tensors(*shape, torch.float16)
    for name in ("x", "dy"):
        arguments[name] = laid_out(arguments[name], "padded")
    arguments["weight"] = laid_out(arguments["weight"], layout)
    compare(host_extension.backend(), call, arguments)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_results_are_contiguous_whatever_the_operands_are(call: str, layout: str) -> None:
    """Also of what the CUDA backend leaves to plain torch; compare() asks for the strides."""
    arguments = tensors(6, 5, 7, torch.float32)
    for name in ("x", "dy", "z", "dh", "h"):
        arguments[name] = laid_out(arguments[name], layout)
    compare(_module("cuda"), call, arguments)


VECTORS = ("delta_out", "delta_in", "bias", "norm_weight")


@pytest.mark.parametrize("call", [call for call, arguments in CALLS.items() if {*VECTORS} & {*arguments}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_of_any_stride(call: str, backend: str) -> None:
    """A delta, a bias and the weight of a norm may be every other number of a longer tensor."""
    arguments = tensors(8, 16, 24, torch.float16)
    for name in VECTORS:
        (arguments[name],) = laid_out(arguments[name][None], "every other")
        assert not arguments[name].is_contiguous()
    compare(_module(backend), call, arguments)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_default_dtype_changes_nothing(call: str, backend: str) -> None:
    arguments = tensors(9, 16, 24, torch.float16)
    expected = run(_module(backend), call, arguments)
    torch.set_default_dtype(torch.bfloat16)
    try:
        results = run(_module(backend), call, arguments)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [r.dtype for r in results] == [e.dtype for e in expected]
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("backend", "dtype"), [(backend, dtypes[-1]) for backend, dtypes in DTYPES.items()])
def test_the_same_bits_on_a_second_run(call: str, backend: str, dtype: torch.dtype) -> None:
    arguments = tensors(72, 24, 40, dtype)  # partials of more than one chunk of rows
    first, second = (run(_module(backend), call, arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_dead_gains_and_dead_rows(backend: str, dtype: torch.dtype) -> None:
    t = tensors(40, 32, 32, dtype)
    t["delta_out"][:5], t["delta_in"][:5] = -1, -1
    t["weight"][3:9] = 0
    t["z"][:, 3:9] = 0
    for call in CALLS:
        compare(_module(backend), call, t)
    _, ddelta = _module(backend).backward_recompute(t["dy"], t["x"], t["weight"], t["delta_out"])
    assert torch.equal(ddelta[3:9], torch.zeros(6, device=DEVICE)), "an all-zero row of W has a zero gradient, exactly"


@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_a_zero_delta_gives_the_bits_of_the_plain_product(backend: str, dtype: torch.dtype) -> None:
    t = tensors(40, 32, 48, dtype)
    t["delta_out"].zero_()
    y, z = _module(backend).linear_z(t["x"], t["weight"], t["delta_out"], None)
    assert torch.equal(y, z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_values_stay_in_their_row_and_column(backend: str) -> None:
    for dtype in DTYPES[backend]:
        t = tensors(20, 16, 24, dtype)
        t["x"][3, 5], t["weight"][7, 2] = float("inf"), float("nan")
        (y,) = run(_module(backend), "linear", t)
        assert torch.equal(y.isfinite(), run(reference, "linear", t)[0].isfinite())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_past_two_to_the_31(backend: str) -> None:
    t, n = 140_000, 16_384
    dy = torch.randn(t, n, device="cuda", dtype=torch.bfloat16)
    delta = torch.randn(n, device="cuda")
    dz, ddelta = _module(backend).backward(dy, dy, delta)
    last = slice(t - 128, t)
    assert torch.equal(dz[last], reference.scale(dy[last], delta))
    exact = torch.stack([part.double().square().sum(0) for part in dy.split(1024)]).sum(0)
    assert_no_worse_than_torch("ddelta", ddelta, dy.float().square().sum(0), exact)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_launches_follow_the_stream_and_can_be_captured(backend: str) -> None:
    arguments = tensors(256, 512, 256, torch.bfloat16)
    expected = [run(_module(backend), call, arguments) for call in CALLS]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [run(_module(backend), call, arguments) for call in CALLS]
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(captured, expected, strict=True):
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
