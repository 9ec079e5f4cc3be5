"""Compile ahead of time, without a GPU, every kernel in every configuration that the heuristics can choose.

The compiled kernels are the launched ones: public functions are called on meta tensors, and recording.py's driver replaces the
GPU. The report has what the machine code needs and contains: registers, shared memory and its rings of buffers, accesses to
global memory by their width, matrix instructions.

    python -m gain_ops.kernels.aot sm_90                     one line of JSON for each kernel
    python -m gain_ops.kernels.aot sm_90 --also MODULE       and the kernels of an experiment: its CALLS
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel

from gain_ops.kernels import backend
from gain_ops.kernels.recording import DEVICES, Launch, recording
from gain_ops.testing import ARGUMENTS, tensors

MATRIX_INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
"""The instruction that a half-precision dot must become."""


@dataclass(frozen=True)
class Problem:
    """A call of CALLS: x, dy and z are [tokens, features], W is [features, features]."""

    call: str
    dtype: str
    tokens: int
    features: int
    transposed: bool = False
    """W is a transposed view; in a call without W, x, dy and z are."""


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a kernel needs and contains."""

    target: str
    kernel: str
    problem: Problem
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    matrix_instructions: int
    accesses: dict[str, int]
    """Loads, stores and asynchronous copies of global memory by argument and bytes a thread: "load x 16"; or "load by TMA"."""
    rings: list[int]
    """The buffers of every ring of tiles in shared memory."""
    wgmma_rings: list[list[int | None]]
    """The buffers of the rings that both operands of every wgmma lie in; None for an operand in registers."""


@dataclass(frozen=True)
class Call:
    """A function, the names of its arguments among those of gain_ops.testing.tensors, and what replaces them."""

    run: Callable[..., object]
    arguments: Sequence[str]
    replaced: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_gemm(self) -> bool:
        """Whether it multiplies by W."""
        return "weight" in self.arguments or "experts" in self.arguments

    def __call__(self, given: Mapping[str, Any]) -> None:
        """Make the call."""
        known = {**given, **self.replaced}
        self.run(*(known[name] for name in self.arguments))


def _op(name: str, **replaced: Any) -> Call:
    return Call(getattr(backend, name), ARGUMENTS[name], replaced)


# every op; gelu costs the most registers, and linear_z has a bias
CALLS = {name: _op(name, activation="gelu") for name in ARGUMENTS} | {"linear": _op("linear", bias=None)}
# what changes neither addresses nor widths: compiled in one dtype and size
VARIANTS = {f"glu_backward, {act}": _op("glu_backward", activation=act) for act in ("silu", "relu2", "gelu_tanh")} | {
    "glu, no up": _op("glu", activation="gelu", z=None),
    "glu_backward, no up": _op("glu_backward", activation="gelu", z=None),
    "add, no bias": _op("add", bias=None),
    "add_rms_norm, no bias": _op("add_rms_norm", bias=None),
    "add_layer_norm, no biases": _op("add_layer_norm", bias=None, norm_bias=None),
    "add_rms_norm_backward, no dh": _op("add_rms_norm_backward", dh=None),
    "add_layer_norm_backward, no dh": _op("add_layer_norm_backward", dh=None),
    "grouped_mm, no bias": _op("grouped_mm", expert_bias=None),
    "grouped_scale, no bias": _op("grouped_scale", expert_bias=None),
    "grouped_glu, no up": _op("grouped_glu", activation="gelu", z=None),
    "grouped_glu_backward, no up": _op("grouped_glu_backward", activation="gelu", z=None),
    "combine, no bias": _op("combine", expert_bias=None),
    "combine_backward, no bias": _op("combine_backward", expert_bias=None),
}


def add_calls(modules: Sequence[str]) -> None:
    """Add the CALLS of modules: GEMMs that no op runs yet."""
    for module in modules:
        CALLS.update(importlib.import_module(module).CALLS)


