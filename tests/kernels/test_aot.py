"""Every kernel that a launch can ask for compiles for every architecture, with no GPU, and is the code that it should be."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from benchmarks.experiments import fused_backward
from gain_ops import kernels
from gain_ops.kernels import aot, config
from gain_ops.kernels.recording import DEVICES

from support.accepted import hold

NVIDIA = [target for target in DEVICES if target.startswith("sm")]
FUSED = {
    "linear_forward.linear_kernel",
    "linear_backward.linear_backward_kernel",
    "fused_backward.backward_dx_kernel",
}
ONE_PASS = {
    f"{module.name}.{name}"
    for module in pkgutil.iter_modules(kernels.__path__)
    for name in vars(importlib.import_module(f"gain_ops.kernels.{module.name}"))
    if name.endswith("_kernel")
} - FUSED
# the arguments of all kernels that are [T, n] or a weight
MATRICES = {"a", "b", "c", "out", "x", "y", "z", "dx", "dy", "dz", "gate", "up", "h", "dh", "dgate_up", "residual"}
VECTORS = {"delta", "bias", "weight", "shift", "mean", "r", "partials", "sums"}
VECTORS |= {"offsets", "weights", "place", "order", "dw"}

ROOT = Path(__file__).resolve().parents[2]

NEEDS = Path(__file__).with_name(f"needs-triton-{'.'.join(triton.__version__.split('.')[:2])}.json")
"""Registers, spilled bytes and shared memory of every kernel, as they were accepted."""

Kernel = dict[str, Any]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Kernel]]:
    """Compiled in a process of its own: here the kernels may be interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    output = subprocess.run(
        [sys.executable, "-m", "gain_ops.kernels.aot", "--also", "benchmarks.experiments.fused_backward"],
        env=environment,
        cwd=tmp_path_factory.mktemp("aot"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    found: dict[str, list[Kernel]] = defaultdict(list)
    for line in output.splitlines():
        kernel = json.loads(line)
        found[kernel["target"]].append(kernel)
    return found


def _name(kernel: Kernel) -> str:
    return f"{kernel['kernel']} {tuple(kernel['problem'].values())} {kernel['constants']}"


def _fused(compiled: dict[str, list[Kernel]], target: str) -> list[Kernel]:
    return [kernel for kernel in compiled[target] if kernel["kernel"] in FUSED]


def _rows_are_aligned(kernel: Kernel) -> bool:
    """Unit-stride rows of a multiple of 16 bytes; a transposed W has columns that are so, and the kernels know."""
    problem = kernel["problem"]
    dtype = getattr(torch, problem["dtype"])
    calls = aot.CALLS | aot.VARIANTS | fused_backward.CALLS
    x_is_rows = not problem["transposed"] or calls[problem["call"]].is_gemm
    return x_is_rows and problem["features"] * dtype.itemsize % 16 == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", DEVICES)
def test_every_configuration_is_compiled(target: str, compiled: dict[str, list[Kernel]]) -> None:
    fused = FUSED if target == "sm_90" else FUSED - {"fused_backward.backward_dx_kernel"}
    assert {kernel["kernel"] for kernel in compiled[target]} == fused | ONE_PASS
    for name in fused:
        for dtype in ("bfloat16", "float16"):
            met = {
                (*(kernel["constants"][size] for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K")), kernel["num_stages"])
                for kernel in compiled[target]
                if (kernel["kernel"], kernel["problem"]["dtype"]) == (name, dtype)
            }
            assert met >= {(c.block_m, c.block_n, c.block_k, c.num_stages) for c in config.choices(target)}, name


@pytest.mark.slow
@pytest.mark.parametrize("target", DEVICES)
def test_a_block_fits(target: str, compiled: dict[str, list[Kernel]]) -> None:
    for kernel in compiled[target]:
        assert kernel["shared_bytes"] <= DEVICES[target].shared_memory, _name(kernel)
        assert kernel["threads"] <= 1024, _name(kernel)
        # an SM's 65 536 registers, a SIMD's 512 for each of 64 lanes
        assert kernel["registers"] <= (255 if target in NVIDIA else 512), _name(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("target", DEVICES)
def test_nothing_spills(target: str, compiled: dict[str, list[Kernel]]) -> None:
    # off sm_90 the compiler may cap registers for a second block a multiprocessor, at the price of a few words
    allowed = 0 if target == "sm_90" else 32
    spilling = {_name(k): k["spilled_bytes"] for k in compiled[target] if k["spilled_bytes"] > allowed}
    assert not spilling


@pytest.mark.slow
@pytest.mark.parametrize("target", DEVICES)
def test_a_dot_is_the_matrix_instruction(target: str, compiled: dict[str, list[Kernel]]) -> None:
    for kernel in compiled[target]:
        assert (kernel["matrix_instructions"] > 0) == (kernel["kernel"] in FUSED), _name(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("target", NVIDIA)
def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(target: str, compiled: dict[str, list[Kernel]]) -> None:
    """Also where a row is a multiple of 8 elements of 16 bits and not of 16, of which Triton's own hint says nothing."""
    aligned = [kernel for kernel in compiled[target] if _rows_are_aligned(kernel)]
    assert {kernel["problem"]["features"] % 16 for kernel in aligned} >= {0, 8}
    narrow = {
        f"{access} in {_name(kernel)}"
        for kernel in aligned
        for access in kernel["accesses"]
        if access.split()[1] in MATRICES and access.split()[2] != "16"
    }
    assert not narrow


@pytest.mark.slow
@pytest.mark.parametrize("target", NVIDIA)
def test_every_access_is_known_by_its_argument(target: str, compiled: dict[str, list[Kernel]]) -> None:
    """What the test above sees is all there is."""
    for kernel in compiled[target]:
        arguments = {access.split()[1] for access in kernel["accesses"]}
        assert arguments <= MATRICES | VECTORS | {"by"}, _name(kernel)
        if kernel["kernel"] in ONE_PASS - {"partials.sum_partials_kernel", "partials.sum_expert_partials_kernel"}:
            assert arguments & MATRICES, _name(kernel)


@pytest.mark.slow
def test_ampere_copies_asynchronously_in_as_many_stages_as_asked_for(compiled: dict[str, list[Kernel]]) -> None:
    for kernel in _fused(compiled, "sm_80"):
        copied = {access for access in kernel["accesses"] if access.startswith("copy")}
        assert copied == {"copy a 16", "copy b 16"}, _name(kernel)
        # the stage that is multiplied lies in registers
        assert kernel["rings"] == [kernel["num_stages"] - 1] * 2, _name(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_matrices_go_by_tma_where_there_is_one(target: str, compiled: dict[str, list[Kernel]]) -> None:
    outputs = {"linear_z": 2, "ddelta_recompute": 0}
    for kernel in _fused(compiled, target):
        accesses = kernel["accesses"]
        assert not any(access.split()[1] in MATRICES for access in accesses), _name(kernel)
        assert accesses["load by TMA"] >= 2, _name(kernel)
        stores = outputs.get(kernel["problem"]["call"], 1) * kernel["constants"]["SUBTILES"]
        assert accesses.get("store by TMA", 0) == stores, _name(kernel)


@pytest.mark.slow
def test_both_operands_of_a_wgmma_have_a_buffer_a_stage(compiled: dict[str, list[Kernel]]) -> None:
    """A wgmma reads shared memory while the next load writes it: a ring that is shorter than it should be is a race."""
    for kernel in _fused(compiled, "sm_90"):
        stages = kernel["num_stages"]
        # backward_dx scales dy in registers
        in_registers = kernel["problem"]["call"] == "backward_dx"
        assert kernel["wgmma_rings"], _name(kernel)
        for rings in kernel["wgmma_rings"]:
            assert rings == [None if in_registers else stages, stages], _name(kernel)


@pytest.mark.slow
def test_no_kernel_needs_more_than_was_accepted(compiled: dict[str, list[Kernel]]) -> None:
    found = {
        " ".join(map(str, (kernel["target"], kernel["kernel"], *kernel["problem"].values()))): [
            kernel[need] for need in ("registers", "spilled_bytes", "shared_bytes")
        ]
        for kernels in compiled.values()
        for kernel in kernels
    }
    hold(NEEDS, "registers, spilled bytes or shared bytes", found)


def test_a_short_ring_is_seen() -> None:
    """The main loop of a kernel whose first operand also went into a sum: as compiled, types shortened."""
    ttgir = """
    %dy = ttg.local_alloc : () -> !ttg.memdesc<3x128x64xbf16, #shared, #smem, mutable> loc(#loc88)
    %w = ttg.local_alloc : () -> !ttg.memdesc<4x256x64xbf16, #shared, #smem, mutable> loc(#loc89)
    %acc = ttg.local_alloc : () -> !ttg.memdesc<3x1xi64, #shared1, #smem, mutable> loc(#loc90)
    %dy_44 = ttg.memdesc_index %dy[%i] : !ttg.memdesc<3x128x64xbf16> -> !ttg.memdesc<128x64xbf16> loc(#loc88)
    %w_47 = ttg.memdesc_index %w[%j] : !ttg.memdesc<4x256x64xbf16> -> !ttg.memdesc<256x64xbf16> loc(#loc89)
    %w_48 = ttg.memdesc_trans %w_47 {order = array<i32: 1, 0>} : !ttg.memdesc<256x64xbf16> -> !ttg.memdesc<64x256xbf16>
    %acc_48 = ttng.warp_group_dot %dy_44, %w_48, %acc_47 : !ttg.memdesc<128x64xbf16> * !ttg.memdesc<64x256xbf16> -> ...
    """
    assert aot.wgmma_rings(ttgir) == [[3, 4]]


@pytest.mark.slow
def test_cdna_reads_aligned_rows_in_vectors(compiled: dict[str, list[Kernel]]) -> None:
    for kernel in filter(_rows_are_aligned, compiled["gfx942"]):
        if kernel["problem"]["call"] == "grouped_mm, no bias":
            continue  # it loads no activation
        widths = {int(access.split()[2]) for access in kernel["accesses"] if access.startswith("load")}
        # a tile of 4 x 256 elements of 16 bits is 8 bytes a thread
        assert max(widths) >= (16 if kernel["kernel"] in FUSED else 8), _name(kernel)
        assert not (kernel["kernel"] in FUSED and min(widths) < 4), _name(kernel)
