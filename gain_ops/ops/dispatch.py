"""Which backend runs an op, and why.

``eager``    plain torch (backends/eager.py): every device and dtype, and the only one on a CPU.
``triton``   the fused kernels: CUDA from sm_80 on, ROCm on MI200 and later, in bf16, fp16 and fp32; on a CPU only by name and
             under Triton's interpreter (TRITON_INTERPRET=1), to test them.
``cuda``     the compiled kernels of csrc/ (backends/cuda.py), where they are built: CUDA from sm_80 on, GEMMs fused on sm_90.
``auto``     the first of triton, cuda, eager that can run; a GPU that falls back to eager logs the reason, once.

A backend asked for by name that cannot run raises BackendUnavailable with the reason. The environment variable
GAIN_OPS_BACKEND replaces ``auto`` (not a name in a call); it is read when an op first meets a device and dtype. The choice is
made when an op runs, by the tensors it gets, so a compiled or exported graph holds no decision of the machine that traced it.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from gain_ops.backends import eager, extension
from gain_ops.backends.interface import OPS, Backend
from gain_ops.utils.errors import GainOpsError, UsageError

BACKENDS = ("auto", "eager", "triton", "cuda")

_log = logging.getLogger("gain_ops")


class BackendUnavailable(GainOpsError, RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why and what to do."""


def implementation(backend: str, like: Tensor) -> Backend:
    """The module that runs an op on tensors such as ``like`` (its device and dtype decide).

    Raises:
        ValueError: an unknown backend name, here or in GAIN_OPS_BACKEND.
        BackendUnavailable: a backend asked for by name that cannot run on this device and dtype.

    """
    return _implementation(backend, like.device, like.dtype)


def explain(device_type: str, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """Rows (op, backend, reason) that ``auto`` gives on the current device of that type: what ``gain-ops info`` prints."""
    requested = os.environ.get("GAIN_OPS_BACKEND", "auto")
    check_name(requested)
    if requested == "auto":
        chosen, reason = _first_that_runs(device_type, None, dtype)
    else:
        obstacle = _OBSTACLES[requested](device_type, None, dtype, True) if requested in _OBSTACLES else None
        chosen, reason = requested, "GAIN_OPS_BACKEND" + (f", but it cannot run: {obstacle}" if obstacle else "")
    return [(op, chosen, reason) for op in OPS]


@functools.cache
def _implementation(backend: str, device: torch.device, dtype: torch.dtype) -> Backend:
    device_type, index = device.type, device.index
    if backend == "auto":
        backend = os.environ.get("GAIN_OPS_BACKEND", "auto")
    check_name(backend)
    if backend == "auto":
        backend, reason = _first_that_runs(device_type, index, dtype)
        if backend == "eager":
            level = logging.INFO if device_type == "cpu" else logging.WARNING
            _log.log(level, "gain_ops runs its eager backend on %s in %s: %s", device_type, dtype, reason)
    elif backend in _OBSTACLES and (obstacle := _OBSTACLES[backend](device_type, index, dtype, True)):
        raise BackendUnavailable(f"backend={backend!r} cannot run here: {obstacle}. Use backend='auto' or 'eager'.")
    return _LOADERS[backend]()


def _eager() -> Backend:
    return eager


def _triton() -> Backend:
    from gain_ops.kernels import backend  # imports triton

    return backend


def _cuda() -> Backend:
    from gain_ops.backends import cuda

    return cuda


def _first_that_runs(device_type: str, index: int | None, dtype: torch.dtype) -> tuple[str, str]:
    """What ``auto`` means, and why."""
    obstacles = []
    for backend, obstacle_of in _OBSTACLES.items():
        obstacle = obstacle_of(device_type, index, dtype, False)
        if obstacle is None:
            return backend, "the fused kernels serve this device and dtype"
        if obstacle not in obstacles:
            obstacles.append(obstacle)
    return "eager", "; ".join(obstacles)


def check_name(backend: str) -> None:
    """Raise ValueError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise UsageError(f"backend={backend!r} is not one of {', '.join(BACKENDS)} (argument or GAIN_OPS_BACKEND)")


def _triton_obstacle(device_type: str, index: int | None, dtype: torch.dtype, by_name: bool) -> str | None:
    """Why Triton's kernels cannot run, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "gain-ops[triton]")'
    if importlib.util.find_spec("gain_ops.kernels") is None:
        return "gain_ops.kernels is missing: this is an uninstalled checkout (pip install -e .)"
    if obstacle := _dtype_obstacle(dtype):
        return obstacle
    import triton

    if by_name and device_type == "cpu" and triton.knobs.runtime.interpret:
        return None if dtype != torch.bfloat16 else "Triton's interpreter computes wrong bfloat16 dots"
    return _device_obstacle(device_type, index)


def _cuda_obstacle(device_type: str, index: int | None, dtype: torch.dtype, by_name: bool) -> str | None:
    """Why the compiled kernels cannot run, or None when they can."""
    if obstacle := _dtype_obstacle(dtype):
        return obstacle
    if device_type == "cuda" and torch.version.hip is not None:
        return "the kernels are CUDA's and this is ROCm (the triton backend serves it)"
    return _device_obstacle(device_type, index) or extension.obstacle()


def _dtype_obstacle(dtype: torch.dtype) -> str | None:
    """Why the kernels do not compute in this dtype, or None."""
    return None if dtype in _DTYPES else f"the kernels compute in bfloat16, float16 and float32, not {dtype}"


def _device_obstacle(device_type: str, index: int | None) -> str | None:
    """Why the kernels cannot run on this device, no GPU or one too old, or None."""
    if device_type != "cuda":
        return f"the kernels need a GPU and the tensors are on {device_type}"
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        served = name.startswith(("gfx90a", "gfx94", "gfx95"))
        return (
            None if served else f"the kernels need an MI200 or later (gfx90a, gfx94x, gfx95x) and this device is {name}"
        )
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0 and this device has {capability[0]}.{capability[1]}"
    return None


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOADERS: dict[str, Callable[[], Backend]] = {"eager": _eager, "triton": _triton, "cuda": _cuda}
# in the order of ``auto``: neither has been measured against the other, and triton needs no build
_OBSTACLES: dict[str, Callable[[str, int | None, torch.dtype, bool], str | None]] = {
    "triton": _triton_obstacle,
    "cuda": _cuda_obstacle,
}
