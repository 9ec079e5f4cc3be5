"""The configuration of a GEMM's launch: the tuned table's entry, or otherwise the heuristic's pick.

The table is GAIN_OPS_TUNED, or gain_ops/<device>.json in the user's cache folder. Entries that it lacks are looked up in
``tuned/<device>.json`` of this package, if there is one. A device is its architecture and its number of multiprocessors, so an
H100 and an H200 share a table. The key of an entry is kernel, dtype, n, k and the next power of two of m. A table is of one
device and one minor version of Triton, and is not read on others. tuning.py writes it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from gain_ops.kernels import config as heuristics
from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.devices import architecture, multiprocessors
from gain_ops.utils.files import replace_file

FORMAT = 4
SHIPPED = Path(__file__).resolve().parent / "tuned"

_log = logging.getLogger("gain_ops")


def gemm_config(kernel: str, a: Tensor, weight: Tensor) -> GemmConfig:
    """The configuration for a [M, K] and weight [N, K]: the tuned table's entry, or otherwise the heuristic's pick."""
    return _pick(kernel, Device.of(a), a.dtype, a.shape[0], *weight.shape)


@dataclass(frozen=True)
class Device:
    """What a configuration depends on."""

    architecture: str
    multiprocessors: int

    @staticmethod
    def of(t: Tensor) -> Device:
        """The device of a tensor."""
        return _device(architecture(t.device.index), multiprocessors(t.device.index))

    @property
    def file_name(self) -> str:
        """Of its tables."""
        return f"{self.architecture}-{self.multiprocessors}.json"


_device = functools.cache(Device)


@functools.lru_cache(maxsize=4096)
def _pick(kernel: str, device: Device, dtype: torch.dtype, m: int, n: int, k: int) -> GemmConfig:
    key = entry_key(kernel, dtype, m, n, k)
    for path, level in ((table_path(device), logging.WARNING), (shipped_path(device), logging.DEBUG)):
        tuned = read_table(path, device, level).get(key)
        if tuned is not None:
            return tuned
    return heuristic(device, m, n)


def heuristic(device: Device, m: int, n: int) -> GemmConfig:
    """The heuristic's pick."""
    return heuristics.gemm_config(device.architecture, m, n, device.multiprocessors)


def table_path(device: Device) -> Path:
    """The path of the user's tuned table of a device."""
    named = os.environ.get("GAIN_OPS_TUNED")
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gain_ops" / device.file_name


def shipped_path(device: Device) -> Path:
    """The path of this package's table of a device, which need not exist."""
    return SHIPPED / device.file_name


def entry_key(kernel: str, dtype: torch.dtype, m: int, n: int, k: int) -> str:
    """The key of an entry of a table."""
    m_bin = 1 << max(m - 1, 0).bit_length()
    return f"{kernel} {str(dtype).removeprefix('torch.')} m<={m_bin} n={n} k={k}"


def _header(device: Device) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(device), "triton": ".".join(triton.__version__.split(".")[:2])}


@functools.cache
def read_table(path: Path, device: Device, level: int) -> dict[str, GemmConfig]:
    """The entries of a table; none if it is absent, and a line in the log if it is broken or another device's."""
    try:
        stored = json.loads(path.read_text())
        header = {key: stored.get(key) for key in _header(device)}
        if header != _header(device):
            _log.log(level, "tuned table %s is of %s, this is %s: not read", path, header, _header(device))
            return {}
        names = {field.name for field in fields(GemmConfig)}
        return {key: GemmConfig(**{n: entry[n] for n in names}) for key, entry in stored["configs"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.log(level, "tuned table %s cannot be read (%s): delete it and tune again", path, error)
        return {}


def write_table(path: Path, device: Device, entries: dict[str, GemmConfig]) -> None:
    """Write a table, which the next pick reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_header(device) | {"configs": {key: asdict(c) for key, c in sorted(entries.items())}}, indent=1)
    replace_file(path, lambda beside: beside.write_text(text))
    read_table.cache_clear()
    _pick.cache_clear()
