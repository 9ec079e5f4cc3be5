"""Which backend runs an op, and why.

``eager``    plain torch (backends/eager.py): every device and dtype, and the only one on a CPU.
``triton``   the fused kernels: CUDA from sm_80 on, ROCm on MI200 and later, in bf16, fp16 and fp32; on a CPU only by name and
             under Triton's interpreter (TRITON_INTERPRET=1), to test them.
``cuda``     the compiled kernels of csrc/ (backends/cuda.py), where they are built: CUDA from sm_80 on, GEMMs fused on sm_90.
``auto``     the first of triton, cuda, eager that can run; a GPU that falls back to eager logs the reason, once. A GEMM is
             composed (the vendor's product and one pass) unless a fused one is known or predicted to be faster: choose().

A backend asked for by name that cannot run raises BackendUnavailable with the reason. The environment variable
GAIN_OPS_BACKEND replaces ``auto`` (not a name in a call); it is read when an op first meets a device and dtype. The choice is
made when an op runs, by the tensors it gets, so a compiled or exported graph holds no decision of the machine that traced it.
What ``auto`` chose is checked at its first use (self_check.py); what was asked for by name is not.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from gain_ops.backends import eager, machine, obstacles, prediction, tables
from gain_ops.backends.interface import GEMMS, OPS, Backend, Gemms
from gain_ops.ops.self_check import Checked
from gain_ops.utils.errors import GainOpsError, UsageError

BACKENDS = ("auto", "eager", "triton", "cuda")

_log = logging.getLogger("gain_ops")


class BackendUnavailable(GainOpsError, RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why and what to do."""


@dataclass(frozen=True)
class Choice:
    """What ``auto`` runs a GEMM by."""

    way: str
    """ "composed", "triton" or "cuda"."""
    reason: str
    config: Any = None
    """Of Triton: its GemmConfig."""


def implementation(backend: str, like: Tensor) -> Backend:
    """What runs an op on tensors such as ``like`` (its device and dtype decide).

    Raises:
        ValueError: an unknown backend name, here or in GAIN_OPS_BACKEND.
        BackendUnavailable: a backend asked for by name that cannot run on this device and dtype.

    """
    return _implementation(backend, like.device, like.dtype)


def gemms(op: str, backend: str, a: Tensor, weight: Tensor) -> Gemms:
    """What runs a GEMM op with tokens ``a`` [T, ...] and weight [out, in]; errors as in implementation()."""
    device = a.device
    if backend != "auto" or device.type != "cuda":
        return implementation(backend, a)
    return _gemms(op, device.index, a.dtype, a.shape[0], *weight.shape)


def choose(op: str, index: int, dtype: torch.dtype, tokens: int, out_features: int, in_features: int) -> Choice:
    """How ``auto`` runs a GEMM op on a GPU that runs kernels: as measured, else as predicted on sm_90, else composed."""
    if dtype == torch.float32:
        return Choice("composed", "a fused GEMM gains nothing in float32")
    if not tokens or out_features % 8 or in_features % 8:
        return Choice("composed", "a fused GEMM takes features that are multiples of 8")
    ways = {"composed", *(way for way in ("triton", "cuda") if _fuses(way, index, dtype))}
    family, name = machine.family(index), tables.key(op, dtype, tokens, out_features, in_features)
    n, k = (in_features, out_features) if op == "backward_input" else (out_features, in_features)

    def choice(way: str, reason: str, row: tables.Row | None = None) -> Choice:
        return Choice(way, reason, _triton_config(row, index, tokens, n) if way == "triton" else None)

    if found := tables.find(family, name):
        problem, path = found
        for row in tables.fastest(problem.rows):
            if row.way in ways:
                return choice(row.way, f"measured, {row.us:.1f} us: {name} in {path} ({problem.measured})", row)
    if family != "sm_90":
        return Choice("composed", f"not measured on {family} (`gain-ops tune` measures)")
    us = {way: prediction.us(way, op, tokens, n, k) for way in sorted(ways) if prediction.serves(way, op)}
    said = ", ".join(f"{way} {time:.1f} us" for way, time in us.items())
    return choice(min(us, key=us.__getitem__), f"predicted, not measured (`gain-ops tune` measures): {said}")


