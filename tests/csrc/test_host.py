"""The C++ unit tests of csrc/tests: plans, the threads of the hand-written kernels, CUTLASS's arguments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gain_ops import build

from support import host_extension

TESTS = Path(__file__).resolve().parents[2] / "csrc" / "tests"
LAUNCHER = ["ccache"] if shutil.which("ccache") else []


@pytest.fixture(scope="module")
def parameters() -> build.Parameters:
    if not Path("/usr/include/doctest/doctest.h").exists():
        if build.mode() == "1":
            pytest.fail("the C++ unit tests need doctest (apt-get install doctest-dev)")
        pytest.skip("doctest is not installed (apt-get install doctest-dev)")
    return host_extension.parameters()


def _run(*command: str | Path, **environment: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def _compile(*command: str | Path) -> None:
    _run(*LAUNCHER, *command)


@pytest.mark.slow
def test_plans_and_threads_under_the_sanitizers(parameters: build.Parameters, tmp_path: Path) -> None:
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    include = ["-isystem", str(parameters.cuda_home / "include")]
    objects = []
    tests = ("main", "test_plan", "test_blocks", "test_glu_blocks", "test_rms_norm_blocks")
    for source in (*(TESTS / f"{name}.cpp" for name in tests), TESTS.parent / "plan.cpp"):
        objects.append(tmp_path / f"{source.stem}.o")
        _compile("g++", *flags, *sanitizers, *include, "-c", source, "-o", objects[-1])
    _run("g++", *sanitizers, *objects, "-o", tmp_path / "host")
    assert "0 failed" in _run(tmp_path / "host")


@pytest.mark.slow
def test_what_cutlass_is_told(parameters: build.Parameters, tmp_path: Path) -> None:
    if not parameters.fuses:
        pytest.skip(parameters.left_out[0])
    architecture = "-gencode=arch=compute_90a,code=sm_90a"
    flags = [*parameters.nvcc_flags(), architecture]
    _compile(parameters.nvcc, *flags, "-c", TESTS / "test_linear_arguments.cu", "-o", tmp_path / "arguments.o")
    _compile("g++", "-std=c++17", "-c", TESTS / "main.cpp", "-o", tmp_path / "main.o")
    _run(parameters.nvcc, tmp_path / "arguments.o", tmp_path / "main.o", "-o", tmp_path / "arguments")
    assert "0 failed" in _run(tmp_path / "arguments")
