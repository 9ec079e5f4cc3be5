"""Settings of every test: Triton's interpreter where there is no GPU, a fixed seed, and NaN in every fresh output."""

import os

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
