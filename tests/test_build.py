"""gain_ops.build and setup.py: what is built, what is left out and what is said of it."""

import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gain_ops import build

from support import host_extension

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def without_nvcc(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has every tool but nvcc."""
    for folder in os.environ["PATH"].split(os.pathsep):
        for tool in Path(folder).glob("*") if Path(folder).is_dir() else ():
            if tool.name != "nvcc" and not (tmp_path / tool.name).exists():
                (tmp_path / tool.name).symlink_to(tool)
    return os.environ | {"PATH": str(tmp_path)}


def _setup(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_one_without_nvcc_is_an_error(without_nvcc: dict[str, str]) -> None:
    run = _setup(without_nvcc | {"GAIN_OPS_BUILD_CUDA": "1"}, "--version")
    assert run.returncode == 1
    assert "GAIN_OPS_BUILD_CUDA=1, but the CUDA kernels cannot be built: nvcc is not on PATH" in run.stderr


def test_auto_without_nvcc_says_what_it_left_out(without_nvcc: dict[str, str]) -> None:
    run = _setup(without_nvcc | {"GAIN_OPS_BUILD_CUDA": "auto"}, "--version")
    assert run.returncode == 0
    assert "left out the CUDA kernels: nvcc is not on PATH" in run.stderr


def test_zero_asks_for_nothing(without_nvcc: dict[str, str]) -> None:
    run = _setup(without_nvcc | {"GAIN_OPS_BUILD_CUDA": "0"}, "--version")
    assert (run.returncode, run.stderr) == (0, "")


def test_another_value_is_refused() -> None:
    run = _setup(os.environ | {"GAIN_OPS_BUILD_CUDA": "yes"}, "--version")
    assert run.returncode != 0
    assert "GAIN_OPS_BUILD_CUDA='yes', expected 0, 1 or auto" in run.stderr


def test_one_refuses_to_leave_a_part_out(tmp_path: Path) -> None:
    host_extension.parameters()
    run = _setup(os.environ | {"GAIN_OPS_BUILD_CUDA": "1", "GAIN_OPS_CUDA_ARCHITECTURES": "80"}, "--version")
    assert run.returncode == 1
    assert "parts would be left out: the fused GEMMs: 90a is not among the architectures" in run.stderr


def test_the_command_says_why_it_cannot(without_nvcc: dict[str, str]) -> None:
    command = [sys.executable, "-m", "gain_ops.build"]
    run = subprocess.run(command, env=without_nvcc, capture_output=True, text=True)
    assert run.returncode == 1
    assert (
        run.stderr
        == "gain_ops: the CUDA kernels cannot be built: nvcc is not on PATH (install the CUDA toolkit, 12.8 or later)\n"
    )


def test_the_default_architectures_are_a_list_and_not_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAIN_OPS_CUDA_ARCHITECTURES", raising=False)
    host_extension.parameters()
    assert build.parameters().architectures == ("80", "90a", "100a")
    code = (
        "import sys, runpy; module = runpy.run_path(sys.argv[1])\nmodule['parameters']()\nprint('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, build.__file__], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n", "torch is looked up, not imported: nothing can ask a device"


def test_architectures_decide_flags_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = host_extension.parameters()
    flags = {unit.source.name: unit.flags for unit in whole.units()}
    assert flags["rows.cu"] == (
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100a,code=sm_100a",
    )
    assert flags["linear_bfloat16.cu"] == ("-gencode=arch=compute_90a,code=sm_90a",)
    assert "-DGAIN_OPS_SM90" in whole.cxx_flags()
    monkeypatch.setenv("GAIN_OPS_CUDA_ARCHITECTURES", "80;999a")
    part = build.parameters()
    assert part.architectures == ("80",)
    assert part.left_out[0] == "architectures 999a: this nvcc does not know them"
    assert not [unit for unit in part.units() if unit.source.parent.name == "sm90" or unit.source.stem == "matmul"]
    assert "-DGAIN_OPS_SM90" not in part.cxx_flags()
    monkeypatch.setenv("GAIN_OPS_CUDA_ARCHITECTURES", "999a")
    with pytest.raises(build.CannotBuild, match="nvcc knows none of GAIN_OPS_CUDA_ARCHITECTURES=999a"):
        build.parameters()


def test_without_cutlass_the_row_kernels_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    host_extension.parameters()
    monkeypatch.setattr(build, "_cutlass", lambda: None)
    part = build.parameters()
    assert not part.fuses
    assert part.left_out == ("the fused GEMMs: CUTLASS is missing (pip install --no-deps nvidia-cutlass==4.2.0.0)",)


def test_every_source_is_compiled() -> None:
    whole = host_extension.parameters()
    on_disk = {path for pattern in ("*.cpp", "*.cu", "sm90/*.cpp", "sm90/*.cu") for path in whole.csrc.glob(pattern)}
    assert {unit.source for unit in whole.units()} == on_disk
    assert len({unit.name for unit in whole.units()}) == len(on_disk)


def test_a_path_with_spaces_reaches_ninja_whole(tmp_path: Path) -> None:
    folder = tmp_path / "a b$c"
    folder.mkdir()
    text = build.write_ninja(host_extension.parameters(), folder / "out.so", folder).read_text()
    assert f"build {tmp_path}/a$ b$$c/out.so: link " in text


def test_a_system_header_that_changed_compiles_again(tmp_path: Path) -> None:
    """Those of torch and CUTLASS are system headers, and another version of them lies at the same path."""
    whole = host_extension.parameters()
    csrc, headers = tmp_path / "csrc", tmp_path / "torch" / "include"
    csrc.mkdir()
    headers.mkdir(parents=True)
    (csrc / "plan.cpp").write_text("#include <of_torch.h>\nint answer() { return kAnswer; }\n")
    (csrc / "rows.cu").write_text("#include <cutlass.h>\nint answer() { return kAnswer; }\n")
    given = dataclasses.replace(whole, csrc=csrc, torch_home=headers.parent, cutlass=headers, architectures=("80",))
    objects = [tmp_path / "objects" / name for name in ("csrc_plan.cpp.o", "csrc_rows.cu.o")]
    before: list[bytes] = []
    for value in (1, 2):
        for name in ("of_torch.h", "cutlass.h"):
            (headers / name).write_text(f"constexpr int kAnswer = {value};\n")
        build.build(given, tmp_path / "out.so", tmp_path / "objects", *(path.name for path in objects))
        after = [path.read_bytes() for path in objects]
        assert not before or all(a != b for a, b in zip(after, before, strict=True))
        before = after


def test_another_toolkit_is_another_command() -> None:
    whole = host_extension.parameters()
    other = dataclasses.replace(whole, cuda_home=Path("/opt/other-cuda"))
    assert whole.nvcc_flags() != other.nvcc_flags()
    assert whole.cxx_flags() != other.cxx_flags()


def test_a_compiler_that_fails_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = host_extension.parameters()
    csrc = tmp_path / "csrc"
    shutil.copytree(whole.csrc, csrc)
    (csrc / "plan.cpp").write_text("not C++")
    with pytest.raises(build.CannotBuild, match="the compilers failed"):
        build.build(dataclasses.replace(whole, csrc=csrc), tmp_path / "out.so", tmp_path / "objects", "csrc_plan.cpp.o")
    assert "plan.cpp:1:1: error" in capfd.readouterr().err


@pytest.mark.slow
def test_a_wheel_carries_the_built_kernels_for_every_python(tmp_path: Path) -> None:
    """From the checkout itself: its objects are there, so that nothing is compiled again."""
    host_extension.compiled()
    run = _setup(
        os.environ | {"GAIN_OPS_BUILD_CUDA": "1"},
        "bdist_wheel",
        f"--dist-dir={tmp_path}",
        f"--bdist-dir={tmp_path / 'tree'}",
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-linux_" in wheel.name
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / "gain_ops" / "_C.abi3.so").exists()
    code = (
        "import gain_ops.backends.extension as e, torch; "
        "print(e.obstacle(), e.__file__, torch.ops.gain_ops_cuda.linear.default)"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout == f"None {installed / 'gain_ops' / 'backends' / 'extension.py'} gain_ops_cuda.linear.default\n"
