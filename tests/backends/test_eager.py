"""The eager backend against reference.py: many chunks of rows, any layout, the same bits, and the memory that it needs."""

import pytest
import torch
from torch import Tensor

from benchmarks.suites.memory import allocator_peak
from gain_ops import reference
from gain_ops.backends import eager
from gain_ops.measure.peak_bytes import peak_bytes
from gain_ops.testing import ARGUMENTS

from support.parity import CALLS, LAYOUTS, compare, laid_out, run, tensors
from support.shapes import EMPTY, SMALL

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one feature: of many tokens, as five numbers are too few for a rule of norms
SHAPES = [*SMALL[:-1], (500, 1, 1), *EMPTY]
# a combine only gathers
PASSES = [call for call, arguments in CALLS.items() if not {"weight", "order"} & {*arguments}]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_plain_torch(call: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        compare(eager, call, tensors(*shape, dtype))


class TestChunks:
    """Several chunks of rows, the last one shorter."""

    @pytest.fixture(autouse=True)
    def _three_rows_of_24_features(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eager, "_CACHED", 3 * 24)

    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_any_layout(self, call: str, layout: str) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            given = tensors(20, 16, 24, dtype)
            given |= {name: laid_out(given[name], layout) for name in ("x", "weight", "dy", "z", "dh", "h")}
            compare(eager, call, given)

    @pytest.mark.parametrize("call", CALLS)
    def test_fp64_is_the_reference(self, call: str) -> None:
        given = tensors(20, 16, 24, torch.float64)
        torch.testing.assert_close(run(eager, call, given), run(reference, call, given))

    @pytest.mark.parametrize("call", ["backward", "rms_norm_backward"])
    def test_a_sum_over_many_of_one_sign_is_as_exact(self, call: str) -> None:
        given = {n: v.abs() if isinstance(v, Tensor) else v for n, v in tensors(3000, 1, 24, torch.float32).items()}
        compare(eager, call, given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_map_has_the_bits_of_the_reference(dtype: torch.dtype, biased: bool) -> None:
    given = tensors(7, 5, 4, dtype)
    arguments = (given["x"], given["weight"], given["delta_out"], given["bias"] if biased else None)
    y = reference.linear(*arguments)
    assert torch.equal(eager.linear(*arguments), y)
    assert torch.equal(eager.linear_z(*arguments)[0], y)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("call", PASSES)
def test_beside_its_results_a_pass_needs_some_chunks(call: str, dtype: torch.dtype) -> None:
    t, n = 8 * eager._CACHED // 256, 256
    given = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in tensors(t, 1, n, dtype).items()
    } | {"x": torch.zeros(t, n, dtype=dtype, device="meta"), "delta_in": torch.zeros(n, device="meta")}
    results = sum(result.nbytes for result in run(eager, call, given))
    # seven in 16 bits at most: three tensors read, two written, two to write on
    chunks = 2 if dtype == torch.float32 else 7
    per_feature_and_row = 64 * (t + n)
    peak = peak_bytes(lambda: run(eager, call, given), exclude=[v for v in given.values() if isinstance(v, Tensor)])
    assert peak <= results + chunks * 4 * eager._CACHED + per_feature_and_row


@pytest.mark.parametrize("call", ["linear", "linear_z", "glu", "rms_norm"])
def test_bytes_that_a_cpu_gives_out(call: str) -> None:
    t, n = 4 * eager._CACHED // 256, 256
    given = tensors(t, 16, n, torch.float32)
    results = sum(result.nbytes for result in run(eager, call, given))
    assert allocator_peak(lambda: run(eager, call, given)) <= results + 4 * eager._CACHED + 64 * (t + n)


@pytest.mark.parametrize("call", [call for call in ARGUMENTS if "backward" in call and call in PASSES])
def test_the_same_bits_on_a_second_run_and_by_another_number_of_threads(call: str) -> None:
    given = tensors(300, 1, 512, torch.float32)
    threads = torch.get_num_threads()
    first, second = run(eager, call, given), run(eager, call, given)
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        third = run(eager, call, given)
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
