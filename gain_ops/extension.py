"""Loads ``gain_ops._C``, the compiled csrc/, when the CUDA backend is first asked for; says why where it cannot."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gain_ops import fakes
from gain_ops._version import __version__

# whose arguments are those of fakes.py but for the activation, a number here
_SAME_AS_FAKES = (
    "linear",
    "linear_z",
    "backward",
    "ddelta",
    "backward_recompute",
    "backward_input",
    "glu",
    "glu_backward",
    "glu_ddelta",
    "rms_norm",
    "rms_norm_backward",
)
_REMEDY = "python -m gain_ops.build"


@functools.cache
def obstacle() -> str | None:
    """Why the CUDA kernels are not there, or None once they are loaded and ``torch.ops.gain_ops_cuda`` is filled."""
    if importlib.util.find_spec("gain_ops._C") is None:
        return _not_built()
    try:
        compiled = importlib.import_module("gain_ops._C")
    except ImportError as error:
        return f"the CUDA kernels are built and cannot be loaded: {error} (build them again: {_REMEDY})"
    if compiled.version != __version__:
        return f"the CUDA kernels are of gain_ops {compiled.version} and this is {__version__} (build them again: {_REMEDY})"
    register_fakes("gain_ops_cuda")
    return None


def architectures() -> str | None:
    """What the loaded kernels were built for (``80;90a;100a``), or None."""
    return None if obstacle() else str(importlib.import_module("gain_ops._C").architectures)


def _not_built() -> str:
    from gain_ops import build

    try:
        build.parameters()
    except build.CannotBuild as reason:
        return f"the CUDA kernels are not built, and cannot be here: {reason}"
    return f"the CUDA kernels are not built ({_REMEDY} builds them, in some minutes)"


def register_fakes(namespace: str) -> None:
    """Give the ops that csrc/ defined under ``torch.ops.<namespace>`` their fakes."""

    def scale(x: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        return fakes.scale(x, delta)

    functions: dict[str, Callable[..., Any]] = {"scale": scale, "scale_rows": fakes.scale}
    for name in _SAME_AS_FAKES:
        functions[name] = getattr(fakes, name)
    for name, function in functions.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", function)
