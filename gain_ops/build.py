"""Builds csrc/ into ``gain_ops/_C.abi3.so``: the only file that knows its compilers, sources, architectures and flags.

setup.py loads this file by its path to build ahead of time, under GAIN_OPS_BUILD_CUDA:

    auto   build what the machine can, and say what was left out (the default)
    1      build everything, or fail and say why
    0      build nothing

``python -m gain_ops.build`` builds it into an installed package afterwards. ninja makes the objects, through ccache where
that is installed. Nothing here asks the hardware: GAIN_OPS_CUDA_ARCHITECTURES (default 80;90a;100a) has the architectures.
"""

import argparse
import dataclasses
import fcntl
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ARCHITECTURES = "80;90a;100a"
TORCH_FLOOR = "0x020a000000000000"  # the stable ABI of torch 2.10
PYTHON_FLOOR = "0x030B0000"  # the limited API of Python 3.11
GEMM_ARCHITECTURE = "90a"
HERE = Path(__file__).resolve().parent


class CannotBuild(RuntimeError):
    """The CUDA kernels cannot be built here; the message says what is missing and what to do."""


_CPP = ("device.cpp", "glu.cpp", "rms_norm.cpp", "ops.cpp", "plan.cpp", "rows.cpp", "tensor.cpp")
_CUDA = ("glu.cu", "rms_norm.cu", "partials.cu", "rows.cu")


@dataclasses.dataclass(frozen=True)
class Unit:
    """One source file and the flags that it alone gets."""

    source: Path
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The object's file name."""
        return f"{self.source.parent.name}_{self.source.name}.o"


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Everything a build is made of."""

    csrc: Path
    nvcc: str
    cuda_home: Path
    torch_home: Path
    cutlass: Path | None
    architectures: tuple[str, ...]
    version: str
    left_out: tuple[str, ...]

    def cxx_flags(self) -> list[str]:
        """Flags of every C++ file."""
        return [
            *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
            f"-DTORCH_TARGET_VERSION={TORCH_FLOOR}ULL",
            f"-DPy_LIMITED_API={PYTHON_FLOOR}",
            "-DUSE_CUDA",
            *(["-DGAIN_OPS_SM90"] if self.fuses else []),
            *("-isystem", str(self.torch_home / "include")),
            *("-isystem", str(self.cuda_home / "include")),
            *("-isystem", sysconfig.get_paths()["include"]),
        ]

    def nvcc_flags(self) -> list[str]:
        """Flags of every CUDA file; -Xptxas -v reports registers and spills to the log beside the object."""
        return [
            *("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas", "-v"),
            *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *("-isystem", str(self.cuda_home / "include")),  # nvcc knows it; it makes another toolkit another command
            *(["-isystem", str(self.cutlass)] if self.cutlass else []),
        ]

    def link_flags(self) -> list[str]:
        """CUDA's runtime is linked in, so that the file loads where CUDA is missing; torch is loaded already."""
        return [
            *("-shared", "-Wl,--no-as-needed", f"-L{self.torch_home / 'lib'}", "-ltorch", "-ltorch_cpu"),
            *(
                f"-L{self.cuda_home / 'lib64'}",
                "-lcudart_static",
                "-Wl,--exclude-libs,ALL",
                "-ldl",
                "-lrt",
                "-lpthread",
            ),
        ]

    @property
    def fuses(self) -> bool:
        """Whether the fused GEMMs are part of it."""
        return self.cutlass is not None and GEMM_ARCHITECTURE in self.architectures

    def units(self) -> list[Unit]:
        """Every file that is compiled."""
        about = (f'-DGAIN_OPS_VERSION="{self.version}"', f'-DGAIN_OPS_ARCHITECTURES="{";".join(self.architectures)}"')
        every = _gencode(self.architectures)
        units = [
            *(Unit(self.csrc / name) for name in _CPP),
            Unit(self.csrc / "module.cpp", about),
            *(Unit(self.csrc / name, every) for name in _CUDA),
        ]
        if self.fuses:
            units.append(Unit(self.csrc / "linear.cpp"))
            units += [Unit(path) for path in sorted((self.csrc / "sm90").glob("*.cpp"))]
            gemm = _gencode((GEMM_ARCHITECTURE,))
            units += [Unit(path, gemm) for path in sorted((self.csrc / "sm90").glob("*.cu"))]
        return units


