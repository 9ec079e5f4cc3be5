"""What the compilers made of csrc/, read from their reports and from the machine code: no GPU needed."""

import dataclasses
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gain_ops import build

from support import host_extension

# A thread's registers when as many threads as the kernels ask for share a multiprocessor's 64 Ki.
pytestmark = pytest.mark.slow  # the machine code is disassembled once, for all of them

GEMM_REGISTERS = 168  # 3 warpgroups of 128; setmaxnreg moves them between producer and consumers
ROW_REGISTERS = 128  # 2 blocks of 256
NORM_BACKWARD_REGISTERS = 80  # 3 blocks of 256: a block reads one row at a time
STATIC_SHARED = 48 * 1024
# CUTLASS keeps the epilogue's loop state of a 128x128 reduction in addressable memory; nothing of it is a spill
SMALL_REDUCTION_STACK = 640


@dataclasses.dataclass(frozen=True)
class Kernel:
    source: str
    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int


@functools.cache
def _kernels() -> list[Kernel]:
    host_extension.compiled()
    found = []
    for unit in host_extension.parameters().units():
        if unit.source.suffix == ".cu":
            found += _report(unit.source.name, (build.object_folder() / f"{unit.name}.log").read_text())
    return found


def _report(source: str, text: str) -> list[Kernel]:
    """What ptxas -v says of each entry."""
    kernels = []
    for part in text.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", part).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part).group(1)
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(
            Kernel(
                source,
                name,
                architecture,
                int(registers),
                int(stack),
                int(stores) + int(loads),
                int(shared.group(1)) if shared else 0,
            )
        )
    return kernels


def _is_gemm(kernel: Kernel) -> bool:
    return "cutlass" in kernel.name


def test_every_kernel_was_compiled_for_every_architecture() -> None:
    made_of = host_extension.parameters()
    counts: dict[tuple[str, str], int] = {}
    for kernel in _kernels():
        counts[kernel.source, kernel.architecture] = counts.get((kernel.source, kernel.architecture), 0) + 1
    per_file = {"glu.cu": 18, "rms_norm.cu": 12, "partials.cu": 1, "rows.cu": 18}
    expected = {(source, f"sm_{a}"): n for a in made_of.architectures for source, n in per_file.items()}
    # two tiles, two layouts of W
    gemms = {path.name for path in (made_of.csrc / "sm90").glob("*.cu")}
    assert len(gemms) == 8
    assert counts == expected | ({(name, "sm_90a"): 4 for name in gemms} if made_of.fuses else {})


def test_nothing_spills() -> None:
    assert not [kernel for kernel in _kernels() if kernel.spilled]


def test_nothing_but_the_small_reductions_has_a_stack() -> None:
    for kernel in _kernels():
        small_reduction = "Sm90RowReduction" in kernel.name and "64x128x16" in kernel.name
        assert kernel.stack <= (SMALL_REDUCTION_STACK if small_reduction else 0), kernel


def test_registers_and_static_shared_memory_fit() -> None:
    for kernel in _kernels():
        assert kernel.registers <= (GEMM_REGISTERS if _is_gemm(kernel) else ROW_REGISTERS), kernel
        assert kernel.shared <= STATIC_SHARED, kernel
        if "rms_norm_backward_rows" in kernel.name:
            assert kernel.registers <= NORM_BACKWARD_REGISTERS, kernel


@functools.cache
def _sass(architecture: str) -> dict[str, str]:
    """Machine code by kernel of the shipped file."""
    host_extension.compiled()
    listed = subprocess.run(
        [_cuobjdump(), "-sass", "-arch", architecture, _library()], capture_output=True, text=True, check=True
    ).stdout
    return {part.split("\n", 1)[0].strip(): part for part in listed.split("Function : ")[1:]}


def _library() -> Path:
    return Path(build.__file__).parent / "_C.abi3.so"


def _cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
def test_the_row_kernels_move_16_bytes_at_once_and_keep_nothing_in_local_memory(architecture: str) -> None:
    code = {name: text for name, text in _sass(architecture).items() if "rows_kernel" in name}
    assert len(code) == 48
    wide = {name for name in code if re.search(r"Li[48]E", name)}
    assert len(wide) == 24
    for name in wide:
        assert re.search(r"LDG\.E\.(EF\.)?128", code[name]), name
        assert "STG.E.128" in code[name] or re.search(r"backward_rows.*Lb0E", name), name
    assert not [name for name, text in code.items() if re.search(r"\b(LDL|STL)\b", text)]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
def test_vectors_over_the_columns_and_column_sums_move_16_bytes_at_once(architecture: str) -> None:
    """One element at a time, each of a warp's 8 loads of a vector takes 32 sectors."""
    wide = {n: text for n, text in _sass(architecture).items() if "rows_kernel" in n and re.search(r"Li[48]E", n)}
    assert len(wide) == 24
    for name, text in wide.items():
        # left are r of a norm's row, in either phase, and the gains of scale_rows
        loads = len(re.findall(r"\bLDG\.E(?:\.CONSTANT)? ", text))
        assert loads <= (4 if "scale_rows" in name else 2 if "norm" in name else 0), (name, loads)
        if "norm_backward" in name:
            # left are a row's sums: a store and 8 loads, and the store of what they add to
            shared = len(re.findall(r"\b(?:LDS|STS) ", text))
            assert shared <= 10, (name, shared)


def test_a_launch_binds_the_devices_context() -> None:
    """A new thread has none, and the driver's function that encodes a tensor map makes none."""
    host_extension.compiled()
    symbols = subprocess.run(
        ["nm", "--undefined-only", build.object_folder() / "csrc_device.cpp.o"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"\bcudaSetDevice$", symbols, re.MULTILINE)


def test_the_gemms_run_on_the_tensor_cores_and_move_tiles_by_tma() -> None:
    code = {name: text for name, text in _sass("sm_90a").items() if "cutlass" in name}
    assert len(code) == 32
    for name, text in code.items():
        assert "HGMMA" in text, name
        assert "UTMALDG" in text, name
        assert "UTMASTG" in text, name


def test_no_kernel_has_an_atomic() -> None:
    """Sums in fixed order: the same bits on every run."""
    for architecture in ("sm_80", "sm_90a", "sm_100a"):
        for name, text in _sass(architecture).items():
            opcodes = {line.partition("*/")[2].split(";")[0] for line in text.splitlines()}
            assert not [code for code in opcodes if re.match(r"\s+(@\S+ )?(ATOM|RED)[GS]?\b", code)], name


def test_later_cards_get_ptx_to_translate() -> None:
    host_extension.compiled()
    listed = subprocess.run([_cuobjdump(), "-lptx", _library()], capture_output=True, text=True, check=True).stdout
    assert "sm_80.ptx" in listed


def test_one_binary_for_many_versions_of_torch_and_python() -> None:
    """Of torch only the stable C functions, of Python only the limited API, and no CUDA library to be found at run time."""
    host_extension.compiled()
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", _library()], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split()[-1].split("@")[0] for line in symbols.splitlines()]
    unstable = [name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch|8caffe2)", name)]
    assert not unstable
    python = {name for name in names if name.startswith("Py")}
    assert python == {"PyModule_AddIntConstant", "PyModule_AddStringConstant", "PyModule_Create2"}
    needed = subprocess.run(["readelf", "-d", _library()], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"NEEDED.*\[(.+?)\.so", needed))
    assert libraries <= {"libtorch", "libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64"}


def test_the_compilers_warn_of_nothing() -> None:
    host_extension.compiled()
    for log in build.object_folder().glob("*.log"):
        assert "warning" not in log.read_text(), log
