"""The CUDA backend on a CPU: the C++ that ships, over the launchers of csrc/tests that run its kernels on the host."""

import ctypes
import fcntl
import functools
import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gain_ops import build
from gain_ops.backends import cuda, extension

ROOT = Path(__file__).resolve().parents[2]
HOST_SOURCES = ("host_device.cpp", "host_kernels.cpp", "host_module.cpp")


@functools.cache
def parameters() -> build.Parameters:
    """What this machine can build; the test is skipped where that is nothing."""
    try:
        found = build.parameters()
    except build.CannotBuild as reason:
        pytest.skip(f"csrc cannot be built here: {reason}")
    if not (ROOT / "gain_ops" / "_C.abi3.so").exists():
        pytest.skip("csrc is not built: make cuda")  # some minutes, which no test should take by surprise
    return found


@functools.cache
def load() -> ctypes.CDLL:
    """Fill torch.ops.gain_ops_host."""
    library = _build()
    torch.ops.load_library(library)
    extension.register_fakes("gain_ops_host")
    return ctypes.CDLL(str(library))


def last_gemm() -> tuple[int, int]:
    """Of the last fused GEMM on the host: the columns of its tile, and the multiprocessors of its grid."""
    columns, multiprocessors = (
        ctypes.c_int.in_dll(load(), f"host_gemm_{name}").value for name in ("columns", "multiprocessors")
    )
    return columns, multiprocessors


def _build() -> Path:
    made_of, folder = parameters(), build.object_folder()
    shipped = [unit.name for unit in made_of.units() if unit.source.suffix == ".cpp"]
    shipped = [name for name in shipped if not name.startswith(("csrc_module", "csrc_device", "sm90_"))]
    build.build(made_of, ROOT / "gain_ops" / "_C.abi3.so", folder, *shipped)
    host = ROOT / "build" / "host"
    host.mkdir(parents=True, exist_ok=True)
    library = host / "host.so"
    flags = [*made_of.cxx_flags(), "-Wno-unknown-pragmas"]
    link = ["-shared", f"-L{made_of.torch_home / 'lib'}", "-ltorch", "-ltorch_cpu"]
    objects = [str(folder / name) for name in shipped]
    with (host / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of a test run share the folder
        for name in HOST_SOURCES:
            source, compiled = ROOT / "csrc" / "tests" / name, host / f"{name}.o"
            read = (source, *(ROOT / "csrc").glob("*.h"))
            if not compiled.exists() or compiled.stat().st_mtime < max(path.stat().st_mtime for path in read):
                subprocess.run(["g++", *flags, "-c", source, "-o", compiled], check=True)
            objects.append(str(compiled))
        stale = not library.exists() or library.stat().st_mtime < max(Path(o).stat().st_mtime for o in objects)
        if stale:
            subprocess.run(["g++", *objects, "-o", library, *link], check=True)
    return library


@functools.cache
def backend() -> ModuleType:
    """gain_ops.backends.cuda: on a GPU as it is, elsewhere a copy of it over torch.ops.gain_ops_host that takes CPU tensors."""
    if torch.cuda.is_available():
        obstacle = extension.obstacle()
        if obstacle is not None:
            pytest.skip(obstacle)
        return cuda
    load()
    spec = importlib.util.spec_from_file_location("cuda_on_host", cuda.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._ops = torch.ops.gain_ops_host
    module.card_fuses = lambda index: True
    return module


def compiled() -> None:
    """Load gain_ops._C; skipped where it cannot be built, and where it can be and was not, unless GAIN_OPS_BUILD_CUDA=1."""
    obstacle = extension.obstacle()
    if obstacle is None:
        return
    if build.mode() == "1":
        pytest.fail(obstacle)
    pytest.skip(obstacle)
