"""The check at first use: an op that ``auto`` chose is held to plain torch once, and replaced where it is wrong.

A kernel that was never run on a card, a driver or a compiler that is new may be wrong in silence. So the first call of an op in
a configuration and a dtype on a device computes a small odd problem first, by the rule of the tests. A wrong op is named in
one warning, and the next simpler way takes its place: composed for a fused GEMM, plain torch for a pass.

What was right is kept in self_check.json in the cache folder, by card, driver and versions, so it is checked once on a machine.
GAIN_OPS_SELF_CHECK=0 checks nothing, =always checks in every process. Nothing is checked while a CUDA graph is captured, as a
check waits for its results.
"""

import functools
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gain_ops.backends import machine
from gain_ops.backends.agreement import Judge
from gain_ops.backends.interface import OPS
from gain_ops.testing import ARGUMENTS, tensors
from gain_ops.utils.errors import UsageError
from gain_ops.utils.files import replace_file

SIZES = (193, 144, 272)
"""T, in and out of the small problem: odd rows, partial tiles, a partial step of k, and multiples of 16 as in real layers."""

_log = logging.getLogger("gain_ops")


class Checked:
    """A backend whose ops are checked at their first call; afterwards an attribute is the plain function."""

    def __init__(self, backend: Any, simpler: Any, label: str, dtype: torch.dtype) -> None:
        """``simpler``: a backend that takes the place of wrong ops; ``label``: the way and its configuration, in words."""
        self.backend, self._simpler, self._label, self._dtype = backend, simpler, label, dtype
        for op in OPS:
            if hasattr(backend, op):
                setattr(self, op, functools.partial(self._first, op))

    def _first(self, op: str, *arguments: Any) -> Any:
        run: Callable[..., Any] = getattr(self.backend, op)
        device = next(a for a in arguments if isinstance(a, Tensor)).device
        if _capturing(device):
            return run(*arguments)
        if wrong := self._wrong(op, run, arguments, device):
            _log.warning(
                "gain_ops: %s by %s in %s is wrong on this machine, so a simpler way takes its place. Please report this "
                "line, with the output of `gain-ops info`: %s (%s)",
                op, self._label, self._dtype, wrong, machine.environment(device),
            )  # fmt: skip
            run = getattr(self._simpler, op)
        setattr(self, op, run)
        return run(*arguments)

    def _wrong(self, op: str, run: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> str | None:
        asked = _asked()
        name = f"{op} {str(self._dtype).removeprefix('torch.')} {self._label}"
        if asked == "0" or (asked == "1" and name in _right().get(machine.environment(device), ())):
            return None
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            wrong = Judge(op, small(op, arguments, self._dtype, device)).mismatch(run)
        if wrong is None:
            _keep(machine.environment(device), name)
        return wrong


def small(op: str, like: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> list[Any]:
    """The arguments of a small odd problem of an op; what is no tensor in ``like``, such as a missing bias, stays.

    A transposed weight is transposed here too, as kernels differ by it.
    """
    generator = torch.Generator(device).manual_seed(0)  # of its own: the caller's random numbers stay the same
    given = tensors(*SIZES, dtype, device, functools.partial(torch.randn, generator=generator))
    arguments = [given[name] if isinstance(a, Tensor) else a for name, a in zip(ARGUMENTS[op], like, strict=True)]
    return [
        t.t().contiguous().t() if isinstance(a, Tensor) and a.dim() == 2 and a.stride(0) < a.stride(1) else t
        for t, a in zip(arguments, like, strict=True)
    ]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _asked() -> str:
    asked = os.environ.get("GAIN_OPS_SELF_CHECK", "1")
    if asked not in ("0", "1", "always"):
        raise UsageError(f"GAIN_OPS_SELF_CHECK={asked!r}: expected 0, 1 or always")
    return asked


def _right() -> dict[str, list[str]]:
    """What was right, by machine; nothing where the file is absent or broken."""
    try:
        found = json.loads((machine.cache_folder() / "self_check.json").read_text(encoding="utf-8"))
        return {str(where): [str(name) for name in names] for where, names in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _keep(where: str, name: str) -> None:
    found = _right()
    found[where] = sorted({*found.get(where, ()), name})
    try:
        replace_file(
            machine.cache_folder() / "self_check.json",
            lambda beside: beside.write_text(json.dumps(found, indent=1), encoding="utf-8"),
        )
    except OSError as error:
        _log.debug("what was checked is not kept: %s", error)
