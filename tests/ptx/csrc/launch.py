"""The CUDA backend on CPU tensors: its C++ launches, and the simulator runs the PTX of each kernel."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from gain_ops.backends import cuda, extension
from gain_ops.build import CannotBuild

from ptx.csrc.library import built, has_gemms, ptx_of
from ptx.launch import add_tensor
from ptx.machine import Machine, Settings
from ptx.memory import GlobalMemory
from ptx.program import program_of
from support import parity


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("dynamic_shared", ctypes.c_size_t),
    )


_SIMULATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))
_ALLOCATED = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


class _Device:
    """One at a time: what the callbacks of the library work on."""

    def __init__(self) -> None:
        self.settings = Settings()
        self.gemm: str | None = None
        """The source in csrc/sm90 whose kernels are launched."""
        self.memory = GlobalMemory()
        self.given: list[Tensor] = []
        self.ran: list[str] = []
        self.error: Exception | None = None

    def begin(self, given: list[Tensor]) -> None:
        """An op begins: kernels may read what it was given, and write what it allocates."""
        self.memory, self.given, self.error = GlobalMemory(), given, None

    def allocated(self, address: int, size: int) -> None:
        """The op allocates an output."""
        data = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))
        self.memory.add(f"allocation of {size} bytes", address, data, writable=True, written=False)

    def simulate(self, launch: Any) -> int:
        """The op launches a kernel: -> 0, or 1 where it fails."""
        try:
            self._run(launch.contents)
        except Exception as error:
            self.error = error
            return 1
        return 0

    def _run(self, launch: _Launch) -> None:
        kernel = launch.kernel.decode()
        program = program_of(ptx_of(kernel, self.gemm))
        parameters = b""
        for number, parameter in enumerate(program.parameters):
            parameters = parameters.ljust(parameter.offset, b"\0")
            parameters += ctypes.string_at(launch.arguments[number], parameter.size)
        self.memory.new_launch()
        for allocation in self.memory.allocations:
            allocation.belongs[:] = allocation.writable
        for number, tensor in enumerate(self.given):
            add_tensor(self.memory, f"argument {number}", tensor, writable=False)
        machine = Machine(
            program,
            tuple(launch.grid),
            tuple(launch.block),
            parameters,
            self.memory,
            dynamic_shared=launch.dynamic_shared,
            cluster=tuple(launch.cluster),
            settings=self.settings,
        )
        machine.run()
        self.ran.append(kernel)


_device = _Device()
_callbacks = _SIMULATE(lambda launch: _device.simulate(launch)), _ALLOCATED(lambda *of: _device.allocated(*of))


class _Ops:
    """torch.ops.gain_ops_host, which tells the device what each op is given."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.gain_ops_host, name)

        def call(*arguments: Any) -> Any:
            _device.begin([one for one in arguments if isinstance(one, Tensor) and one.numel()])
            try:
                return op(*arguments)
            finally:
                if _device.error is not None:
                    # rather than what the op says of it
                    raise _device.error

        return call


@functools.cache
def _load() -> tuple[ctypes.CDLL, ModuleType]:
    path = built()
    torch.ops.load_library(path)
    extension.register_fakes("gain_ops_host")
    spec = importlib.util.spec_from_file_location("cuda_simulated", cuda.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._ops = _Ops()  # type: ignore[attr-defined]
    module.card_fuses = lambda index: has_gemms()  # type: ignore[attr-defined]
    return ctypes.CDLL(str(path)), module


@contextlib.contextmanager
def simulated(
    settings: Settings, multiprocessors: int = 132, gemm: str | None = None
) -> Iterator[tuple[ModuleType, list[str]]]:
    """The CUDA backend whose kernels run in the simulator, and the names of those that ran."""
    library, module = _load()
    library.ptx_setup(*_callbacks, multiprocessors)
    _device.settings, _device.gemm, _device.ran = settings, gemm, []
    with mock.patch.dict(os.environ, {"GAIN_OPS_TEST_MULTIPROCESSORS": str(multiprocessors)}):
        yield module, _device.ran


def can_build() -> str:
    """Build the library: -> "", or why not."""
    try:
        _load()
    except CannotBuild as reason:
        return str(reason)
    return ""


def can_fuse() -> bool:
    """Whether the fused GEMMs are part of the library."""
    return has_gemms()


def run(
    call: str,
    shape: list[int],
    dtype: str,
    layouts: dict[str, str] | None = None,
    multiprocessors: int = 132,
    gemm: str | None = None,
    **settings: Any,
) -> list[str]:
    """A call of parity.CALLS, compared by the rule: -> the kernels that ran."""
    torch.manual_seed(0)
    t, i, o = shape
    given = parity.tensors(t, i, o, getattr(torch, dtype))
    for name, layout in (layouts or {}).items():
        given[name] = parity.laid_out(given[name], layout)
    with simulated(Settings(**settings), multiprocessors, gemm) as (backend, ran):
        parity.compare(backend, call, given)
    assert ran, "nothing was launched"
    return ran
