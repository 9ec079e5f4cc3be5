"""Compile ahead of time, with no GPU, every kernel in every configuration that the heuristics can choose.

What is compiled is what is launched: the launchers run on meta tensors, their kernel calls are recorded instead of started,
and the recorded arguments make the compiler's signature. The report says what the machine code needs and holds: registers,
spilled bytes, shared memory, matrix instructions.

    python -m gain_ops.kernels.aot sm_90            one JSON object a kernel, on lines
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gain_ops.kernels import (
    activations,
    config,
    fused_backward,
    linear_forward,
    matmul_reduce,
    norm,
    partials,
    rows,
)
from gain_ops.kernels.config import GemmConfig

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

SHARED_MEMORY_LIMITS = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes a block can have. sm_80's configurations also serve sm_86, sm_89 and sm_120, whose limit this is."""

MATRIX_INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
"""The instruction that a half-precision dot must become: mma, wgmma, tcgen05 and MFMA."""

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Problem:
    """One kernel call to compile: everything needed to make it again in another process."""

    kernel: str
    variant: str
    dtype: str
    precision: str
    config: GemmConfig | None
    aligned: bool


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a kernel needs and holds."""

    problem: Problem
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    matrix_instructions: int


def problems(target: str) -> list[Problem]:
    """Every kernel call that can happen on a target: kernels x variants x dtypes x configurations."""
    found = [Problem("rows", v, d, "ieee", None, a) for v in _ROWS_VARIANTS for d in _DTYPES for a in (True, False)]
    found += [Problem("glu", v, d, "ieee", None, a) for v in _GLU_VARIANTS for d in _DTYPES for a in (True, False)]
    found += [Problem("norm", v, d, "ieee", None, a) for v in _NORM_VARIANTS for d in _DTYPES for a in (True, False)]
    found.append(Problem("partials", "sum", "float32", "ieee", None, True))
    for dtype in _DTYPES:
        for precision in ("ieee", "tf32") if dtype == "float32" and target.startswith("sm") else ("ieee",):
            for kernel, variants in _GEMM_VARIANTS.items():
                for choice, aligned in config.choices(target, getattr(torch, dtype), precision):
                    if kernel == "backward_dx" and not fused_backward.serves(target, choice):
                        continue
                    # float16 differs from bfloat16 in one conversion: the variants that need most registers will do
                    chosen = _HEAVIEST[kernel] if dtype == "float16" else variants
                    found += [Problem(kernel, variant, dtype, precision, choice, aligned) for variant in chosen]
    return found


def compile_all(target: str, workers: int = 2) -> Iterator[Compiled]:
    """Compile every problem of a target, in worker processes."""
    todo = problems(target)
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(compile_one, todo, [target] * len(todo), chunksize=4)


def compile_one(problem: Problem, target: str) -> Compiled:
    """Compile one problem for one target and read the result."""
    launches = _recorded(problem)
    kernel, arguments = launches[0]
    compiled = _compile(kernel, arguments, TARGETS[target])
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spilled, instructions = read(compiled, MATRIX_INSTRUCTIONS[target])
    threads = compiled.metadata.num_warps * TARGETS[target].warp_size
    return Compiled(problem, target, registers, spilled, compiled.metadata.shared, threads, instructions)


_DTYPES = ("bfloat16", "float16", "float32")
_ROWS_VARIANTS = ("backward", "ddelta", "scale", "by_row")
_GLU_VARIANTS = (
    "glu, silu",
    "glu, gelu_tanh",
    "glu_plain, gelu_tanh",
    "glu_backward, silu",
    "glu_backward, gelu",
    "glu_ddelta, silu",
)
# the widest row that is held in registers, and one that is not
_NORM_VARIANTS = ("rms_norm, 8192", "rms_norm_backward, 8192", "rms_norm, 16384", "rms_norm_backward, 16384")
_GEMM_VARIANTS = {
    "linear": ("plain", "plain, W transposed", "bias and z", "bias and z, W transposed"),
    "matmul_reduce": ("c", "acc", "nothing", "c, W transposed", "acc, W transposed", "nothing, W transposed"),
    "backward_dx": ("scales", "W scaled", "scales, W transposed"),
}
_HEAVIEST = {
    "linear": ("bias and z", "bias and z, W transposed"),
    "matmul_reduce": ("acc", "c, W transposed"),
    "backward_dx": ("scales",),
}


def _recorded(problem: Problem) -> list[tuple[JITFunction[Any], dict[str, Any]]]:
    """The kernel calls that a problem's launcher makes: (kernel, arguments by name)."""
    calls: list[tuple[JITFunction[Any], dict[str, Any]]] = []

    def record(self: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        calls.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    with mock.patch.object(JITFunction, "run", record), _tf32(problem.precision == "tf32"):
        _launch(problem)
    return calls


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _launch(problem: Problem) -> None:
    dtype = getattr(torch, problem.dtype)
    m = n = k = 4096 if problem.aligned else 4095

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    r = torch.empty(m, dtype=torch.float32, device="meta")
    delta, bias = torch.empty(n, dtype=torch.float32, device="meta"), empty(n)
    variant, _, detail = problem.variant.partition(", ")
    if problem.kernel == "norm":
        n = int(detail) if problem.aligned else int(detail) - 1
    weight = empty(k, n).t() if detail == "W transposed" else empty(n, k)
    launchers: dict[str, Callable[[], Any]] = {
        "sum": lambda: partials.sum_partials(empty(m, n)),
        "backward": lambda: rows.launch_backward(empty(m, n), empty(m, n), delta, empty(m, n)),
        "ddelta": lambda: rows.launch_backward(empty(m, n), empty(m, n), None, None),
        "scale": lambda: rows.scale(empty(m, n), delta),
        "by_row": lambda: rows.linear_input(empty(m, k), empty(k, n).t()[:8], delta, None),
        "glu": lambda: activations.glu(empty(m, n), empty(m, n), delta, detail),
        "glu_plain": lambda: activations.glu(empty(m, n), None, delta, detail),
        "glu_backward": lambda: activations.glu_backward(empty(m, n), empty(m, n), empty(m, n), delta, detail),
        "glu_ddelta": lambda: activations.glu_ddelta(empty(m, n), empty(m, n), empty(m, n), detail),
        "rms_norm": lambda: norm.rms_norm(empty(m, n), bias, delta, 1e-5),
        "rms_norm_backward": lambda: norm.rms_norm_backward(empty(m, n), empty(m, n), bias, delta, r),
        "plain": lambda: linear_forward.launch(empty(m, k), weight, delta, None, empty(m, n), None, problem.config),
        "bias and z": lambda: linear_forward.launch(
            empty(m, k), weight, delta, bias, empty(m, n), empty(m, n), problem.config
        ),
    }
    if problem.kernel == "backward_dx":
        assert problem.config is not None
        gain = delta if variant == "scales" else None
        fused_backward.launch(empty(m, n), empty(m, n), weight, gain, empty(m, k), problem.config)
    elif problem.kernel == "matmul_reduce":
        writes = variant != "nothing"
        matmul_reduce.launch(
            empty(m, k),
            weight,
            empty(m, n),
            delta if writes else None,
            empty(m, n) if writes else None,
            variant,
            problem.config,
        )
    else:
        launchers[variant]()


def _compile(kernel: JITFunction[Any], arguments: dict[str, Any], target: GPUTarget) -> CompiledKernel:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        kind = _kind(value, parameter)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif not kind.startswith("tensordesc") and (isinstance(value, Tensor) or value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {key: arguments[key] for key in ("num_warps", "num_stages", "enable_fp_fusion") if key in arguments}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def _kind(value: Any, parameter: Any) -> str:
    """The compiler's type of an argument, by the rules that a launch follows."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if parameter.is_constexpr or value is None or value == 1:
        return "constexpr"
    return parameter.annotation_type or "i32"


def _read_nvidia(compiled: CompiledKernel, instruction: str) -> tuple[int, int, int]:
    """(registers, stack and local bytes, matrix instructions) of a cubin, by Triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        output = subprocess.run(
            [tool, "--dump-resource-usage", "--dump-sass", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(number) for key, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], len(re.findall(rf"\b{instruction}\b", output))


def _read_amd(compiled: CompiledKernel, instruction: str) -> tuple[int, int, int]:
    """(registers, spilled bytes, matrix instructions) of a gfx kernel's assembly."""
    text = compiled.asm["amdgcn"]
    numbers = {key: int(n) for key, n in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
    spilled = 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])
    return numbers["vgpr_count"], spilled, text.count(instruction)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON object a compiled kernel."""
    parser = argparse.ArgumentParser(prog="python -m gain_ops.kernels.aot", description=main.__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="default: all")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    for target in options.targets or TARGETS:
        for compiled in compile_all(target, options.workers):
            print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
