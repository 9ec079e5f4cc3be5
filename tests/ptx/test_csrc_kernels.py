"""The hand-written CUDA kernels as csrc/ launches them, run as the PTX that its objects hold."""

from itertools import product

import pytest

from ptx.worker import Worker
from support import host_extension, parity

PASSES = ("scale", "backward", "ddelta", "glu", "glu_backward", "glu_ddelta", "rms_norm", "rms_norm_backward")
CALLS = [call for call in parity.CALLS if call.split()[0] in PASSES]
DTYPES = ("bfloat16", "float32", "float16")
# the fused GEMMs, by the files of their instances
GEMMS = {"linear": "linear", "linear_z": "linear_z", "backward_recompute": "recompute", "backward_input": "input"}
# small tiles, and large ones in clusters of two blocks with several tiles each
GEMM_SHAPES = [((70, 96, 136), 132), ((300, 72, 264), 2)]


@pytest.fixture(scope="module")
def simulator(worker: Worker) -> Worker:
    host_extension.parameters()  # skips where csrc was not built
    if obstacle := worker.call("ptx.csrc.launch:can_build"):
        pytest.skip(f"csrc cannot be built here: {obstacle}")
    return worker


@pytest.mark.slow
@pytest.mark.parametrize(("number", "call"), list(enumerate(CALLS)), ids=CALLS)
def test_a_call_is_right(number: int, call: str, simulator: Worker) -> None:
    """Each with 16 bytes a thread, and with an element a thread."""
    dtype = DTYPES[number % 3]
    for shape in ((37, 64, 72), (33, 29, 17)):
        assert simulator.call("ptx.csrc.launch:run", call=call, shape=shape, dtype=dtype)
    simulator.call(
        "ptx.csrc.launch:run", call=call, shape=(33, 29, 17), dtype=dtype, timing="random", together=False, seed=number
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "layout"), list(product(("scale", "backward", "glu_backward", "rms_norm_backward"), parity.LAYOUTS[1:]))
)
def test_layouts(call: str, layout: str, simulator: Worker) -> None:
    layouts = dict.fromkeys(("x", "weight", "dy", "z", "dh"), layout)
    assert simulator.call("ptx.csrc.launch:run", call=call, shape=(37, 40, 72), dtype="bfloat16", layouts=layouts)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["backward", "rms_norm", "rms_norm_backward"])
def test_wide_rows_and_several_partials(call: str, simulator: Worker) -> None:
    shape = (3, 1, 8200) if call.startswith("rms") else (130, 1, 320)
    assert simulator.call("ptx.csrc.launch:run", call=call, shape=shape, dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("timing", ["late", "early", "random"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(("shape", "multiprocessors"), GEMM_SHAPES)
@pytest.mark.parametrize("call", ["linear", "backward_recompute"])
def test_fused_gemms(
    call: str, shape: tuple[int, int, int], multiprocessors: int, layout: str, timing: str, simulator: Worker
) -> None:
    """Small tiles, and large ones in clusters of two blocks with several tiles each; some warps load, others multiply."""
    _run_gemm(simulator, call, shape, multiprocessors, "bfloat16", layout, timing)


OTHERS = [
    (call, dtype)
    for call, dtype in product(GEMMS, ("bfloat16", "float16"))
    if call in ("linear_z", "backward_input") or dtype == "float16"
]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "dtype"), OTHERS)
@pytest.mark.parametrize(("number", "of"), list(enumerate(GEMM_SHAPES)))
def test_fused_gemms_of_other_results_and_in_fp16(
    call: str, dtype: str, number: int, of: tuple[tuple[int, int, int], int], simulator: Worker
) -> None:
    layout = ("contiguous", "transposed")[(number + OTHERS.index((call, dtype))) % 2]
    _run_gemm(simulator, call, *of, dtype, layout, ("late", "random")[number])


def _run_gemm(
    simulator: Worker,
    call: str,
    shape: tuple[int, int, int],
    multiprocessors: int,
    dtype: str,
    layout: str,
    timing: str,
) -> None:
    if not simulator.call("ptx.csrc.launch:can_fuse"):
        pytest.skip("the fused GEMMs are not compiled: make cuda")
    ran = simulator.call(
        "ptx.csrc.launch:run",
        call=call,
        shape=shape,
        dtype=dtype,
        layouts={"weight": layout},
        multiprocessors=multiprocessors,
        gemm=f"{GEMMS[call]}_{dtype}",
        timing=timing,
        together=timing != "random",
    )
    assert any("cutlass" in kernel for kernel in ran)
