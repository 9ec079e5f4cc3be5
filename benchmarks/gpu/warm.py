"""Kernels compiled before a run on a GPU, and put where Triton there looks for them: DIR/triton-cache.zip.

What Triton names an entry of its cache by is a hash of itself, of the kernel's source, types, hints and options, and of the
version of ptxas. Of itself it hashes libtriton too, whose bytes differ from one Python to another within a version of Triton,
and an entry lists its files by absolute paths: so a cache that was merely copied is never hit. The archive therefore holds all
of each key but Triton's own part, and install() makes the names and the paths anew. It compares what of Triton decides the
machine code: its version, its Python sources, ptxas.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from zipfile import ZIP_DEFLATED, ZipFile

ARCHIVE, FOLDER, MANIFEST = "triton-cache.zip", "triton-cache", "manifest.json"
CARRIED = (".cubin", ".json")


def about(architecture: str) -> dict[str, str]:
    """What must be equal where kernels are compiled and where they are run."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    root = Path(triton.__file__).parent
    hashed = hashlib.sha256((root / "runtime" / "cache.py").read_bytes())
    for folder in ("compiler", "backends", "language"):
        for file in sorted((root / folder).rglob("*.py")):
            hashed.update(file.read_bytes())
    version: str = get_ptxas_version(int(architecture.removeprefix("sm_")))
    return {
        "Triton": triton.__version__,
        "Triton's Python sources": hashed.hexdigest()[:12],
        "ptxas": version.strip().splitlines()[-1],
        "architecture": architecture,
    }


@contextlib.contextmanager
def compiling_into(cache: Path) -> Iterator[dict[str, str]]:
    """Compile into a folder, machine code alone; the names of its entries, with their keys less Triton's own part."""
    from triton.compiler import compiler
    from triton.runtime.cache import _base32, triton_key

    found: dict[str, str] = {}
    key_of = compiler.get_cache_key

    def noted(*of: Any, **more: Any) -> str:
        key: str = key_of(*of, **more)
        found[_base32(hashlib.sha256(key.encode()).hexdigest())] = key.removeprefix(triton_key())
        return key

    settings = {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    with mock.patch.dict(os.environ, settings), mock.patch.object(compiler, "get_cache_key", noted):
        yield found


def pack(cache: Path, keys: dict[str, str], architecture: str, archive: Path) -> str:
    """Write the archive of these entries; what it holds, in words."""
    kernels = {}
    with ZipFile(archive, "w", ZIP_DEFLATED) as packed:
        for entry, key in sorted(keys.items()):
            files = [file for file in (cache / entry).iterdir() if _is_carried(file)]
            if not any(file.suffix == ".cubin" for file in files):
                continue  # a kernel that its compiler refused
            kernels[entry] = key
            for file in files:
                packed.write(file, f"{entry}/{file.name}")
        packed.writestr(MANIFEST, json.dumps(about(architecture) | {"kernels": kernels}))
    size = archive.stat().st_size / 2**20
    return f"{archive}: {len(kernels)} kernels for {architecture}, {size:.1f} MiB"


def _is_carried(file: Path) -> bool:
    return file.suffix in CARRIED and not file.name.startswith("__grp__")


def install(folder: Path, architecture: str) -> str:
    """Unpack FOLDER's archive beside it, for this Triton, and have it used from here on; what was found, in words."""
    archive = folder / ARCHIVE
    if not archive.exists():
        return f"no {archive}: every kernel is compiled here"
    here = about(architecture)
    with ZipFile(archive) as packed:
        manifest = json.loads(packed.read(MANIFEST))
        other = [
            f"{name} {manifest.get(name)}, here {value}" for name, value in here.items() if manifest[name] != value
        ]
        if other:
            return f"{archive} is of {'; '.join(other)}: not used, every kernel is compiled here"
        cache = (folder / FOLDER).resolve()
        shutil.rmtree(cache, ignore_errors=True)
        for entry, key in manifest["kernels"].items():
            _put(packed, entry, key, cache)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    return f"{len(manifest['kernels'])} kernels found warm in {archive}"


def _put(packed: ZipFile, entry: str, key: str, cache: Path) -> None:
    from triton.runtime.cache import _base32, triton_key

    name = hashlib.sha256((triton_key() + key).encode()).hexdigest()
    place = cache / _base32(name)
    place.mkdir(parents=True)
    group = {}
    for path in packed.namelist():
        if path.startswith(f"{entry}/"):
            file = place / path.partition("/")[2]
            content = packed.read(path)
            if file.suffix == ".json":
                content = json.dumps(json.loads(content) | {"hash": name}).encode()
            file.write_bytes(content)
            group[file.name] = str(file)
    metadata = next(file for file in group if file.endswith(".json"))
    (place / f"__grp__{metadata}").write_text(json.dumps({"child_paths": group}))


class Counter:
    """What Triton's cache had, and what was compiled, in this process from here on."""

    def __init__(self) -> None:
        self.warm, self.compiled = 0, 0
        try:
            import triton
        except ImportError:  # nothing to count: the rows say that it is missing
            return
        triton.knobs.compilation.listener = self._compiled

    def _compiled(self, *, cache_hit: bool, **more: Any) -> None:
        if cache_hit:
            self.warm += 1
        else:
            self.compiled += 1

    def __str__(self) -> str:
        return f"{self.warm} kernels found warm, {self.compiled} compiled"
