"""A module that changes its class alone: a mixin of ours before the class that it has, made once and found again by pickle."""

import functools
from typing import Any, cast

from torch import nn


class Mixin(nn.Module):
    """What goes before a module's class by mixed(): such a module is pickled by the original class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class made here has no name that pickle could find."""
        return _rebuild, type(self).__bases__, self.__dict__


def mixed(mixin: Any, kind: Any) -> Any:
    """The class with a mixin before it, under its own name, by which FSDP's and accelerate's plans find modules."""
    return _made(mixin, kind)


def unmix(module: nn.Module) -> None:
    """Give a module whose class has a mixin of ours before it its own class again."""
    module.__class__ = type(module).__bases__[1]


@functools.cache
def _made(mixin: Any, kind: Any) -> Any:
    return type(kind.__name__, (mixin, kind), {"__module__": __name__})


def _rebuild(mixin: Any, kind: Any) -> nn.Module:
    made = mixed(mixin, kind)
    return cast(nn.Module, made.__new__(made))
