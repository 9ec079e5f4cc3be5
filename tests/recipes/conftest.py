"""What the commands work on: a tiny model in a folder, and small files to adapt to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tiny_llama import save_tiny_llama


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they save on tensors this small, and much more where other tests run beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the commands that tests start
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Llama with two layers and a byte-level tokenizer."""
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
