"""Names, sizes and times in words, for messages and tables; nothing that a file says reaches a terminal as it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SHOWN = 4
_LONGEST = 200  # characters of a name in a message


def printable(text: str) -> str:
    """The text with all escaped that a terminal would obey or not show: control characters, line breaks, halves of pairs."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def named(name: str) -> str:
    """A name from a file, for a message: printable, and cut where it is longer than any real one."""
    if len(name) > _LONGEST:
        return f"{printable(name[:_LONGEST])}... ({len(name):,} characters)"
    return printable(name)


def first_of(texts: Sequence[str], separator: str = ", ") -> str:
    """The first few of some texts, in their order, and how many more."""
    more = f"{separator.rstrip(', ')} and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return separator.join(map(printable, texts[:_SHOWN])) + more


def some_of(names: Iterable[str]) -> str:
    """The first few names in alphabetical order, and how many more."""
    return first_of([named(name) for name in sorted(names)])


def size_text(nbytes: int) -> str:
    """Bytes in the unit of a reader: ``147.2 KiB``, ``1.23 GiB``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def count_text(count: int) -> str:
    """A number of things as a reader takes it in: ``1,204``, ``2.1 M``, ``3.4 G``."""
    if count < 10**6:
        return f"{count:,}"
    return f"{count / 10**6:.1f} M" if count < 10**9 else f"{count / 10**9:.1f} G"


def time_text(seconds: float) -> str:
    """Seconds as ``48 s`` or ``3 min 07 s``."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
