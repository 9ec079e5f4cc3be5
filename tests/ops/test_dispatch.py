"""Which backend runs, and what is said when one cannot."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from gain_ops import BackendUnavailable, gain_linear
from gain_ops.backends import eager
from gain_ops.backends.interface import OPS
from gain_ops.kernels import backend as triton_backend
from gain_ops.ops import dispatch


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GAIN_OPS_BACKEND", raising=False)
    dispatch._implementation.cache_clear()
    yield
    dispatch._implementation.cache_clear()


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
    dispatch._implementation.cache_clear()
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
    assert dispatch._device_obstacle("cuda", 0) == (None if served else said)


@pytest.mark.parametrize(
    ("capability", "served"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True), ((12, 0), True)]
)
def test_which_gpus_of_cuda_are_served(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], served: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    said = "the kernels need compute capability 8.0 and this device has 7.5"
    assert dispatch._device_obstacle("cuda", 0) == (None if served else said)


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_is_triton_on_a_gpu(dtype: torch.dtype) -> None:
    assert dispatch.implementation("auto", torch.zeros(1, device="cuda", dtype=dtype)) is triton_backend
    assert dispatch.implementation("auto", torch.zeros(1, device="cuda", dtype=torch.float64)) is eager
