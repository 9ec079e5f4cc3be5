"""Launches of compiled Triton kernels, as the project's recording driver sees them, run in the simulator.

with simulated("sm_90", multiprocessors=2) as runs:
    backend.linear(x, weight, delta, None)      # of CPU tensors: the results are there when it returns
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gain_ops.kernels.recording import Launch, recording

from ptx.counts import Counts
from ptx.formats import Array
from ptx.machine import Machine, Settings
from ptx.memory import GlobalMemory
from ptx.parse import Parameter
from ptx.program import program_of
from ptx.tensor_maps import TensorMap


@dataclass(frozen=True)
class Run:
    """A launch that was simulated."""

    kernel: str
    grid: tuple[int, int, int]
    ptx: str
    counts: Counts
    lines: frozenset[int]
    """Of the PTX, those that were executed."""


@contextlib.contextmanager
def simulated(
    architecture: str,
    multiprocessors: int | None = None,
    settings: Settings | None = None,
    rewrite: Callable[[str, str], str] | None = None,
) -> Iterator[list[Run]]:
    """Run the launches of this block in the simulator.

    Args:
        architecture, multiprocessors: as recording's.
        settings: the timing, and what is watched.
        rewrite: (kernel, PTX) -> the PTX that runs instead.

    """
    runs: list[Run] = []
    memory = GlobalMemory()
    outputs: dict[int, Tensor] = {}

    def run(launch: Launch) -> None:
        runs.append(_run(launch, memory, outputs, settings or Settings(), rewrite))

    def noted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*arguments: Any, **options: Any) -> Tensor:
            made = make(*arguments, **options)
            # kept, so that no later tensor has its address
            outputs[made.untyped_storage().data_ptr()] = made
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return empty

    with (
        mock.patch.object(torch, "empty", noted(torch.empty)),
        mock.patch.object(torch, "empty_like", noted(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", noted(Tensor.new_empty)),
        recording(architecture, multiprocessors, run=run),
    ):
        yield runs


def _run(
    launch: Launch,
    memory: GlobalMemory,
    outputs: dict[int, Tensor],
    settings: Settings,
    rewrite: Callable[[str, str], str] | None,
) -> Run:
    compiled, grid, arguments = launch.compiled, launch.grid, launch.arguments
    assert compiled is not None
    assert grid is not None
    assert arguments is not None
    ptx = compiled.asm["ptx"]
    program = program_of(rewrite(launch.kernel, ptx) if rewrite else ptx)
    memory.new_launch()
    values, tensors = _values(launch)
    for name, tensor in tensors:
        add_tensor(memory, name, tensor, writable=tensor.untyped_storage().data_ptr() in outputs)
    threads = compiled.metadata.num_warps * 32, 1, 1
    machine = Machine(
        program,
        grid,
        threads,
        _packed(program.parameters, values),
        memory,
        dynamic_shared=compiled.metadata.shared,
        settings=settings,
    )
    counts = machine.run()
    lines = (
        instruction.line
        for code, times in zip(program.codes, machine.executed, strict=True)
        for instruction in code.instructions
        if times
    )
    return Run(launch.kernel, grid, ptx, counts, frozenset(lines))


def _values(launch: Launch) -> tuple[list[Any], list[tuple[str, Tensor]]]:
    """The values of the parameters, and the tensors that they point to."""
    assert launch.compiled is not None
    assert launch.arguments is not None
    descriptors = iter(getattr(launch.compiled.metadata, "tensordesc_meta", None) or [])
    values: list[Any] = []
    tensors = []
    for name, kind in launch.source.signature.items():
        value = launch.arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(value, TensorDescriptor):
            values += [_tensor_map(value, next(descriptors)).pack(), *value.shape, *value.strides]
            tensors.append((name, value.base))
        elif isinstance(value, Tensor):
            values.append(value.data_ptr())
            tensors.append((name, value))
        else:
            values.append(value)
    # scratch memory of Triton's own, which no kernel here has
    return [*values, 0, 0], tensors


def _tensor_map(descriptor: TensorDescriptor, compiled: dict[str, Any]) -> TensorMap:
    """What Triton's launcher encodes of a descriptor."""
    assert descriptor.padding == "zero"
    assert not compiled["fp4_padded"]
    element = compiled["elem_size"]
    return TensorMap(
        descriptor.base.data_ptr(),
        element,
        descriptor.shape[::-1],
        [stride * element for stride in descriptor.strides[-2::-1]],
        compiled["block_size"][::-1],
        compiled["swizzle"],
    )


def _packed(parameters: list[Parameter], values: list[Any]) -> bytes:
    assert len(parameters) == len(values), f"{len(values)} values of {len(parameters)} parameters"
    packed = bytearray()
    for parameter, value in zip(parameters, values, strict=True):
        packed = packed.ljust(parameter.offset, b"\0")
        if isinstance(value, bytes):
            packed += value
        elif isinstance(value, float):
            packed += struct.pack({4: "<f", 8: "<d"}[parameter.size], value)
        else:
            packed += (int(value) & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
    return bytes(packed)


def add_tensor(memory: GlobalMemory, name: str, tensor: Tensor, *, writable: bool) -> None:
    """Let a launch access the bytes of a tensor, and no others of its storage. What is writable has no value yet."""
    storage = tensor.untyped_storage()
    base = storage.data_ptr()
    allocation = next((one for one in memory.allocations if one.base == base), None)
    if allocation is None:
        data = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()
        allocation = memory.add(name, base, data, writable=writable, written=not writable)
    allocation.belongs[_bytes_of(tensor)] = True


def _bytes_of(tensor: Tensor) -> Array:
    """Where in its storage each byte of a tensor lies."""
    places = np.full(1, tensor.storage_offset(), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + np.arange(size) * stride).ravel()
    return (places[:, None] * tensor.element_size() + np.arange(tensor.element_size())).ravel()
