"""The peak memory of a part of the work."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["Peak"]

_RESET_PEAK = "5"  # of proc(5)'s clear_refs


class Peak:
    """Measures from its construction on.

    On CUDA it is what the allocator handed out. On a CPU it is the process's resident memory. That includes everything else
    the process holds: its libraries, and the study's second copy of the weights.

    Attributes:
        exact: False where the system cannot reset its peak: then it is the peak since the process started.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.exact = True
        else:
            _give_back()
            self.exact = _reset()

    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self.exact:
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _give_back() -> None:
    """Return to the system what earlier work freed and the C library still holds: it must not count."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True
