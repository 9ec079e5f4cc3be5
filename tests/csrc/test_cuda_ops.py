"""The ops of csrc/ in torch's dispatcher: schemas, fakes, what is said of arguments that cannot be served, no GPU needed."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gain_ops import testing

from support import host_extension
from support.parity import CALLS, DEVICE, LAYOUTS, compare, laid_out, run, tensors

pytestmark = pytest.mark.usefixtures("csrc_on_the_host")

_SCHEMAS = (host_extension.ROOT / "csrc" / "ops.cpp").read_text()
DECLARED = re.findall(r'^ +"?(?:library\.def\(")?(\w+)\(Tensor ', _SCHEMAS, re.MULTILINE)
# with what csrc/ has beyond the ops: a bias, and rows that are scaled
ARGUMENTS = {name: testing.ARGUMENTS.get(name) for name in DECLARED} | {
    "scale": ("x", "delta_in", "bias_in"),
    "scale_rows": ("weight", "delta_out"),
}
FUSED = ("linear", "linear_z", "backward_recompute", "backward_input")
ANY_STRIDES = tuple(name for name in ARGUMENTS if name not in FUSED)


def _tensors(dtype: torch.dtype = torch.bfloat16, t: int = 5, i: int = 16, o: int = 24) -> dict[str, Any]:
    own = {"bias_in": torch.randn(i).to(dtype), "norm_weight": torch.randn(o), "activation": 1}
    return tensors(t, i, o, dtype) | own


def _op(name: str) -> torch._ops.OpOverload:
    host_extension.load()
    return getattr(torch.ops.gain_ops_host, name).default


def _call(name: str, **changed: Any) -> object:
    given = _tensors() | changed
    return _op(name)(*(given[argument] for argument in ARGUMENTS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    given = _tensors(dtype)
    arguments = [given[argument] for argument in ARGUMENTS[name]]
    torch.library.opcheck(_op(name), arguments)
    if "bias" in ARGUMENTS[name][-1]:
        torch.library.opcheck(_op(name), [*arguments[:-1], None])
    if "activation" in ARGUMENTS[name]:
        torch.library.opcheck(_op(name), [None if value is given["z"] else value for value in arguments])


@pytest.mark.parametrize("name", ANY_STRIDES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_the_passes_in_any_layout_and_float32(name: str, layout: str) -> None:
    given = _tensors(torch.float32, i=15, o=29)
    arguments = [
        laid_out(t, layout) if isinstance(t, Tensor) and t.dim() == 2 else t
        for t in (given[a] for a in ARGUMENTS[name])
    ]
    torch.library.opcheck(_op(name), arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_ships_has_the_same_schemas_and_fakes(name: str) -> None:
    """opcheck needs an op that runs on this machine: that of the host, of the same objects. The shipped one is held to it."""
    host_extension.compiled()
    shipped, host = getattr(torch.ops.gain_ops_cuda, name).default, _op(name)
    assert str(shipped._schema).replace("gain_ops_cuda", "gain_ops_host") == str(host._schema)
    keys = {"CPU", "CUDA", "Meta"}
    assert {key for key in keys if torch._C._dispatch_has_kernel_for_dispatch_key(shipped.name(), key)} >= {
        "CPU",
        "CUDA",
    }
    with FakeTensorMode():
        given = _tensors()
        arguments = [given[argument] for argument in ARGUMENTS[name]]
        results = [op(*arguments) for op in (shipped, host)]
    ours, theirs = (r if isinstance(r, tuple) else (r,) for r in results)
    assert [(t.shape, t.stride(), t.dtype) for t in ours] == [(t.shape, t.stride(), t.dtype) for t in theirs]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_cpu_tensor_is_told_what_is_missing(name: str) -> None:
    host_extension.compiled()
    given = _tensors()
    with pytest.raises(
        RuntimeError, match=rf"gain_ops_cuda::{name}: \w+ is on cpu, and the CUDA kernels take tensors on"
    ):
        getattr(torch.ops.gain_ops_cuda, name)(*(given[argument] for argument in ARGUMENTS[name]))


_BAD = [
    (
        "linear",
        {"x": torch.zeros(5, 16, dtype=torch.float64)},
        "x is Double, and the CUDA kernels compute in Float, Half",
    ),
    (
        "linear",
        {"x": torch.zeros(2, 5, 16, dtype=torch.bfloat16)},
        r"x has shape \[2, 5, 16\], expected two dimensions",
    ),
    (
        "linear",
        {"weight": torch.zeros(24, 8, dtype=torch.bfloat16)},
        r"weight has shape \[24, 8\], expected \[24, 16\]",
    ),
    ("linear", {"weight": torch.zeros(24, 16)}, "weight is Float and x is BFloat16; they must agree"),
    ("linear", {"delta_out": torch.zeros(23)}, r"delta has shape \[23\], expected \[24\]"),
    ("linear", {"delta_out": torch.zeros(24).bfloat16()}, "delta is BFloat16, expected Float"),
    ("linear", {"delta_out": torch.zeros(48)[::2]}, "delta has stride 2, expected contiguous"),
    ("linear", {"bias": torch.zeros(24)}, "bias is Float, expected BFloat16"),
    ("linear", {"x": torch.zeros(5, 18, dtype=torch.bfloat16)[:, 2:]}, r"x has strides \[18, 1\] and a base at"),
    ("linear", {"x": torch.zeros(16, 5, dtype=torch.bfloat16).t()}, r"x has strides \[1, 5\]"),
    ("linear", {"x": torch.zeros(1, 16, dtype=torch.bfloat16).expand(5, 16)}, r"x has strides \[0, 1\]"),
    ("linear", {"x": torch.zeros(48, dtype=torch.bfloat16).as_strided((5, 16), (8, 1))}, r"x has strides \[8, 1\]"),
    ("backward_input", {"x": torch.zeros(1, 16, dtype=torch.bfloat16).expand(5, 16)}, r"x has strides \[0, 1\]"),
    ("linear_z", {"weight": torch.zeros(24, 32, dtype=torch.bfloat16)[:, ::2]}, r"weight has strides \[32, 2\]"),
    ("backward", {"z": torch.zeros(5, 23, dtype=torch.bfloat16)}, r"z has shape \[5, 23\], expected \[5, 24\]"),
    ("backward", {"z": torch.zeros(5, 24)}, "z is Float and dy is BFloat16"),
    ("ddelta", {"z": torch.zeros(4, 24, dtype=torch.bfloat16)}, r"z has shape \[4, 24\], expected \[5, 24\]"),
    (
        "backward_recompute",
        {"x": torch.zeros(6, 16, dtype=torch.bfloat16)},
        r"x has shape \[6, 16\], expected \[5, 16\]",
    ),
    ("backward_recompute", {"dy": torch.zeros(24, 5, dtype=torch.bfloat16).t()}, r"dy has strides \[1, 5\]"),
    ("backward_input", {"delta_in": torch.zeros(24)}, r"delta has shape \[24\], expected \[16\]"),
    ("scale_rows", {"delta_out": torch.zeros(16)}, r"delta has shape \[16\], expected \[24\]"),
    ("glu", {"activation": 4}, "activation is 4, expected 0 to 3"),
    ("glu", {"z": torch.zeros(5, 24)}, "up is Float and gate is BFloat16"),
    ("glu_backward", {"dh": torch.zeros(4, 24, dtype=torch.bfloat16)}, r"dh has shape \[4, 24\], expected \[5, 24\]"),
    ("glu_ddelta", {"activation": -1}, "activation is -1, expected 0 to 3"),
    ("rms_norm", {"norm_weight": torch.zeros(24).bfloat16()}, "weight is BFloat16, expected Float"),
    ("rms_norm", {"dy": torch.zeros(5, 24_001, dtype=torch.bfloat16)}, "x has 24001 columns, expected 1 to 24000"),
    ("rms_norm_backward", {"r": torch.zeros(4)}, r"r has shape \[4\], expected \[5\]"),
    ("scale", {"bias_in": torch.zeros(24).bfloat16()}, r"bias has shape \[24\], expected \[16\]"),
]


@pytest.mark.parametrize(("name", "changed", "message"), _BAD, ids=range(len(_BAD)))
def test_every_argument_is_checked_and_the_message_says_what_came(
    name: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"gain_ops_cuda::{name}: {message}"):
        _call(name, **changed)


@pytest.mark.parametrize(("i", "o"), [(12, 24), (16, 20)])
def test_rows_that_tma_cannot_address_are_refused_by_the_fused_ops(i: int, o: int) -> None:
    given = _tensors(i=i, o=o)
    for name in ("linear", "backward_recompute", "backward_input"):
        with pytest.raises(RuntimeError, match="multiples of"):
            _op(name)(*(given[argument] for argument in ARGUMENTS[name]))


def test_one_row_of_any_stride_is_served() -> None:
    """There is no next row, and TMA would still refuse the distance to it."""
    x = torch.randn(4, 17).bfloat16()[:1, :16]
    dy = torch.randn(4, 33).bfloat16()[:1, :24]
    given = _tensors(t=1) | {"x": x, "dy": dy}
    for name in ("linear", "backward_recompute", "backward_input"):
        results = [_op(name)(*(tensors[a] for a in ARGUMENTS[name])) for tensors in (given, _contiguous(given))]
        ours, theirs = (r if isinstance(r, tuple) else (r,) for r in results)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _contiguous(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: t.clone(memory_format=torch.contiguous_format) if isinstance(t, Tensor) else t
        for name, t in given.items()
    }


def test_float32_is_refused_by_the_fused_ops() -> None:
    given = _tensors(torch.float32)
    with pytest.raises(RuntimeError, match="the operands are Float and the fused GEMM computes in Half and BFloat16"):
        _op("linear")(*(given[argument] for argument in ARGUMENTS["linear"]))


def _in_a_new_process(code: str, **environment: str) -> str:
    """What it prints. The library reads GAIN_OPS_SM_MARGIN once, and a thread has a context for good."""
    host_extension.parameters()
    environment = os.environ | {"PYTHONPATH": str(Path(host_extension.__file__).parents[1])} | environment
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


_LINEAR_ON_THE_HOST = """
import torch
from support import host_extension
host_extension.load()
x = torch.zeros(8, 16, dtype=torch.bfloat16)
try:
    torch.ops.gain_ops_host.linear(x, x, torch.zeros(8), None)
    print(*host_extension.last_gemm())
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_another_card_is_referred_to_triton() -> None:
    told = _in_a_new_process(_LINEAR_ON_THE_HOST, GAIN_OPS_TEST_CAPABILITY="80")
    assert re.search(
        r"compute capability 8.0 and the fused GEMM needs sm_90: the triton backend serves this card", told
    )


