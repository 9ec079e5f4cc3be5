"""A pytest plugin for machines without hypothesis: tests that draw their shapes are skipped, and the others run."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


class _Absent(ModuleType):
    """A stand-in for any attribute that is used at import and in decorators."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # torch._dynamo looks every module up

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def _skipped(*arguments: Any, **options: Any) -> Any:
    return pytest.mark.skip(reason="hypothesis is not installed")


_hypothesis, _strategies = _Absent("hypothesis"), _Absent("hypothesis.strategies")
vars(_hypothesis).update(given=_skipped, settings=lambda **options: lambda test: test, strategies=_strategies)
sys.modules.update({"hypothesis": _hypothesis, "hypothesis.strategies": _strategies})
