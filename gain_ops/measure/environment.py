"""What a figure depends on beside the code: versions, devices, environment variables."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from gain_ops._version import __version__
from gain_ops.backends import extension

__all__ = ["NOT_INSTALLED", "compiled_kernels", "describe_device", "devices", "variables", "versions"]

NOT_INSTALLED = "not installed"


def versions() -> dict[str, str]:
    """Versions of gain_ops, Python and the packages it works with; ``not installed`` where one is missing."""
    found = {"gain_ops": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "safetensors", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = NOT_INSTALLED
    return found


def compiled_kernels() -> str:
    """Whether csrc/ is built, for what, with or without the fused GEMMs, or why it cannot run."""
    return extension.obstacle() or f"built for {extension.architectures()}"


def devices() -> list[torch.device]:
    """The CPU and every CUDA device that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def describe_device(device: torch.device) -> str:
    """The device in words: a GPU's name and compute capability, or the processor and torch's threads on it."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    return f"{_processor()}, {torch.get_num_threads()} threads"


def variables() -> dict[str, str]:
    """The environment variables that gain_ops reads, where they are set."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("GAIN_OPS_")}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
