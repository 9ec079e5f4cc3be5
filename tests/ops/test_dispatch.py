"""Which backend runs, and what is said when one cannot."""

import logging
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.suites import host_cost
from gain_ops import BackendUnavailable, gain_linear
from gain_ops.backends import cuda, eager, machine, obstacles, tables
from gain_ops.backends.interface import GEMMS, OPS
from gain_ops.backends.tables import Problem, Row
from gain_ops.kernels import backend as triton_backend
from gain_ops.kernels import launching, linear_backward, linear_forward
from gain_ops.kernels import tables as picks
from gain_ops.kernels.config import GemmConfig
from gain_ops.ops import dispatch
from gain_ops.ops.self_check import Checked
from gain_ops.testing import ARGUMENTS, tensors


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GAIN_OPS_BACKEND", raising=False)
    dispatch.forget()
    yield
    dispatch.forget()


def _call(backend: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return gain_linear(torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype), torch.zeros(4), backend=backend)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the interpreter is off")
def test_auto_is_eager_on_a_cpu_even_under_the_interpreter() -> None:
    assert dispatch.implementation("auto", torch.zeros(1)) is eager
    assert dispatch.implementation("triton", torch.zeros(1)) is triton_backend or torch.cuda.is_available()


def test_the_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gain_ops"):
        for _ in range(3):
            _call("auto")
    assert len(caplog.records) == 1
    assert "eager backend on cpu" in caplog.text
    assert "need a GPU" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the interpreter is off")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_explicit_backend_that_cannot_run_raises_and_says_why(dtype: torch.dtype) -> None:
    with pytest.raises(
        BackendUnavailable, match=r"backend='triton' cannot run here: .*(float64|bfloat16).*Use backend='auto'"
    ):
        _call("triton", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_backend_refuses_cpu_tensors(dtype: torch.dtype) -> None:
    with pytest.raises(
        BackendUnavailable, match="backend='cuda' cannot run here: the kernels need a GPU and the tensors"
    ):
        _call("cuda", dtype)


def test_without_the_interpreter_a_cpu_tensor_is_refused() -> None:
    code = (
        "import torch, gain_ops\n"
        "try:\n"
        "    gain_ops.gain_linear(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), backend='triton')\n"
        "except gain_ops.BackendUnavailable as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=_without_interpreter(), capture_output=True, text=True, check=True
    )
    assert "the kernels need a GPU and the tensors are on cpu" in run.stdout


def test_without_triton_everything_works_and_the_reason_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util, torch\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "import gain_ops\n"
        "print(gain_ops.gain_linear(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4)).sum().item())\n"
        "try:\n"
        "    gain_ops.gain_linear(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), backend='triton')\n"
        "except gain_ops.BackendUnavailable as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env=_without_interpreter(), capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("24.0\n")
    assert 'pip install "gain-ops[triton]"' in run.stdout


def _without_interpreter() -> dict[str, str]:
    import os

    return {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the interpreter is off")
def test_the_environment_replaces_auto_and_not_an_explicit_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAIN_OPS_BACKEND", "triton")
    assert dispatch.implementation("auto", torch.zeros(1)) is triton_backend
    assert dispatch.implementation("eager", torch.zeros(1)) is eager
    monkeypatch.setenv("GAIN_OPS_BACKEND", "fastest")
    dispatch.forget()
    with pytest.raises(ValueError, match="'fastest' is not one of auto, eager, triton, cuda"):
        _call("auto")


@pytest.mark.parametrize(
    ("name", "served"),
    [("gfx90a", True), ("gfx942", True), ("gfx950", True), ("gfx908", False), ("gfx90c", False), ("gfx1100", False)],
)
def test_which_gpus_of_rocm_are_served(monkeypatch: pytest.MonkeyPatch, name: str, served: bool) -> None:
    properties = SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    said = f"the kernels need an MI200 or later (gfx90a, gfx94x, gfx95x) and this device is {name}"
    assert obstacles.of_device("cuda", 0) == (None if served else said)


@pytest.mark.parametrize(
    ("capability", "served"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True), ((12, 0), True)]
)
def test_which_gpus_of_cuda_are_served(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], served: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    said = "the kernels need compute capability 8.0 and this device has 7.5"
    assert obstacles.of_device("cuda", 0) == (None if served else said)


def test_explain_has_a_row_an_op() -> None:
    rows = dispatch.explain("cpu", torch.float32)
    assert [op for op, _, _ in rows] == list(OPS)
    assert {backend for _, backend, _ in rows} == {"eager"}
    assert all("need a GPU" in reason for _, _, reason in rows)


def test_explain_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAIN_OPS_BACKEND", "eager")
    assert {row[1:] for row in dispatch.explain("cpu", torch.float32)} == {("eager", "GAIN_OPS_BACKEND")}
    monkeypatch.setenv("GAIN_OPS_BACKEND", "triton")
    (only,) = {row[1:] for row in dispatch.explain("cpu", torch.float64)}
    assert only[0] == "triton"
    assert "cannot run" in only[1]


HEURISTIC = GemmConfig(16, 32, 16, num_warps=4, num_stages=2, subtiles=2)
LLAMA = (8192, 4096, 4096)  # tokens, out, in


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A GPU that is not there: where Triton runs, csrc is not built, and nothing was measured; change it by its fields."""
    here = SimpleNamespace(family="sm_90", built=False)
    monkeypatch.setattr(
        dispatch,
        "_OBSTACLES",
        {"triton": lambda *_: None, "cuda": lambda *_: None if here.built else "csrc is not built"},
    )
    monkeypatch.setattr(machine, "family", lambda index: here.family)
    monkeypatch.setattr(picks, "heuristic", lambda index, m, n: HEURISTIC)
    monkeypatch.setattr(cuda, "card_fuses", lambda index: here.family == "sm_90")
    monkeypatch.setenv("GAIN_OPS_TUNED", str(tmp_path / "table.json"))
    monkeypatch.setenv("GAIN_OPS_SELF_CHECK", "0")
    return here


def _measure(op: str, family: str, size: tuple[int, int, int], *rows: Row) -> None:
    path = tables.user_path(family)
    tables.write(path, family, {tables.key(op, torch.bfloat16, *size): Problem("measured here", rows)})


@pytest.mark.parametrize("op", GEMMS)
@pytest.mark.parametrize(
    ("family", "dtype", "size", "why"),
    [
        ("sm_90", torch.float32, LLAMA, "float32"),
        ("sm_90", torch.bfloat16, (8192, 4097, 4096), "multiples of 8"),
        ("sm_90", torch.bfloat16, (8192, 4096, 100), "multiples of 8"),
        ("sm_90", torch.bfloat16, (0, 4096, 4096), "multiples of 8"),
        ("sm_80", torch.bfloat16, LLAMA, "not measured on sm_80"),
        ("gfx942", torch.float16, LLAMA, "not measured on gfx942"),
    ],
)
def test_auto_composes_where_nothing_was_measured(
    op: str, family: str, dtype: torch.dtype, size: tuple[int, int, int], why: str, gpu: SimpleNamespace
) -> None:
    gpu.family, gpu.built = family, True
    choice = dispatch.choose(op, 0, dtype, *size)
    assert (choice.way, choice.config) == ("composed", None)
    assert why in choice.reason


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("op", GEMMS)
def test_on_sm_90_the_prediction_decides_and_says_so(op: str, built: bool, gpu: SimpleNamespace) -> None:
    gpu.built = built
    found = {size: dispatch.choose(op, 0, torch.bfloat16, *size) for size in (LLAMA, (512, 1280, 1280))}
    assert all("predicted, not measured" in choice.reason for choice in found.values())
    # a fused ddelta saves no write: reading z again costs less than its epilogue
    fused = "cuda" if built else "triton"
    assert found[LLAMA].way == ("composed" if op == "ddelta_recompute" else fused)
    assert found[LLAMA].config == (HEURISTIC if found[LLAMA].way == "triton" else None)
    assert found[512, 1280, 1280].way == "composed", "40 large tiles leave most of the card idle"


def test_a_table_decides_where_there_is_one(gpu: SimpleNamespace) -> None:
    mine = GemmConfig(64, 64, 64, 4, 3, flatten=True)
    fused, composed, other = Row("triton", 5.0, asdict(mine)), Row("composed", 4.0), Row("cuda", 3.0)
    _measure("linear", "sm_90", LLAMA, composed, fused, other)
    choice = dispatch.choose("linear", 0, torch.bfloat16, *LLAMA)
    assert choice.way == "composed", "csrc is not built here"
    assert "measured, 4.0 us" in choice.reason
    assert "predicted" not in choice.reason
    gpu.built = True
    assert dispatch.choose("linear", 0, torch.bfloat16, *LLAMA).way == "cuda"
    assert "predicted" in dispatch.choose("linear_z", 0, torch.bfloat16, *LLAMA).reason
    gpu.family = "sm_80"
    _measure("linear", "sm_80", LLAMA, composed, replace(fused, us=3.5))
    choice = dispatch.choose("linear", 0, torch.bfloat16, *LLAMA)
    assert (choice.way, choice.config) == ("triton", mine)


def test_a_decision_is_a_look_up_for_every_later_call(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *of: asked.append(of) or choose(*of))
    for _ in range(3):
        dispatch._gemms("linear", 0, torch.float16, *LLAMA)
    assert len(asked) == 1
    dispatch.forget()
    dispatch._gemms("linear", 0, torch.float16, *LLAMA)
    assert len(asked) == 2


def test_a_decision_costs_the_host_little(gpu: SimpleNamespace) -> None:
    """A busy machine only adds to a time, so one run of three is enough."""
    like = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=torch.Size(LLAMA[::2]))
    weight = torch.empty(LLAMA[1:], device="meta")
    cases = {
        host_cost.BASE: host_cost.eager_cases()[host_cost.BASE],
        "decision": lambda: dispatch.gemms("linear_z", "auto", like, weight),
        "choice": lambda: dispatch.choose("linear_z", 0, torch.bfloat16, *LLAMA),
    }
    found = [host_cost.measure(cases, rounds=5, calls=20) for _ in range(3)]
    assert min(one["decision"][1] for one in found) < 0.1, found
    assert min(one["choice"][1] for one in found) > 0.1, "choosing anew at each call would be seen"


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the interpreter is off")
@pytest.mark.parametrize("op", GEMMS)
@pytest.mark.parametrize("way", ["composed", "triton", "eager"])
def test_each_way_runs_what_it_says(op: str, way: str, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tensors(8, 16, 24, torch.float16)
    arguments = [given[name] for name in ARGUMENTS[op]]
    config = HEURISTIC if way == "triton" else None
    monkeypatch.setattr(dispatch, "choose", lambda *_: dispatch.Choice(way, "", config))
    if way == "eager":
        monkeypatch.setattr(dispatch, "_OBSTACLES", {"triton": lambda *_: "no", "cuda": lambda *_: "no"})
    launched = []
    launch = launching.launch
    monkeypatch.setattr(launching, "launch", lambda kernel, *of: launched.append(kernel) or launch(kernel, *of))
    results = getattr(dispatch._gemms(op, 0, torch.float16, 8, 24, 16), op)(*arguments)
    expected = {"composed": triton_backend.COMPOSED, "triton": triton_backend, "eager": eager}[way]
    fused = {linear_forward.linear_kernel, linear_backward.linear_backward_kernel}
    assert bool(fused & {*launched}) is (way == "triton")
    assert bool(launched) is (way != "eager")
    again = getattr(expected, op)(*arguments)
    for a, b in zip(*(v if isinstance(v, tuple) else (v,) for v in (results, again)), strict=True):
        assert torch.equal(a, b)


def test_a_name_in_the_environment_runs_unchecked_whatever_was_measured(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAIN_OPS_BACKEND", "triton")
    assert dispatch._gemms("linear", 0, torch.bfloat16, *LLAMA) is triton_backend


def test_explain_says_by_what_a_layer_s_gemms_run(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    without = {op: (way, why) for op, way, why in dispatch.explain("cuda", torch.bfloat16)}
    assert "gain-ops info --shape" in without["linear"][1]
    assert without["glu"][0] == "triton"
    rows = {op: (way, why) for op, way, why in dispatch.explain("cuda", torch.bfloat16, LLAMA)}
    assert rows["linear"][0] == "triton"
    assert "predicted" in rows["linear"][1]
    assert "block_m" in rows["linear"][1]
    assert rows["ddelta_recompute"][0] == "composed"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_is_triton_on_a_gpu(dtype: torch.dtype) -> None:
    chosen = dispatch.implementation("auto", torch.zeros(1, device="cuda", dtype=dtype))
    assert isinstance(chosen, Checked)
    assert chosen.backend is triton_backend
    assert dispatch.implementation("auto", torch.zeros(1, device="cuda", dtype=torch.float64)) is eager