def _gencode(architectures: tuple[str, ...]) -> tuple[str, ...]:
    """Machine code for each, and PTX of those that later chips can translate (not those with an "a")."""
    flags = []
    for name in architectures:
        code = f"sm_{name}" if name.endswith("a") else f"[sm_{name},compute_{name}]"
        flags.append(f"-gencode=arch=compute_{name},code={code}")
    return tuple(flags)


def mode() -> str:
    """GAIN_OPS_BUILD_CUDA, checked."""
    value = os.environ.get("GAIN_OPS_BUILD_CUDA", "auto")
    if value not in ("0", "1", "auto"):
        raise ValueError(f"GAIN_OPS_BUILD_CUDA={value!r}, expected 0, 1 or auto")
    return value


def parameters(csrc: Path | None = None) -> Parameters:
    """What this machine would build.

    Raises:
        CannotBuild: a compiler, torch's headers or ninja is missing.

    """
    if platform.system() != "Linux":
        raise CannotBuild(f"the CUDA kernels are built on Linux and this is {platform.system()}")
    csrc = csrc or _csrc()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise CannotBuild("nvcc is not on PATH (install the CUDA toolkit, 12.8 or later)")
    if shutil.which("g++") is None:
        raise CannotBuild("g++ is not on PATH")
    _ninja()
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise CannotBuild("torch is not importable here (pip install with --no-build-isolation, torch first)")
    cutlass = _cutlass()
    left_out = []
    wanted = tuple(os.environ.get("GAIN_OPS_CUDA_ARCHITECTURES", ARCHITECTURES).split(";"))
    known = _known_architectures(nvcc)
    architectures = tuple(name for name in wanted if name.rstrip("a") in known)
    if wanted != architectures:
        missing = ", ".join(name for name in wanted if name not in architectures)
        left_out.append(f"architectures {missing}: this nvcc does not know them")
    if not architectures:
        raise CannotBuild(f"nvcc knows none of GAIN_OPS_CUDA_ARCHITECTURES={';'.join(wanted)}")
    if cutlass is None:
        left_out.append("the fused GEMMs: CUTLASS is missing (pip install --no-deps nvidia-cutlass==4.2.0.0)")
    elif GEMM_ARCHITECTURE not in architectures:
        left_out.append(f"the fused GEMMs: {GEMM_ARCHITECTURE} is not among the architectures")
    return Parameters(
        csrc=csrc,
        nvcc=nvcc,
        cuda_home=_cuda_home(nvcc),
        torch_home=Path(torch.origin).parent,
        cutlass=cutlass,
        architectures=architectures,
        version=_version(),
        left_out=tuple(left_out),
    )


def _csrc() -> Path:
    """The sources: beside the package in a checkout, inside it when installed."""
    for path in (HERE.parent / "csrc", HERE / "csrc"):
        if (path / "module.cpp").exists():
            return path
    raise CannotBuild(f"csrc is neither in {HERE.parent} nor in {HERE}")


def _version() -> str:
    found = re.search(r'__version__ = "(.+?)"', (HERE / "_version.py").read_text())
    assert found
    return found.group(1)


def _ninja() -> str:
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if found is None:
        raise CannotBuild("ninja is missing (pip install ninja)")
    return found


def _cutlass() -> Path | None:
    """CUTLASS's headers, from the wheel nvidia-cutlass or GAIN_OPS_CUTLASS (a folder with cutlass/cutlass.h)."""
    given = os.environ.get("GAIN_OPS_CUTLASS")
    spec = importlib.util.find_spec("cutlass_library")
    places = [Path(given)] if given else []
    if spec is not None and spec.submodule_search_locations:
        places.append(Path(spec.submodule_search_locations[0]) / "source/include")
    return next((place for place in places if (place / "cutlass/cutlass.h").exists()), None)