def explain(
    device_type: str, dtype: torch.dtype, size: tuple[int, int, int] | None = None
) -> list[tuple[str, str, str]]:
    """Rows (op, backend, reason) that ``auto`` gives on the current device of that type: what ``gain-ops info`` prints.

    size: tokens, out and in features of a layer whose GEMMs are asked for.
    """
    requested = os.environ.get("GAIN_OPS_BACKEND", "auto")
    check_name(requested)
    if requested == "auto":
        chosen, reason = _first_that_runs(device_type, None, dtype)
    else:
        obstacle = _OBSTACLES[requested](device_type, None, dtype, True) if requested in _OBSTACLES else None
        chosen, reason = requested, "GAIN_OPS_BACKEND" + (f", but it cannot run: {obstacle}" if obstacle else "")

    def gemm(op: str) -> tuple[str, str]:
        if requested != "auto" or chosen == "eager":
            return chosen, reason
        if size is None:
            return "by size", "the vendor's GEMM and a pass, or a fused one: `gain-ops info --shape INxOUT` says which"
        choice = choose(op, torch.cuda.current_device(), dtype, *size)
        return choice.way, choice.reason + ("" if choice.config is None else f"; {choice.config}")

    return [(op, *(gemm(op) if op in GEMMS else (chosen, reason))) for op in OPS]


def check_name(backend: str) -> None:
    """Raise ValueError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise UsageError(f"backend={backend!r} is not one of {', '.join(BACKENDS)} (argument or GAIN_OPS_BACKEND)")


def forget() -> None:
    """Choose again: a table or an environment variable has changed."""
    for cached in (_implementation, _gemms, _passes, _checked):
        cached.cache_clear()


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
        elif device_type == "cuda":
            return cast(Backend, _passes(backend, index, dtype))
    elif backend in _OBSTACLES and (obstacle := _OBSTACLES[backend](device_type, index, dtype, True)):
        raise BackendUnavailable(f"backend={backend!r} cannot run here: {obstacle}. Use backend='auto' or 'eager'.")
    return cast(Backend, _LOADERS[backend]())


@functools.lru_cache(maxsize=4096)
def _gemms(op: str, index: int, dtype: torch.dtype, tokens: int, out_features: int, in_features: int) -> Gemms:
    """What ``auto`` runs a GEMM op by on a GPU: a look-up for every later call of the size."""
    passes = _implementation("auto", torch.device("cuda", index), dtype)
    if not isinstance(passes, Checked):  # plain torch, or what GAIN_OPS_BACKEND names
        return passes
    choice = choose(op, index, dtype, tokens, out_features, in_features)
    return cast(Gemms, _checked(choice.way, choice.config, index, dtype))


@functools.cache
def _passes(backend: str, index: int | None, dtype: torch.dtype) -> Checked:
    """A backend's passes, of which plain torch replaces those that are wrong."""
    return Checked(_LOADERS[backend](), eager, backend, dtype)


@functools.cache
def _checked(way: str, config: Any, index: int, dtype: torch.dtype) -> Checked:
    """The GEMMs by one way; composed ones replace fused ones that are wrong, and plain torch the composed ones."""
    if way == "composed":
        passes = _first_that_runs("cuda", index, dtype)[0]
        return Checked(_LOADERS[passes]().COMPOSED, eager, f"the vendor's GEMM and {passes}", dtype)
    backend, label = _LOADERS[way](), way
    if config is not None:
        backend = SimpleNamespace(**{op: functools.partial(getattr(backend, op), config=config) for op in GEMMS})
        label = f"{way} with {config}"
    return Checked(backend, _checked("composed", None, index, dtype), label, dtype)


def _fuses(way: str, index: int, dtype: torch.dtype) -> bool:
    """Whether a backend runs here and has fused GEMMs."""
    if _OBSTACLES[way]("cuda", index, dtype, False) is not None:
        return False
    return way == "triton" or bool(_LOADERS[way]().card_fuses(index))


def _triton_config(row: tables.Row | None, index: int, m: int, n: int) -> Any:
    """The GemmConfig of a row, or the heuristic's: a check covers one configuration, so it is always named."""
    from gain_ops.kernels.config import GemmConfig
    from gain_ops.kernels.tables import heuristic

    return heuristic(index, m, n) if row is None or row.config is None else GemmConfig(**row.config)


def _first_that_runs(device_type: str, index: int | None, dtype: torch.dtype) -> tuple[str, str]:
    """Whose passes ``auto`` runs, and why."""
    found = []
    for backend, obstacle_of in _OBSTACLES.items():
        obstacle = obstacle_of(device_type, index, dtype, False)
        if obstacle is None:
            return backend, "its kernels serve this device and dtype"
        if obstacle not in found:
            found.append(obstacle)
    return "eager", "; ".join(found)


def _eager() -> Any:
    return eager


def _triton() -> Any:
    from gain_ops.kernels import backend  # imports triton

    return backend


def _cuda() -> Any:
    from gain_ops.backends import cuda

    return cuda


_LOADERS: dict[str, Callable[[], Any]] = {"eager": _eager, "triton": _triton, "cuda": _cuda}
# in the order of ``auto``: neither has been measured against the other, and triton needs no build
_OBSTACLES: dict[str, Callable[[str, int | None, torch.dtype, bool], str | None]] = {
    "triton": obstacles.of_triton,
    "cuda": obstacles.of_cuda,
}
