"""A Triton driver that only records: the launches of each kernel call, without a GPU.

    with recording("sm_90") as launches:
        gain_ops.kernels.backend.linear(x, weight, delta, None)    # on meta or CPU tensors: nothing runs

Triton binds the arguments, specialises on them, compiles, and checks shared memory and threads as for that GPU; only the
launcher differs. So the recorded launches are those of the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction, driver

from gain_ops.kernels import launching


@dataclass(frozen=True)
class Device:
    """What Triton and the heuristics need to know of a GPU."""

    target: GPUTarget
    multiprocessors: int
    shared_memory: int
    """Bytes that a block can have."""


DEVICES = {
    # A100's multiprocessors, and the shared memory of sm_86, sm_89 and sm_120, which run the same configurations
    "sm_80": Device(GPUTarget("cuda", 80, 32), 108, 101_376),
    "sm_90": Device(GPUTarget("cuda", 90, 32), 132, 232_448),
    "sm_100": Device(GPUTarget("cuda", 100, 32), 148, 232_448),
    "gfx942": Device(GPUTarget("hip", "gfx942", 64), 304, 65_536),
}
"""A GPU of each architecture."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    """The file and the name of the kernel, such as rows.scale_kernel."""
    key: str
    """Types, hints, constants and options: launches of a kernel with one key share one machine code."""
    source: ASTSource
    """The kernel with its ``signature``, ``constants`` and ``attrs``."""
    compiled: CompiledKernel | None = None
    grid: tuple[int, int, int] | None = None
    arguments: dict[str, Any] | None = None


@contextlib.contextmanager
def recording(
    architecture: str,
    multiprocessors: int | None = None,
    *,
    compile: bool = True,
    run: Callable[[Launch], None] | None = None,
) -> Iterator[list[Launch]]:
    """Record the launches of this block, in order, as on a GPU of an architecture.

    Args:
        architecture: one of DEVICES.
        multiprocessors: of the GPU; by default those in DEVICES.
        compile: False records what would be compiled, without grid and arguments, and compiles nothing.
        run: called with each launch as it is made, before the next one: a simulator.

    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels have no launches to record")
    if architecture not in DEVICES:
        raise ValueError(f"architecture={architecture!r}: expected one of {', '.join(DEVICES)}")
    launches: list[Launch] = []
    met: set[JITFunction[Any]] = set()

    def before_compiling(*, fn: Any, key: str, **more: Any) -> bool:
        kernel, found = fn.jit_function, more["compile"]
        met.add(kernel)
        if not compile:
            source = ASTSource(kernel, found["signature"], found["constants"], found["configs"][0])
            launches.append(Launch(_name(kernel), key, source))
        return not compile

    def note(launch: Launch) -> None:
        launches.append(launch)
        if run is not None:
            run(launch)

    recorder = _Driver(DEVICES[architecture], multiprocessors, note)
    driver_before, hook_before = driver._active, triton.knobs.runtime.jit_cache_hook
    driver.set_active(recorder)
    triton.knobs.runtime.jit_cache_hook = before_compiling
    try:
        yield launches
    finally:
        driver.set_active(driver_before)
        triton.knobs.runtime.jit_cache_hook = hook_before
        launching.forget()
        for kernel in met:
            kernel.device_caches.pop(recorder.get_current_device(), None)


def _name(kernel: JITFunction[Any]) -> str:
    # with the file's name, since rms_norm.py and rms_norm_wide.py have kernels of the same names
    return f"{kernel.module.rpartition('.')[2]}.{kernel.__name__}"


class _Driver:
    """What Triton's runtime needs of a driver. It is its own ``utils``."""

    def __init__(self, device: Device, multiprocessors: int | None, note: Callable[[Launch], None]) -> None:
        self.device = device
        self.multiprocessors = device.multiprocessors if multiprocessors is None else multiprocessors
        self.note = note
        self.utils = self

    def get_current_device(self) -> str:
        # the key of a kernel's cache; no real device has it
        return f"recording of {self.device.target}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.device.target

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {
            "max_shared_mem": self.device.shared_memory,
            "multiprocessor_count": self.multiprocessors,
            "warpSize": self.device.target.warp_size,
        }

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        # no module, so nothing to unload: (module, function, registers, spills, the most threads of a block)
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: ASTSource, metadata: Any) -> Any:
        """The launcher of a compiled kernel."""
        kernel: JITFunction[Any] = source.fn
        cache = kernel.device_caches[self.get_current_device()][0]
        key, compiled = next((key, compiled) for key, compiled in cache.items() if compiled.src is source)

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            # between them: stream, function, packed metadata, launch metadata, and the hooks at enter and exit
            arguments = dict(zip(kernel.arg_names, rest[6:], strict=True))
            self.note(Launch(_name(kernel), key, source, compiled, (x, y, z), arguments))

        return launch