@pytest.mark.slow
@pytest.mark.parametrize(("margin", "multiprocessors"), [("0", 132), ("16", 116), ("200", 1)])
def test_a_margin_leaves_multiprocessors_to_others(margin: str, multiprocessors: int) -> None:
    assert _in_a_new_process(_LINEAR_ON_THE_HOST, GAIN_OPS_SM_MARGIN=margin) == f"128 {multiprocessors}\n"


@pytest.mark.slow
def test_a_margin_that_is_no_number_is_refused() -> None:
    told = _in_a_new_process(_LINEAR_ON_THE_HOST, GAIN_OPS_SM_MARGIN="-1")
    assert "GAIN_OPS_SM_MARGIN='-1', expected a number of multiprocessors to leave free, such as 16" in told


# three rows of tiles, one more than a cluster has, and columns that end within either tile: one wave of the large tile
# on 4 multiprocessors where the small one needs two
_WITHIN_A_TILE = (300, 136, 200)
_TILES = [pytest.param(4, 256, id="128x256"), pytest.param(132, 128, id="128x128")]


@pytest.mark.parametrize("call", [name for name in CALLS if name.split()[0] in FUSED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("multiprocessors", "columns"), _TILES)
@pytest.mark.skipif(DEVICE == "cuda", reason="the tile follows the card's multiprocessors")
def test_each_tile_where_the_operands_end_within_it(
    call: str, dtype: torch.dtype, multiprocessors: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAIN_OPS_TEST_MULTIPROCESSORS", str(multiprocessors))
    compare(host_extension.backend(), call, tensors(*_WITHIN_A_TILE, dtype))
    assert host_extension.last_gemm() == (columns, multiprocessors)


@pytest.mark.gpu
@pytest.mark.parametrize(("multiprocessors", "columns"), _TILES)
def test_each_tile_of_the_card_where_the_operands_end_within_it(multiprocessors: int, columns: int) -> None:
    """The margin leaves as many multiprocessors as make csrc/plan.cpp choose the tile."""
    code = f"""
import torch
from support import host_extension
from support.parity import CALLS, compare, tensors
for dtype in (torch.bfloat16, torch.float16):
    for call in CALLS:
        if call.split()[0] in {FUSED}:
            compare(host_extension.backend(), call, tensors(*{_WITHIN_A_TILE}, dtype))
"""
    host_extension.compiled()
    margin = max(0, torch.cuda.get_device_properties(0).multi_processor_count - multiprocessors)
    _in_a_new_process(code, GAIN_OPS_SM_MARGIN=str(margin))


@pytest.mark.gpu
def test_a_thread_whose_first_work_is_a_fused_gemm() -> None:
    """It has no context yet, which TMA's descriptors need and torch's device guard does not make."""
    code = """
import threading
import torch
from support import host_extension
host_extension.compiled()
x, delta = torch.ones(8, 16, device="cuda", dtype=torch.bfloat16), torch.zeros(8, device="cuda")
torch.ops.gain_ops_cuda.linear(x, x, delta, None)
found = []
thread = threading.Thread(target=lambda: found.append(torch.ops.gain_ops_cuda.linear(x, x, delta, None)))
thread.start()
thread.join()
print(found[0].sum().item())
"""
    host_extension.compiled()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused GEMMs need sm_90")
    assert float(_in_a_new_process(code)) == 8 * 8 * 16


_VECTORS = ("delta_out", "delta_in", "norm_weight", "bias", "bias_in")


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vectors_may_start_anywhere(name: str, dtype: torch.dtype) -> None:
    """A view that starts between two multiples of 16 bytes is read one element at a time, to the same sums but for rounding."""
    if name in FUSED and dtype == torch.float32:
        return
    given = _tensors(dtype)
    shifted = given | {n: torch.cat([given[n].new_full((1,), float("nan")), given[n]])[1:] for n in _VECTORS}
    assert all(shifted[n].data_ptr() % 16 for n in _VECTORS)
    results = [_op(name)(*(tensors[a] for a in ARGUMENTS[name])) for tensors in (shifted, given)]
    ours, theirs = (r if isinstance(r, tuple) else (r,) for r in results)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_backend_keeps_the_wide_path_where_a_vector_starts_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = host_extension.backend()
    if DEVICE == "cuda":
        pytest.skip("a copy of the backend is watched")
    given = tensors(5, 16, 24, torch.float16)
    seen: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> Any:
                seen.extend(t.data_ptr() % 16 for t in arguments if isinstance(t, Tensor) and t.dim() == 1)
                return getattr(torch.ops.gain_ops_host, name)(*arguments)

            return call

    monkeypatch.setattr(backend, "_ops", Watched())
    for name in ("delta_out", "delta_in", "norm_weight", "bias"):
        given[name] = torch.cat([given[name][:1], given[name]])[1:]
    for call in CALLS:
        run(backend, call, given)
    assert seen
    assert not any(seen)
