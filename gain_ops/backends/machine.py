"""What is kept of measurements and checks is kept for a machine: its family of cards, its versions, the folder."""

import functools
import importlib.metadata
import os
from pathlib import Path

import torch

from gain_ops._version import __version__
from gain_ops.backends import extension


@functools.cache
def family(index: int) -> str:
    """The cards whose figures serve each other: all of a compute capability ("sm_90"), or of a chip of AMD ("gfx942")."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def environment(device: torch.device) -> str:
    """The card, its driver, and the versions that decide what runs on it, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    driver = f", driver {extension.driver_version()}" if device.type == "cuda" else ""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return f"{name}{driver}, torch {torch.__version__}, triton {triton}, gain_ops {__version__}"


def cache_folder() -> Path:
    """Where the user's files of this package are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gain_ops"
