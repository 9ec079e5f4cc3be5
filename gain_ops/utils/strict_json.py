"""JSON of files that anyone may have written: one reader, whose limits keep it from hanging or ending in a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["parse", "read"]

_LARGEST = 32 << 20  # bytes; the index of a model with 100,000 tensors has 10 million
_DEEPEST = 64  # objects and lists in one another


def read(path: Path, largest: int = _LARGEST) -> Any:
    """What a file of JSON holds.

    Raises:
        ValueError: as parse(), or a larger file.
        OSError: it cannot be read.

    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"over {largest:,} bytes")
    return parse(content)


def parse(content: bytes | str, *, finite: bool = False, naturals: bool = False) -> Any:
    """The value of a text in JSON.

    Args:
        content: bytes in UTF-8, without a mark of the byte order, or a text.
        finite: refuse NaN and Infinity, which are not JSON, and which the configs of some models have.
        naturals: refuse whole numbers below zero, "-0" among them.

    Raises:
        ValueError: not JSON, a key that is twice in its object, a character that is none (half of a pair), a number of
            thousands of digits, or more than 64 objects and lists in one another.

    """
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse if finite else None,
            parse_int=_natural if naturals else None,
        )
    except RecursionError:
        raise _too_deep() from None
    _check_depth(value)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError for half of a pair
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:_DEEPEST]!r} is there twice")
    return found


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _natural(text: str) -> int:
    if text.startswith("-"):
        raise ValueError(f"{text} is no whole number from 0 on")
    return int(text)


def _check_depth(value: Any) -> None:
    """Go down level by level, without recursion."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"more than {_DEEPEST} objects and lists in one another")
