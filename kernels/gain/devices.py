"""The device that a kernel is launched on: its architecture, its multiprocessors, its context.

A tensor that is on no GPU (on a CPU, or on meta) belongs to the interpreter, or otherwise to Triton's active driver. So a
driver that only records (aot.py) gets the launches that its target would get.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


def architecture(index: int | None) -> str:
    """The architecture family of a device: the newest of ARCHITECTURES that it can run, or "interpreter"."""
    if index is not None:
        return _architecture(index)
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return _of_driver(driver.active)[0]


def multiprocessors(index: int | None) -> int:
    """Streaming multiprocessors (compute units) of a device; 4 for the interpreter."""
    if index is not None:
        return _multiprocessors(index)
    if triton.knobs.runtime.interpret:
        return 4
    return _of_driver(driver.active)[1]


def persistent_programs(index: int | None) -> int:
    """Programs of a persistent grid: one for each multiprocessor that GAIN_OPS_SM_MARGIN does not reserve, at least 1."""
    return max(1, multiprocessors(index) - _margin())


@contextlib.contextmanager
def on_device_of(t: Tensor) -> Iterator[None]:
    """Launch on the tensor's device, not the current one; Triton then uses that device's current stream."""
    if t.device.type != "cuda":
        yield
        return
    with torch.cuda.device(t.device):
        _bind_context(t.device.index)
        yield


def is_ready(index: int) -> bool:
    """Whether a GPU is the current device and its context is bound: on_device_of would change nothing."""
    return index in _bound.devices and torch.cuda.current_device() == index


class _Bound(threading.local):
    """The devices whose context the calling thread has made current."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_bound = _Bound()


def _bind_context(index: int) -> None:
    if index not in _bound.devices:
        # autograd's thread of device 0 starts without a context, torch.cuda.device does not bind one, and a TMA descriptor
        # needs one; cudaSetDevice binds it, waits for nothing and may run under capture
        torch.cuda.set_device(index)
        _bound.devices.add(index)


@functools.lru_cache(maxsize=1)
def _of_driver(active: Any) -> tuple[str, int]:
    """The architecture and the multiprocessors of a driver's current device, asked once: it has one where tensors have none."""
    target = active.get_current_target()
    family = "gfx942" if target.backend == "hip" else _family(target.arch // 10)
    return family, active.utils.get_device_properties(active.get_current_device())["multiprocessor_count"]


@functools.cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    return _family(torch.cuda.get_device_capability(index)[0])


def _family(major: int) -> str:
    # consumer Blackwell (12.x) has no wgmma and 99 KB of shared memory: it runs Ampere's configurations
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _margin() -> int:
    """Multiprocessors left to other kernels, such as NCCL's under an overlapped backward; read once."""
    text = os.environ.get("GAIN_OPS_SM_MARGIN", "0")
    if not text.isdecimal():
        raise ValueError(f"GAIN_OPS_SM_MARGIN={text!r}: expected a number of multiprocessors to leave free, such as 16")
    return int(text)
