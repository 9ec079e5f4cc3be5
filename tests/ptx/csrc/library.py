"""The objects of csrc/ that ship, linked with host_runtime.cpp, and the PTX of their kernels."""

from __future__ import annotations

import fcntl
import functools
import re
import subprocess
from pathlib import Path

import triton

from gain_ops import build

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
HOST = ROOT / "build" / "ptx"
PASSES = ("glu.cu", "rms_norm.cu", "partials.cu", "rows.cu")
"""The hand-written kernels. Their objects hold PTX of sm_80, which the driver translates for later chips."""

_EMPTY = "_ZN8gain_ops5emptyERKN5torch6stable6TensorESt16initializer_listIlEN3c1010ScalarTypeE"


def built() -> Path:
    """The library, which is made where it is older than its parts.

    Raises:
        build.CannotBuild: there is no compiler, or it failed.

    """
    made_of, folder = build.parameters(), build.object_folder()
    cpp = [unit.name for unit in made_of.units() if unit.source.suffix == ".cpp"]
    shipped = [name for name in cpp if not name.startswith(("csrc_module", "csrc_device", "sm90_"))]
    shipped += [f"csrc_{name}.o" for name in PASSES]
    if has_gemms():
        shipped += _gemm_objects(made_of)
    build.build(made_of, ROOT / "gain_ops" / "_C.abi3.so", folder, *shipped)
    library = HOST / ("host_with_gemms.so" if has_gemms() else "host.so")
    objects = [folder / name for name in shipped]
    own = (
        HERE / "host_runtime.cpp",
        *(ROOT / "csrc" / "tests" / name for name in ("host_device.cpp", "host_module.cpp")),
    )
    HOST.mkdir(parents=True, exist_ok=True)
    with (HOST / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of a test run share the folder
        for source in own:
            made = HOST / f"{source.name}.o"
            if _is_stale(made, source):
                flags = [*made_of.cxx_flags(), f"-I{ROOT / 'csrc'}"]
                subprocess.run(["g++", *flags, "-c", source, "-o", made], check=True)
            objects.append(made)
        if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in objects):
            link = ["-shared", f"-Wl,--wrap={_EMPTY}", f"-L{made_of.torch_home / 'lib'}", "-ltorch", "-ltorch_cpu"]
            subprocess.run(["g++", *objects, "-o", library, *link], check=True)
    return library


def has_gemms() -> bool:
    """Whether the fused GEMMs are compiled: minutes, which no test should take by surprise."""
    made_of = build.parameters()
    return made_of.fuses and all((build.object_folder() / name).exists() for name in _gemm_objects(made_of))


def _gemm_objects(made_of: build.Parameters) -> list[str]:
    return [unit.name for unit in made_of.units() if unit.name.startswith("sm90_")]


def _is_stale(made: Path, source: Path) -> bool:
    read = (source, *(ROOT / "csrc").glob("*.h"))
    return not made.exists() or made.stat().st_mtime < max(path.stat().st_mtime for path in read)


@functools.cache
def _passes() -> dict[str, str]:
    """The PTX modules that the objects hold, by the entries of each."""
    texts: dict[str, str] = {}
    for name in PASSES:
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-ptx", build.object_folder() / f"csrc_{name}.o"]
        dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for text in re.findall(r"^\.version.*?(?=^Fatbin|\Z)", dumped, flags=re.M | re.S):
            texts |= _by_entry(text)
    return texts


@functools.cache
def _gemm(name: str) -> dict[str, str]:
    """The PTX of csrc/sm90/NAME.cu, which its object does not hold: compiled again, in a minute, and kept."""
    source, made = ROOT / "csrc" / "sm90" / f"{name}.cu", HOST / f"{name}.ptx"
    with (HOST / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_stale(made, source):
            made_of = build.parameters()
            architecture = f"compute_{build.GEMM_ARCHITECTURE}"
            target = f"-gencode=arch={architecture},code={architecture}"
            subprocess.run([made_of.nvcc, *made_of.nvcc_flags(), target, "-ptx", source, "-o", made], check=True)
    return _by_entry(made.read_text())


def _by_entry(text: str) -> dict[str, str]:
    return dict.fromkeys(re.findall(r"\.entry\s+([\w$]+)", text), text)


@functools.cache
def ptx_of(kernel: str, gemm: str | None = None) -> str:
    """The PTX of one entry, of the passes or of a GEMM's source: its module's head, and itself."""
    texts = _passes() | (_gemm(gemm) if gemm else {})
    head, *entries = re.split(r"^(?=(?:\.visible\s+|\.weak\s+)?\.entry\b)", texts[kernel], flags=re.M)
    return head + next(one for one in entries if re.search(rf"\.entry\s+{re.escape(kernel)}\s*\(", one))
