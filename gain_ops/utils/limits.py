"""What a name in a file may be; without a limit, the names of the modules above a tensor take the square of its length."""

from __future__ import annotations

from gain_ops.utils.wording import named

__all__ = ["check_name"]

_CHARACTERS = 1000
_PARTS = 100


def check_name(name: str) -> None:
    """Raise ValueError for a name that no model has: over 1000 characters, or over 100 parts between dots."""
    if len(name) > _CHARACTERS or name.count(".") >= _PARTS:
        raise ValueError(
            f"the name {named(name)} has {len(name):,} characters and {name.count('.') + 1:,} parts, of at most "
            f"{_CHARACTERS} and {_PARTS}"
        )
