"""Settings of every test: Triton's interpreter where there is no GPU, a fixed seed, and NaN in every fresh output."""

import os
from typing import Any

import pytest
import torch

# cuBLAS asks for it under deterministic algorithms, which `poisoned` turns on
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers share the cores
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    # read when a kernel is decorated, so before gain_ops.kernels is imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


_left_out = pytest.StashKey[int]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the slow tests that -m leaves out."""
    for item in items:
        item.config.stash[_left_out] = item.config.stash.get(_left_out, 0) + ("slow" in item.keywords)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells the run how many it left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_left_out, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects the same tests, so one number is that of the run."""
    node.config.stash[_left_out] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many slow tests were left out."""
    if count := config.stash.get(_left_out, 0):
        terminalreporter.write_line(f"left out: {count} slow tests (make test-full)")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so an element that a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
