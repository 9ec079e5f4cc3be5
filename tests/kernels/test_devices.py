"""kernels/gain/devices.py: the device's context in every thread, and what a driver that is no GPU's is asked."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gain_ops.kernels import devices


def _in_a_thread(work: Callable[[], None]) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in raised:
        raise error


class TestContext:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
        """What is asked of torch.cuda, where entering a device binds no context: as it is on device 0."""
        made: list[tuple[str, int]] = []

        class Device:
            def __init__(self, device: torch.device) -> None:
                self.index = device.index

            def __enter__(self) -> None:
                made.append(("enter", self.index))

            def __exit__(self, *_: object) -> None:
                made.append(("leave", self.index))

        monkeypatch.setattr(torch.cuda, "device", Device)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: made.append(("bind", index)))
        return made

    def _launch(self, *indices: int) -> None:
        for index in indices:
            with devices.on_device_of(SimpleNamespace(device=torch.device("cuda", index))):
                pass

    def test_it_is_bound_once_a_thread_and_device(self, calls: list[tuple[str, int]]) -> None:
        for _ in range(2):
            _in_a_thread(lambda: self._launch(0, 0, 1, 0, 1))
        assert [index for what, index in calls if what == "bind"] == [0, 1] * 2

    def test_it_is_bound_where_the_device_is_the_current_one(self, calls: list[tuple[str, int]]) -> None:
        _in_a_thread(lambda: self._launch(1))
        assert calls == [("enter", 1), ("bind", 1), ("leave", 1)]

    def test_one_that_failed_is_tried_again(
        self, calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        working = torch.cuda.set_device

        def fail(index: int) -> None:
            raise RuntimeError("out of memory")

        def work() -> None:
            monkeypatch.setattr(torch.cuda, "set_device", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                self._launch(0)
            monkeypatch.setattr(torch.cuda, "set_device", working)
            self._launch(0)

        _in_a_thread(work)
        assert ("bind", 0) in calls

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_a_tensor_on_no_gpu_asks_nothing(self, calls: list[tuple[str, int]], device: str) -> None:
        _in_a_thread(lambda: devices.on_device_of(torch.empty(1, device=device)).__enter__())
        assert calls == []


class _Driver:
    """As much of a driver as a recording one has."""

    def __init__(self, target: GPUTarget, multiprocessors: int = 132) -> None:
        self.target = target
        self.utils = SimpleNamespace(get_device_properties=lambda index: {"multiprocessor_count": multiprocessors})

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0


HOPPER = GPUTarget("cuda", 90, 32)


@pytest.fixture
def activate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Makes a driver the active one, outside the interpreter; both are as before afterwards."""
    monkeypatch.setattr(driver, "_active", driver._active)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        yield driver.set_active


@pytest.fixture
def margin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets GAIN_OPS_SM_MARGIN, which is read once."""
    devices._margin.cache_clear()
    yield lambda text: monkeypatch.setenv("GAIN_OPS_SM_MARGIN", text)
    devices._margin.cache_clear()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (GPUTarget("cuda", 80, 32), "sm_80"),
        (GPUTarget("cuda", 89, 32), "sm_80"),
        (HOPPER, "sm_90"),
        (GPUTarget("cuda", 100, 32), "sm_100"),
        (GPUTarget("cuda", 103, 32), "sm_100"),
        (GPUTarget("cuda", 110, 32), "sm_100"),
        (GPUTarget("cuda", 120, 32), "sm_80"),
        (GPUTarget("hip", "gfx942", 64), "gfx942"),
    ],
)
def test_a_tensor_on_no_gpu_is_the_active_drivers(
    activate: Callable[[Any], None], target: GPUTarget, expected: str
) -> None:
    activate(_Driver(target))
    assert devices.architecture(None) == expected
    assert expected in devices.ARCHITECTURES


@pytest.mark.parametrize(("capability", "expected"), [((8, 6), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100")])
def test_a_gpus_tensor_is_its_own(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert devices._architecture.__wrapped__(0) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU the interpreter is off")
def test_under_the_interpreter_it_is_the_interpreters(margin: Callable[[str], None]) -> None:
    assert devices.architecture(None) == "interpreter"
    assert devices.multiprocessors(None) == 4


class TestMargin:
    @pytest.mark.parametrize(("text", "left"), [("0", 132), ("16", 116), ("131", 1), ("132", 1), ("1000", 1)])
    def test_one_multiprocessor_is_left(
        self, activate: Callable[[Any], None], margin: Callable[[str], None], text: str, left: int
    ) -> None:
        margin(text)
        activate(_Driver(HOPPER))
        assert devices.persistent_programs(None) == left

    def test_it_holds_for_a_gpu(self, margin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "_multiprocessors", lambda index: 108)
        assert devices.persistent_programs(0) == 108
        devices._margin.cache_clear()
        margin("8")
        assert devices.persistent_programs(0) == 100

    def test_it_is_read_once(self, margin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(devices, "_multiprocessors", lambda index: 108)
        for text in ("8", "16"):
            margin(text)
            assert devices.persistent_programs(0) == 100

    @pytest.mark.parametrize("text", ["-1", "", "1.5", "a few", "²"])
    def test_what_is_no_number_is_refused(self, margin: Callable[[str], None], text: str) -> None:
        margin(text)
        with pytest.raises(ValueError, match="expected a number of multiprocessors to leave free, such as 16") as error:
            devices._margin()
        assert repr(text) in str(error.value)


COLD_THREAD = """
import ctypes
import torch
from gain_ops import GainLinear, ops

libcuda = ctypes.CDLL("libcuda.so.1")
cold = []

class Probe(torch.autograd.Function):
    # its backward runs first in autograd's thread and makes no CUDA work
    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        context = ctypes.c_void_p()
        assert libcuda.cuCtxGetCurrent(ctypes.byref(context)) == 0
        cold.append(context.value is None)
        return dy

torch.manual_seed(0)
plain = torch.nn.Linear(256, 512, bias=False, device="cuda:0", dtype=torch.bfloat16)
layer = GainLinear.from_linear(plain, save="input", backend="triton")
x = torch.randn(512, 256, device="cuda:0", dtype=torch.bfloat16, requires_grad=True)
dy = torch.randn(512, 512, device="cuda:0", dtype=torch.bfloat16)
# compiled, loaded and with memory in the allocator's cache: what is left for the thread is the launch
dz, expected = ops.backward_recompute(dy, x.detach(), plain.weight.detach(), layer.delta.detach(), "triton")
dz @ plain.weight.detach()
torch.empty(2**28, dtype=torch.uint8, device="cuda:0")
y = Probe.apply(layer(x))
torch.autograd.backward(y, dy)
torch.cuda.synchronize()
assert torch.equal(layer.delta.grad, expected.to(layer.delta.dtype))
print("cold" if cold == [True] else "warm")
"""


@pytest.mark.gpu
def test_a_thread_whose_first_cuda_work_is_our_backward() -> None:
    """Descriptors are filled in it before any call that would bind the context."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(0) != (9, 0):
        pytest.skip("needs sm_90: no TMA descriptor is filled elsewhere")
    run = subprocess.run([sys.executable, "-c", COLD_THREAD], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if run.stdout != "cold\n":
        pytest.skip("this torch binds the context before a backward")
