"""The configuration of a GEMM's launch: the fastest of a table's (backends/tables.py), or otherwise the heuristic's pick."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gain_ops.backends import machine, tables
from gain_ops.kernels import config as heuristics
from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.devices import architecture, multiprocessors


def gemm_config(op: str, a: Tensor, weight: Tensor) -> GemmConfig:
    """The configuration of an op's GEMM of a [M, K] and weight [N, K]."""
    index = a.device.index
    # not by the index alone: on no GPU, the driver may be another one at the next call
    device = (family(index), architecture(index), multiprocessors(index))
    return _pick(op, *device, a.dtype, a.shape[0], *weight.shape)


@functools.lru_cache(maxsize=4096)
def _pick(
    op: str, cards: str, arch: str, multiprocessors: int, dtype: torch.dtype, m: int, n: int, k: int
) -> GemmConfig:
    out_features, in_features = (k, n) if op == "backward_input" else (n, k)
    found = tables.find(cards, tables.key(op, dtype, m, out_features, in_features))
    for row in tables.fastest(found[0].rows) if found else ():
        if row.way == "triton" and row.config is not None:
            return GemmConfig(**row.config)
    return heuristics.gemm_config(arch, m, n, multiprocessors)


def heuristic(index: int | None, m: int, n: int) -> GemmConfig:
    """The heuristic's pick."""
    return heuristics.gemm_config(architecture(index), m, n, multiprocessors(index))


def family(index: int | None) -> str:
    """The family of cards whose table serves a device; of no GPU, the driver's or the interpreter's."""
    return architecture(index) if index is None else machine.family(index)


def forget() -> None:
    """Look configurations up again: a table was written."""
    _pick.cache_clear()
