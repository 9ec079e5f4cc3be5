"""The objects of csrc/ that ship, linked with host_runtime.cpp, and the PTX that they hold."""

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
PASSES = ("glu.cu", "rms_norm.cu", "partials.cu", "rows.cu")
"""The hand-written kernels. They hold PTX of sm_80, which the driver translates for later chips; CUTLASS's hold none."""

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
    build.build(made_of, ROOT / "gain_ops" / "_C.abi3.so", folder, *shipped)
    host = ROOT / "build" / "ptx"
    host.mkdir(parents=True, exist_ok=True)
    library = host / "host.so"
    objects = [folder / name for name in shipped]
    own = (
        HERE / "host_runtime.cpp",
        *(ROOT / "csrc" / "tests" / name for name in ("host_device.cpp", "host_module.cpp")),
    )
    with (host / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of a test run share the folder
        for source in own:
            made = host / f"{source.name}.o"
            read = (source, *(ROOT / "csrc").glob("*.h"))
            if not made.exists() or made.stat().st_mtime < max(path.stat().st_mtime for path in read):
                flags = [*made_of.cxx_flags(), f"-I{ROOT / 'csrc'}"]
                subprocess.run(["g++", *flags, "-c", source, "-o", made], check=True)
            objects.append(made)
        if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in objects):
            link = ["-shared", f"-Wl,--wrap={_EMPTY}", f"-L{made_of.torch_home / 'lib'}", "-ltorch", "-ltorch_cpu"]
            subprocess.run(["g++", *objects, "-o", library, *link], check=True)
    return library


@functools.cache
def _texts() -> dict[str, str]:
    """The PTX modules that the objects hold, by the entries of each."""
    texts = {}
    for name in PASSES:
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-ptx", build.object_folder() / f"csrc_{name}.o"]
        dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for text in re.findall(r"^\.version.*?(?=^Fatbin|\Z)", dumped, flags=re.M | re.S):
            texts.update(dict.fromkeys(re.findall(r"\.entry\s+([\w$]+)", text), text))
    return texts


@functools.cache
def ptx_of(kernel: str) -> str:
    """The PTX of one entry: its module's head, and itself."""
    head, *entries = re.split(r"^(?=(?:\.visible\s+|\.weak\s+)?\.entry\b)", _texts()[kernel], flags=re.M)
    return head + next(one for one in entries if re.search(rf"\.entry\s+{re.escape(kernel)}\s*\(", one))
