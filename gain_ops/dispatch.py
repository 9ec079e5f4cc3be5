"""Which backend runs an op, and why.

``eager``    plain torch (reference.py): every device and dtype, and the only one on a CPU.
``triton``   the fused kernels: CUDA from sm_80 on and ROCm from gfx90a on, in bf16, fp16 and fp32; on a CPU only by name and
             under Triton's interpreter (TRITON_INTERPRET=1), to test them.
``auto``     the first of triton, eager that can run; a GPU that has to do with eager is told why, once.

An explicit backend that cannot run raises BackendUnavailable with the reason. The environment variable GAIN_OPS_BACKEND
replaces ``auto`` (not an explicit choice); it is read when a device and dtype are first met. The choice is made when an op
runs, by the tensors it gets, so a compiled or exported graph holds no decision of the machine it was traced on.
"""

import functools
import importlib.util
import logging
import os
from typing import Protocol

import torch
from torch import Tensor

from gain_ops import reference

BACKENDS = ("auto", "eager", "triton")

_log = logging.getLogger("gain_ops")


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what to do."""


class Backend(Protocol):
    """What a backend offers: the functions of reference.py, by the same names, with the same results."""

    def scale(self, x: Tensor, delta: Tensor) -> Tensor: ...
    def linear(self, x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor: ...
    def linear_z(self, x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]: ...
    def linear_input(self, x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor: ...
    def backward(self, dy: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]: ...
    def ddelta(self, dy: Tensor, z: Tensor) -> Tensor: ...
    def backward_recompute(self, dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]: ...
    def ddelta_recompute(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor: ...
    def backward_input(self, dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]: ...


OPS = tuple(name for name in vars(Backend) if not name.startswith("_"))


def implementation(backend: str, like: Tensor) -> Backend:
    """The module that runs an op on tensors such as ``like`` (its device and dtype decide).

    Raises:
        ValueError: an unknown backend name, here or in GAIN_OPS_BACKEND.
        BackendUnavailable: a backend asked for by name that cannot run on this device and dtype.

    """
    device = like.device
    return _implementation(backend, device.type, device.index, like.dtype)


def explain(device_type: str, dtype: torch.dtype) -> list[tuple[str, str, str]]:
    """Rows (op, backend, reason) that ``auto`` gives on the current device of that type: what ``gain-ops info`` prints."""
    requested = os.environ.get("GAIN_OPS_BACKEND", "auto")
    check_name(requested)
    obstacle = _triton_obstacle(device_type, None, dtype, by_name=requested == "triton")
    if requested != "auto":
        blocked = requested == "triton" and obstacle
        chosen, reason = requested, "GAIN_OPS_BACKEND" + (f", but it cannot run: {obstacle}" if blocked else "")
    elif obstacle:
        chosen, reason = "eager", obstacle
    else:
        chosen, reason = "triton", "the fused kernels serve this device and dtype"
    return [(op, chosen, reason) for op in OPS]


@functools.cache
def _implementation(backend: str, device_type: str, index: int | None, dtype: torch.dtype) -> Backend:
    if backend == "auto":
        backend = os.environ.get("GAIN_OPS_BACKEND", "auto")
    check_name(backend)
    if backend == "eager":
        return reference
    obstacle = _triton_obstacle(device_type, index, dtype, by_name=backend == "triton")
    if obstacle is None:
        return _kernels()
    if backend == "triton":
        raise BackendUnavailable(f"backend='triton' cannot run here: {obstacle}. Use backend='auto' or 'eager'.")
    _log.log(
        logging.INFO if device_type == "cpu" else logging.WARNING,
        "gain_ops runs its eager backend on %s in %s: %s",
        device_type,
        dtype,
        obstacle,
    )
    return reference


def _kernels() -> Backend:
    from gain_ops import kernels

    return kernels


def check_name(backend: str) -> None:
    """Raise ValueError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)} (argument or GAIN_OPS_BACKEND)")


def _triton_obstacle(device_type: str, index: int | None, dtype: torch.dtype, by_name: bool) -> str | None:
    """Why Triton's kernels cannot run, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "gain-ops[triton]")'
    if importlib.util.find_spec("gain_ops.kernels") is None:
        return "gain_ops.kernels is missing: this is an uninstalled checkout (pip install -e .)"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels compute in bfloat16, float16 and float32, not {dtype}"
    import triton

    if by_name and device_type == "cpu" and triton.knobs.runtime.interpret:
        return None if dtype != torch.bfloat16 else "Triton's interpreter computes wrong bfloat16 dots"
    if device_type != "cuda":
        return f"the kernels need a GPU and the tensors are on {device_type}"
    return _gpu_obstacle(index)


def _gpu_obstacle(index: int | None) -> str | None:
    """Why this GPU is too old for the kernels, or None."""
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        return None if name >= "gfx90a" else f"the kernels need gfx90a or later and this device is {name}"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0 and this device has {capability[0]}.{capability[1]}"
    return None