def problems() -> Iterator[Problem]:
    """Calls that together launch every kernel in every configuration; some launch nothing new."""
    # small tiles of a GEMM and large ones, and every number of rows for one row of partial sums (config.py)
    tokens = (64, 2048, 4096)
    for call, t, transposed in product(CALLS, tokens, (False, True)):
        yield Problem(call, "bfloat16", t, 4096, transposed)
    for call, t in product(CALLS, tokens):
        yield Problem(call, "float16", t, 4096)
    for call in VARIANTS:
        yield Problem(call, "bfloat16", 4096, 4096)
    # rows that are a multiple of 16 bytes and not of 16 elements, and rows that are neither
    others = (("bfloat16", 4104), ("bfloat16", 4095), ("float32", 4096), ("float32", 4100), ("float32", 4095))
    for call, (dtype, n) in product(CALLS, others):
        yield Problem(call, dtype, 4096, n)
    # W is the smaller operand, which linear_input scales; in its memory the gain goes along the rows
    for dtype in ("bfloat16", "float16", "float32"):
        yield Problem("linear_input", dtype, 8192, 4096, transposed=True)
    # a row that fits one warp's registers, the widest that fits a block's, and one that fits neither
    for call, n in product([call for call in CALLS if "norm" in call], (456, 8192, 16384)):
        yield Problem(call, "float32", 4096, n)
        for t in tokens:
            yield Problem(call, "bfloat16", t, n)


# a target, a problem, and kernels with the keys of their specialisations
_Task = tuple[str, Problem, set[tuple[str, str]]]


def compile_all(targets: Sequence[str], workers: int = 2, also: Sequence[str] = ()) -> Iterator[Compiled]:
    """Compile every kernel once for each target, in worker processes."""
    add_calls(also)
    tasks = [task for target in targets for task in _tasks(target)]
    with ProcessPoolExecutor(workers, initializer=add_calls, initargs=(also,)) as pool:
        for compiled in pool.map(_compile, tasks):
            yield from compiled


def _tasks(target: str) -> Iterator[_Task]:
    """Problems, each with the kernels that no earlier problem launches."""
    met: set[tuple[str, str]] = set()
    for problem in problems():
        with recording(target, compile=False) as launches:
            call(problem)
        new = {(launch.kernel, launch.key) for launch in launches} - met
        if new:
            yield target, problem, new
        met |= new


def call(problem: Problem) -> None:
    """Make a problem's call, on meta tensors."""
    made = (CALLS | VARIANTS)[problem.call]
    given = tensors(
        problem.tokens, problem.features, problem.features, getattr(torch, problem.dtype), "meta", torch.empty
    )
    if problem.transposed:
        for name in ("weight",) if made.is_gemm else ("x", "dy", "z", "dh", "h"):
            given[name] = given[name].new_empty(given[name].t().shape).t()
    made(given)


def _compile(task: _Task) -> list[Compiled]:
    """Make a call and read the requested kernels."""
    target, problem, wanted = task
    try:
        with recording(target) as launches:
            call(problem)
    except Exception as error:
        error.add_note(f"{target}: {problem}")
        raise
    found = {(launch.kernel, launch.key): launch for launch in launches}
    return [_read(target, problem, found[kernel]) for kernel in sorted(wanted)]


def _read(target: str, problem: Problem, launch: Launch) -> Compiled:
    compiled = launch.compiled
    assert compiled is not None
    names, ttgir = launch.source.fn.arg_names, compiled.asm["ttgir"]
    amd = target.startswith("gfx")
    code = compiled.asm["amdgcn" if amd else "ptx"]
    registers, spilled = _used_amd(code) if amd else _used_nvidia(compiled)
    return Compiled(
        target,
        launch.kernel,
        problem,
        {names[position]: value for (position,), value in launch.source.constants.items()},
        compiled.metadata.num_warps,
        compiled.metadata.num_stages,
        registers,
        spilled,
        compiled.metadata.shared,
        compiled.metadata.num_warps * DEVICES[target].target.warp_size,
        code.count(MATRIX_INSTRUCTIONS[target]),
        _accesses_amd(code) if amd else _accesses_nvidia(code, launch.source.signature),
        [int(buffers) for buffers in re.findall(_RING, ttgir)],
        wgmma_rings(ttgir),
    )


