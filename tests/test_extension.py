"""What is said where the CUDA kernels are not there, or are not these."""

import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gain_ops import build, dispatch, extension

import host_extension

UNCACHED: Callable[[], str | None] = extension.obstacle.__wrapped__


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: object())


def _raise(error: Exception) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise error

    return call


def test_not_built_and_buildable(absent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "parameters", lambda: None)
    assert UNCACHED() == "the CUDA kernels are not built (python -m gain_ops.build builds them, in some minutes)"


def test_not_built_and_not_buildable_gives_the_cause(absent: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "parameters", _raise(build.CannotBuild("ninja is missing (pip install ninja)")))
    assert UNCACHED() == ("the CUDA kernels are not built, and cannot be here: ninja is missing (pip install ninja)")


def test_a_file_that_cannot_be_loaded_gives_cause_and_remedy(present: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", _raise(ImportError("undefined symbol: torch_library_impl")))
    assert UNCACHED() == (
        "the CUDA kernels are built and cannot be loaded: undefined symbol: torch_library_impl "
        "(build them again: python -m gain_ops.build)"
    )


def test_kernels_of_another_version_are_refused(present: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(version="0.0.9"))
    assert "are of gain_ops 0.0.9 and this is" in str(UNCACHED())


def test_the_built_kernels_load_without_a_gpu() -> None:
    host_extension.compiled()
    assert extension.obstacle() is None
    assert extension.architectures() == ";".join(host_extension.parameters().architectures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a GPU without triton would get")
def test_auto_takes_cuda_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from gain_ops import cuda

    monkeypatch.delenv("GAIN_OPS_BACKEND", raising=False)
    obstacles = {"triton": lambda *_: "triton is not installed", "cuda": lambda *_: None}
    monkeypatch.setattr(dispatch, "_OBSTACLES", obstacles)
    assert dispatch._implementation.__wrapped__("auto", "cuda", 0, torch.bfloat16) is cuda
    monkeypatch.setattr(dispatch, "_OBSTACLES", obstacles | {"cuda": lambda *_: "not built"})
    assert dispatch._first_that_runs("cuda", 0, torch.bfloat16) == ("eager", "triton is not installed; not built")


def test_rocm_is_referred_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "this is ROCm (the triton backend serves it)" in str(
        dispatch._cuda_obstacle("cuda", 0, torch.bfloat16, True)
    )
