"""Settings of every test: Triton's interpreter where there is no GPU, a fixed seed, and NaN in every fresh output."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from gain_study.engine.settings import Settings

# cuBLAS asks for it under deterministic algorithms, which `poisoned` turns on
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# threads cost more than they save on tensors this small; of the commands that tests start too
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
if not torch.cuda.is_available():
    # read when a kernel is decorated, so before gain_ops.kernels is imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.config.stash.setdefault(_left_out, Counter())["gpu"] += 1
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


def pytest_configure(config: pytest.Config) -> None:
    from support import time_limit

    # a conftest's hooks are not called for the fixtures of the session, a plugin's are
    config.pluginmanager.register(time_limit)
    if hasattr(config, "workerinput"):
        import torch._inductor.config  # noqa: F401  # what the first test that is `poisoned` would pay for


_left_out = pytest.StashKey[Counter[str]]()


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count what -m leaves out, by marker."""
    for item in items:
        if "slow" in item.keywords and "not slow" in item.config.option.markexpr:
            item.config.stash.setdefault(_left_out, Counter())["slow"] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells the run what it left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(_left_out, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker collects the same tests, so one number is that of the run."""
    node.config.stash[_left_out] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many tests each marker left out."""
    for marker, why in (("slow", "make test-full runs them"), ("gpu", "they need a GPU")):
        if count := config.stash.get(_left_out, Counter())[marker]:
            terminalreporter.write_line(f"left out, marked {marker}: {count} tests ({why})")


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama with two layers and a byte-level tokenizer."""
    from support.tiny_llama import save_tiny_llama

    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    save_tiny_llama(folder)
    return folder


@pytest.fixture
def code_folder(tmp_path: Path) -> Path:
    """Forty small files of Python, to adapt to."""
    folder = tmp_path / "code"
    folder.mkdir()
    for number in range(40):
        text = f"def function_{number}(x):\n    return x + {number}\n\n\nclass Class{number}:\n    value = {number}\n"
        (folder / f"file_{number}.py").write_text(text * 4, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def domain_folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three small domains."""
    from support.small_studies import write_domains

    return write_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture
def small(tiny_model: Path, domain_folders: list[str]) -> "Callable[..., Settings]":
    """``small(out, **changes)``: the settings of a study of the tiny model."""
    from support.small_studies import small_settings

    return partial(small_settings, model=tiny_model, domains=domain_folders)


@pytest.fixture(scope="session")
def csrc_on_the_host() -> None:
    """csrc's launchers compiled for the CPU, where csrc is built: seconds that belong to no single test."""
    from support import host_extension

    with contextlib.suppress(pytest.skip.Exception):
        host_extension.backend()
