"""Names, sizes and times in words, for messages and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SHOWN = 4


def first_of(texts: Sequence[str], separator: str = ", ") -> str:
    """The first few of some texts, in their order, and how many more."""
    more = f"{separator.rstrip(', ')} and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return separator.join(texts[:_SHOWN]) + more


def some_of(names: Iterable[str]) -> str:
    """The first few names in alphabetical order, and how many more."""
    return first_of(sorted(names))


def size_text(nbytes: int) -> str:
    """Bytes in the unit of a reader: ``147.2 KiB``, ``1.23 GiB``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def time_text(seconds: float) -> str:
    """Seconds as ``48 s`` or ``3 min 07 s``."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
