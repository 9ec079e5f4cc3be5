"""A module that changes its class alone: a mixin of ours before the class that it has, made once and found again by pickle."""

import functools
from typing import Any, cast

from torch import nn


def mixed(mixin: Any, kind: Any) -> Any:
    """The class with a mixin before it, under its own name, by which FSDP's and accelerate's plans find modules."""
    return _made(mixin, kind)


@functools.cache
def _made(mixin: Any, kind: Any) -> Any:
    return type(kind.__name__, (mixin, kind), {"__module__": __name__})


def rebuild_mixed(mixin: Any, kind: Any) -> nn.Module:
    """An empty module of the mixed class: what a pickle of one calls, as the class has no name that pickle could find."""
    made = mixed(mixin, kind)
    return cast(nn.Module, made.__new__(made))