def _used_nvidia(compiled: CompiledKernel) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) by Triton's own cuobjdump."""
    cubin = next(path for name, path in compiled.metadata_group.items() if name.endswith(".cubin"))
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def _used_amd(code: str) -> tuple[int, int]:
    """(vector registers, spilled bytes)."""
    used = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", code)}
    return used["vgpr_count"], 4 * (used["vgpr_spill_count"] + used["sgpr_spill_count"])


def _accesses_nvidia(ptx: str, signature: dict[str, str]) -> dict[str, int]:
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    # the last pointers are those of Triton's scratch memory
    names = dict(zip(re.findall(r"\.ptr \.global .*?(\w+_param_\d+)", ptx), pointers, strict=False))
    sources: defaultdict[str, set[str]] = defaultdict(set)
    for register, operands in re.findall(r"^\s*[\w.]+\s+(%rd\d+), (.*);", ptx, re.MULTILINE):
        sources[register].update(re.findall(r"%rd\d+|\w+_param_\d+", operands))

    def argument(address: str) -> str:
        """The pointer argument from which an address was computed."""
        met, todo = set[str](), {address}
        while todo:
            met |= todo
            todo = set[str]().union(*(sources[one] for one in todo)) - met
        return "|".join(sorted(names[one] for one in met if one in names))

    found: Counter[str] = Counter()
    for kind, vector, bits, address in re.findall(
        r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\s[^;[]*\[\s*(%rd\d+)", ptx
    ):
        found[f"{'load' if kind == 'ld' else 'store'} {argument(address)} {int(vector or 1) * int(bits) // 8}"] += 1
    for address, size in re.findall(r"\bcp\.async\.c[ag]\.\S+ \[[^]]*\], \[\s*(%rd\d+)[^]]*\], (\w+)", ptx):
        found[f"copy {argument(address)} {int(size, 0)}"] += 1
    for direction in re.findall(r"\bcp\.async\.bulk\.tensor\.\dd\.(shared|global)", ptx):
        found[f"{'load' if direction == 'shared' else 'store'} by TMA"] += 1
    return dict(found)


def _accesses_amd(code: str) -> dict[str, int]:
    """By bytes alone: the code has a descriptor where PTX has a pointer."""
    sizes = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
    found = re.findall(r"\b(?:buffer|global|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?)", code)
    return dict(Counter(f"{kind} any {sizes[size]}" for kind, size in found))


_RING = r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x"


def wgmma_rings(ttgir: str) -> list[list[int | None]]:
    """The buffers of the rings that both operands of every wgmma lie in: None in registers, 0 where none is found."""
    rings = {name: int(buffers) for name, buffers in re.findall(rf"(%\w+) = {_RING}", ttgir)}
    views = dict(re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", ttgir))

    def buffers(operand: str) -> int:
        while operand in views:
            operand = views[operand]
        return rings.get(operand, 0)

    dots = re.findall(r"ttng\.warp_group_dot (%\w+), (%\w+), .* : (tensor|!ttg\.memdesc).* \* !ttg\.memdesc", ttgir)
    return [[None if kind == "tensor" else buffers(a), buffers(b)] for a, b, kind in dots]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON object a compiled kernel."""
    parser = argparse.ArgumentParser(prog="python -m gain_ops.kernels.aot", description=main.__doc__)
    parser.add_argument("targets", nargs="*", choices=[*DEVICES, []], help="default: all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--also", nargs="*", default=[], help="modules with CALLS of their own")
    options = parser.parse_args(arguments)
    for compiled in compile_all(options.targets or list(DEVICES), options.workers, options.also):
        print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
