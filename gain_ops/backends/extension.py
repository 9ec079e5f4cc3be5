"""Loads ``gain_ops._C``, the compiled csrc/, at the first use of the CUDA backend; says why where it cannot be loaded."""

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gain_ops._version import __version__
from gain_ops.backends.interface import FAKES, OPS

_REMEDY = "python -m gain_ops.build"


@functools.cache
def obstacle() -> str | None:
    """Why the CUDA kernels are missing, or None once they are loaded and ``torch.ops.gain_ops_cuda`` is filled."""
    if importlib.util.find_spec("gain_ops._C") is None:
        return _not_built()
    try:
        compiled = importlib.import_module("gain_ops._C")
    except ImportError as error:
        return f"the CUDA kernels are built and cannot be loaded: {error} (build them again: {_REMEDY})"
    if compiled.version != __version__:
        return f"the CUDA kernels are of gain_ops {compiled.version} and this is {__version__} (build them again: {_REMEDY})"
    if too_old := _driver_obstacle(compiled.cuda, compiled.architectures):
        return too_old
    register_fakes("gain_ops_cuda")
    return None


def architectures() -> str | None:
    """The architectures of the loaded kernels, and whether the fused GEMMs are among them, or None.

    Without the fused GEMMs the backend composes the vendor's GEMM and a pass.
    """
    if obstacle():
        return None
    fused = "with" if hasattr(torch.ops.gain_ops_cuda, "linear") else "without"
    return f"{importlib.import_module('gain_ops._C').architectures}, {fused} the fused GEMMs"


def _driver_obstacle(built_with: int, architectures: str) -> str | None:
    """Why the driver cannot run what a toolkit built, or None; versions as CUDA counts them, 12080 for 12.8.

    A driver serves every toolkit of its own major version. With a newer minor version it serves machine code alone, as it
    cannot translate PTX that is newer than itself. https://docs.nvidia.com/deploy/cuda-compatibility
    """
    driver = driver_version()
    if driver is None or built_with <= driver:
        return None
    major = built_with // 1000
    if driver // 1000 < major:
        needs, older = f"CUDA {major}.0", f"CUDA {driver // 1000}"
    elif translated := [device for device in _devices() if not _has_machine_code(device, architectures)]:
        capability = ".".join(map(str, translated[0]))
        needs = (
            f"CUDA {_shown(built_with)} for a device of compute capability {capability}, whose code it has to translate"
        )
        older = f"CUDA {_shown(driver)}"
    else:
        return None
    return (
        f"the CUDA kernels were built with CUDA {_shown(built_with)} and the driver serves CUDA {_shown(driver)}: "
        f"they need a driver of at least {needs} (update it, or build them again with a toolkit of {older}: {_REMEDY})"
    )


def driver_version() -> int | None:
    """The newest CUDA that the driver serves, or None where there is none."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else version.value


def _devices() -> list[tuple[int, int]]:
    """The compute capability of every device that torch sees."""
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def _has_machine_code(capability: tuple[int, int], architectures: str) -> bool:
    """Whether a device runs some of the code untranslated: of its major version and no later minor, or its own "a"."""
    for name in architectures.split(";"):
        major, minor = divmod(int(name.rstrip("a")), 10)
        if capability == (major, minor) or (
            not name.endswith("a") and capability[0] == major and capability[1] > minor
        ):
            return True
    return False


def _shown(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _not_built() -> str:
    from gain_ops import build

    try:
        build.parameters()
    except build.CannotBuild as reason:
        return f"the CUDA kernels are not built, and cannot be here: {reason}"
    return f"the CUDA kernels are not built ({_REMEDY} builds them, in a few minutes)"


def register_fakes(namespace: str) -> None:
    """Give the ops that csrc/ defined under ``torch.ops.<namespace>`` their fakes: those of interface.py, by the same names.

    The arguments are the same too, except the activation, which is a number here.
    """

    def scale(x: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        return FAKES.scale(x, delta)

    functions: dict[str, Callable[..., Any]] = {name: getattr(FAKES, name) for name in OPS}
    functions |= {"scale": scale, "scale_rows": FAKES.scale}
    for name, function in functions.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", function)