def _known_architectures(nvcc: str) -> set[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return {name.removeprefix("compute_") for name in listed.split()}


def _cuda_home(nvcc: str) -> Path:
    """The toolkit that nvcc itself uses: it may be a script on PATH."""
    told = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    found = re.search(r"_HERE_=(.+)", told)
    if found is None:
        raise CannotBuild(f"{nvcc} --dryrun does not say where the CUDA toolkit is")
    return Path(found.group(1).strip()).parent


def write_ninja(build: Parameters, output: Path, folder: Path) -> Path:
    """Write ``folder``/build.ninja, which makes ``output``."""
    launcher = shutil.which("ccache") or ""
    lines = [
        "ninja_required_version = 1.8",
        f"builddir = {_escape(str(folder))}",
        "rule cxx",
        # -MD and not -MMD, which leaves out system headers: another version of torch or CUTLASS has the same path
        f"  command = {launcher} g++ -MD -MF $out.d {_join(build.cxx_flags())} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = g++ $in",
        "rule nvcc",
        # the report of ptxas stays beside the object, and is shown when the compile fails
        f"  command = {launcher} {_escape(build.nvcc)} -MD -MF $out.d {_join(build.nvcc_flags())} $flags -c $in -o $out "
        "> $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule link",
        f"  command = g++ $in -o $out {_join(build.link_flags())}",
        "  description = link $out",
    ]
    objects = []
    for unit in build.units():
        rule = "nvcc" if unit.source.suffix == ".cu" else "cxx"
        lines += [f"build {_escape(unit.name)}: {rule} {_escape(str(unit.source))}", f"  flags = {_join(unit.flags)}"]
        objects.append(_escape(unit.name))
    lines += [f"build {_escape(str(output))}: link {' '.join(objects)}", f"default {_escape(str(output))}", ""]
    path = folder / "build.ninja"
    path.write_text("\n".join(lines))
    return path


def _escape(path: str) -> str:
    return re.sub(r"([$: ])", r"$\1", path)


def _join(flags: list[str] | tuple[str, ...]) -> str:
    return " ".join(shlex.quote(flag).replace("$", "$$") for flag in flags)


def jobs() -> int:
    """MAX_JOBS, or the number of cores, at most one for each 3 GiB of memory: one of the GEMMs takes about 2 GiB."""
    given = os.environ.get("MAX_JOBS")
    if given:
        return int(given)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (3 << 30)))


def build(made_of: Parameters, output: Path, folder: Path, *objects: str) -> None:
    """Compile and link ``output``, or compile the named ``objects`` alone; they stay in ``folder`` for the next build.

    Raises:
        CannotBuild: a compiler failed; its messages went to stderr.

    """
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would share the objects
        write_ninja(made_of, output.resolve(), folder)
        for line in made_of.left_out:
            print(f"gain_ops: left out {line}", file=sys.stderr)
        # so that ccache shares objects between checkouts of the same sources
        environment = {"CCACHE_BASEDIR": str(made_of.csrc.parent), "CCACHE_NOHASHDIR": "1"} | os.environ
        command = [_ninja(), "-C", str(folder), "-j", str(jobs()), *objects]
        run = subprocess.run(command, env=environment, stdout=sys.stderr)
    if run.returncode:
        raise CannotBuild(f"the compilers failed (exit code {run.returncode}); their messages are above")


def object_folder() -> Path:
    """The folder of the objects: build/cuda of a checkout, the user's cache for an installed package."""
    if (HERE.parent / "csrc" / "module.cpp").exists():
        return HERE.parent / "build" / "cuda"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gain_ops" / "build"


def main() -> None:
    """Build into the package, wherever it is installed."""
    argparse.ArgumentParser(prog="python -m gain_ops.build", description=main.__doc__).parse_args()
    output = HERE / "_C.abi3.so"
    try:
        build(parameters(), output, object_folder())
    except CannotBuild as reason:
        sys.exit(f"gain_ops: the CUDA kernels cannot be built: {reason}")
    print(f"gain_ops: built {output}")


if __name__ == "__main__":
    main()
