"""Small kernels by hand: a body of PTX on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx.counts import Counts
from ptx.formats import Array
from ptx.machine import Machine, Settings
from ptx.memory import GlobalMemory
from ptx.parse import parse
from ptx.program import Program
from ptx.tensor_maps import BYTES, TensorMap

_REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %h<16>;
    .reg .b32 %r<64>;
    .reg .f32 %f<64>;
    .reg .b64 %rd<32>;
"""


def aligned(values: Any, kind: Any = None) -> Array:
    """A copy at an address that is a multiple of 128, as device memory is."""
    values = np.asarray(values, kind)
    room = np.empty(values.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 128
    made: Array = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    made[...] = values
    return made


def run(
    body: str,
    inputs: Sequence[Array] = (),
    outputs: Sequence[Array] = (),
    *,
    maps: Sequence[TensorMap] = (),
    threads: int = 32,
    grid: int = 1,
    cluster: int = 1,
    shared: int = 0,
    target: str = "sm_90a",
    timing: Any = "late",
    **settings: Any,
) -> Counts:
    """Run a body in which %rd0, %rd1.. are the addresses of arrays, then of maps, and %r0 is the thread's number.

    ``memory`` is the name of the dynamic shared memory. Arrays are aligned()'s; outputs have no value before.
    """
    arrays = [*inputs, *outputs]
    names = [f"p{number}" for number in range(len(arrays) + len(maps))]
    declared = [f".param .u64 {name}" for name in names[: len(arrays)]]
    declared += [f".param .align 64 .b8 {name}[{BYTES}]" for name in names[len(arrays) :]]
    loads = [f"ld.param.u64 %rd{number}, [{name}];" for number, name in enumerate(names[: len(arrays)])]
    loads += [
        f"mov.b64 %rd{number}, {name}; cvta.param.u64 %rd{number}, %rd{number};"
        for number, name in enumerate(names)
        if number >= len(arrays)
    ]
    text = f"""
.version 8.8
.target {target}
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel({", ".join(declared)})
{{
{_REGISTERS}
    mov.u32 %r0, %tid.x;
    {" ".join(loads)}
    {body}
    ret;
}}
"""
    module = parse(text)
    memory, parameters = GlobalMemory(), bytearray()
    for number, array in enumerate(arrays):
        is_output = number >= len(inputs)
        data = array.reshape(-1).view(np.uint8)
        made = memory.add(names[number], array.ctypes.data, data, writable=is_output, written=not is_output)
        made.belongs[:] = True
        parameters += array.ctypes.data.to_bytes(8, "little")
    for tensor_map in maps:
        parameters = parameters.ljust(-(-len(parameters) // 64) * 64, b"\0") + tensor_map.pack()
    machine = Machine(
        Program(module, module.entries["kernel"]),
        (grid, 1, 1),
        (threads, 1, 1),
        bytes(parameters),
        memory,
        dynamic_shared=shared,
        cluster=(cluster, 1, 1),
        settings=Settings(timing=timing, **settings),
    )
    return machine.run()


def by_lane(body: str, *inputs: Any, kind: Any = np.uint32, threads: int = 32) -> Array:
    """Each lane's %r1 (or %rd1x, %h1: by ``kind``) after a body that finds its inputs in %r10, %r11.. or %rd10, %rd11.."""
    arrays = [aligned(np.resize(np.asarray(values), threads)) for values in inputs]
    out = aligned(np.zeros(threads, kind))
    loads, names = [], {2: ("%h", "b16"), 4: ("%r", "b32"), 8: ("%rd", "b64")}
    for number, array in enumerate(arrays):
        register, bits = names[array.itemsize]
        loads.append(f"mad.wide.u32 %rd30, %r0, {array.itemsize}, %rd{number};")
        loads.append(f"ld.global.{bits} {register}{10 + number}, [%rd30];")
    register, bits = names[out.itemsize]
    result = f"{register}20"
    store = f"mad.wide.u32 %rd31, %r0, {out.itemsize}, %rd{len(arrays)}; st.global.{bits} [%rd31], {result};"
    run("\n".join([*loads, body, store]), arrays, [out], threads=threads)
    return out
