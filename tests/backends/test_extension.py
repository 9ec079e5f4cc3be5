"""What is said where the CUDA kernels are not there, or are not these."""

import ctypes
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gain_ops import build
from gain_ops.backends import extension, obstacles
from gain_ops.ops import dispatch
from gain_ops.ops.self_check import Checked

from support import host_extension

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
    assert UNCACHED() == "the CUDA kernels are not built (python -m gain_ops.build builds them, in a few minutes)"


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


class TestDriver:
    """What is said of a driver that is older than the toolkit, with versions as CUDA counts them."""

    @pytest.fixture
    def said(self, present: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
        def ask(built_with: int, driver: int | None, *devices: tuple[int, int]) -> str | None:
            compiled = SimpleNamespace(version=extension.__version__, architectures="80;90a;100a", cuda=built_with)
            monkeypatch.setattr(importlib, "import_module", lambda name: compiled)
            monkeypatch.setattr(extension, "register_fakes", lambda namespace: None)
            monkeypatch.setattr(extension, "driver_version", lambda: driver)
            monkeypatch.setattr(extension, "_devices", lambda: list(devices))
            return UNCACHED()

        return ask

    def test_an_older_major_version_is_refused(self, said: Callable[..., str | None]) -> None:
        assert said(13000, 12080, (9, 0)) == (
            "the CUDA kernels were built with CUDA 13.0 and the driver serves CUDA 12.8: they need a driver of at least "
            "CUDA 13.0 (update it, or build them again with a toolkit of CUDA 12: python -m gain_ops.build)"
        )

    @pytest.mark.parametrize("built_with", [12080, 12090, 13000])
    def test_a_driver_that_is_as_new_or_newer_serves(self, said: Callable[..., str | None], built_with: int) -> None:
        assert said(built_with, 13000, (9, 0), (12, 0)) is None

    @pytest.mark.parametrize("device", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0)])
    def test_machine_code_needs_the_major_version_alone(
        self, said: Callable[..., str | None], device: tuple[int, int]
    ) -> None:
        assert said(12090, 12040, device) is None

    @pytest.mark.parametrize("device", [(10, 3), (12, 0)])
    def test_code_that_is_translated_needs_the_minor_version_too(
        self, said: Callable[..., str | None], device: tuple[int, int]
    ) -> None:
        told = str(said(12090, 12080, (9, 0), device))
        assert "built with CUDA 12.9 and the driver serves CUDA 12.8" in told
        assert f"CUDA 12.9 for a device of compute capability {device[0]}.{device[1]}, whose code it has" in told
        assert "with a toolkit of CUDA 12.8: python -m gain_ops.build" in told

    def test_without_a_driver_nothing_is_said(self, said: Callable[..., str | None]) -> None:
        assert said(13000, None) is None

    def test_the_driver_is_asked_through_its_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def serves(version: Any) -> int:
            version._obj.value = 12040
            return 0

        monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=serves))
        assert extension.driver_version() == 12040
        monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=lambda version: 3))
        assert extension.driver_version() is None
        monkeypatch.setattr(ctypes, "CDLL", _raise(OSError("libcuda.so.1: cannot open shared object file")))
        assert extension.driver_version() is None


@pytest.mark.parametrize(("ops", "fused"), [({"linear": None}, "with"), ({}, "without")])
def test_it_is_said_whether_the_fused_gemms_are_there(
    monkeypatch: pytest.MonkeyPatch, ops: dict[str, None], fused: str
) -> None:
    monkeypatch.setattr(extension, "obstacle", lambda: None)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(architectures="80;90a"))
    monkeypatch.setattr(torch.ops, "gain_ops_cuda", SimpleNamespace(**ops))
    assert extension.architectures() == f"80;90a, {fused} the fused GEMMs"


def test_every_op_of_csrc_has_a_fake() -> None:
    """By its name in interface.py, whose functions are the ops of every backend."""
    library = torch.library.Library("gain_ops_schemas", "DEF")
    source = (Path(__file__).resolve().parents[2] / "csrc" / "ops.cpp").read_text(encoding="utf-8")
    # a C++ string may be written in parts
    schemas = [
        "".join(re.findall(r'"(.*?)"', call)) for call in re.findall(r"library\.def\((.*?)\);", source, re.DOTALL)
    ]
    assert len(schemas) > 10
    for schema in schemas:
        library.define(schema)
    extension.register_fakes("gain_ops_schemas")
    for name in (schema.split("(")[0] for schema in schemas):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gain_ops_schemas::{name}", "Meta"), name


def test_the_built_kernels_load_without_a_gpu() -> None:
    host_extension.compiled()
    assert extension.obstacle() is None
    made_of = host_extension.parameters()
    fused = "with" if made_of.fuses else "without"
    assert extension.architectures() == f"{';'.join(made_of.architectures)}, {fused} the fused GEMMs"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a GPU without triton would get")
def test_auto_takes_cuda_where_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from gain_ops.backends import cuda

    monkeypatch.delenv("GAIN_OPS_BACKEND", raising=False)
    obstacles = {"triton": lambda *_: "triton is not installed", "cuda": lambda *_: None}
    monkeypatch.setattr(dispatch, "_OBSTACLES", obstacles)
    dispatch.forget()
    chosen = dispatch._implementation.__wrapped__("auto", torch.device("cuda", 0), torch.bfloat16)
    dispatch.forget()
    assert isinstance(chosen, Checked)
    assert chosen.backend is cuda
    monkeypatch.setattr(dispatch, "_OBSTACLES", obstacles | {"cuda": lambda *_: "not built"})
    assert dispatch._first_that_runs("cuda", 0, torch.bfloat16) == ("eager", "triton is not installed; not built")


def test_rocm_is_referred_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "this is ROCm (the triton backend serves it)" in str(obstacles.of_cuda("cuda", 0, torch.bfloat16, True))
