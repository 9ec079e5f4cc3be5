"""A plugin: in CI a test that takes long without saying so fails, as the suite's time is part of the product."""

import importlib
import os
import time
from collections.abc import Generator
from typing import Any

import pytest

# of a processor, with the test's fixtures but those of the session; a loaded machine takes longer by the clock
LIMIT_S = 5.0
# by the clock: what only waits
PATIENCE_S = 30.0
# what many tests import: seconds that are not the first one's
SHARED = ("torch._dynamo", "torch._inductor.compile_fx", "transformers", "peft")


_start = pytest.StashKey[tuple[float, float]]()


def _now() -> tuple[float, float]:
    """Seconds by the clock, and of the processor: of this process, and of those that it has waited for."""
    return time.perf_counter(), sum(os.times()[:4])


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get("CI") and len(session.items) > 1:
        for name in SHARED:
            importlib.import_module(name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_start] = _now()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: Any) -> Generator[None, Any, Any]:
    """What all tests share is not counted for the one that comes first: its beginning moves."""
    before = _now()
    try:
        return (yield)
    finally:
        if fixturedef.scope == "session":
            stash = request._pyfuncitem.stash
            stash[_start] = tuple(s + a - b for s, a, b in zip(stash[_start], _now(), before, strict=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Fail the test that was over a limit."""
    report = yield
    if os.environ.get("CI") and report.when == "call" and report.passed and "slow" not in item.keywords:
        clock, processor = (now - start for now, start in zip(_now(), item.stash[_start], strict=True))
        if processor > LIMIT_S or clock > PATIENCE_S:
            report.outcome = "failed"
            spent = f"{processor:.1f} s of a processor ({clock:.1f} s by the clock)"
            report.longrepr = (
                f"{item.nodeid} took {spent}, of {LIMIT_S:g} ({PATIENCE_S:g}): make it faster, or mark it slow"
            )
    return report
