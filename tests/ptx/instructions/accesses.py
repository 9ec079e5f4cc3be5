"""Loads and stores (PTX ISA, ld and st)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx.faults import Fault
from ptx.formats import RAW, Array, dtype
from ptx.gang import Gang, Mask
from ptx.machine import CLUSTER_WINDOW
from ptx.operands import LOCAL_WINDOW, PARAMETER_WINDOW, SHARED_WINDOW, Operands
from ptx.parse import SIZES, Instruction
from ptx.program import Step, translates, unknown

if TYPE_CHECKING:
    from ptx.machine import Block

_SPACES = {
    **{"global": "global", "const": "global", "param": "param", "local": "local"},
    **{"shared": "shared", "shared::cta": "shared", "shared::cluster": "shared"},
}
# what an access may be asked for that changes nothing here
_HINTS = {"ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "volatile", "relaxed", "acquire", "release", "weak"}
_HINTS |= {"gpu", "sys", "cta", "cluster"}


def _form(instruction: Instruction) -> tuple[str, str]:
    """The state space and the type."""
    *options, kind = instruction.opcode[1:]
    space = "generic"
    for option in options:
        if option in _SPACES:
            space = _SPACES[option]
        elif option not in _HINTS and option not in ("v2", "v4", "v8") and not option.startswith(("L1::", "L2::")):
            raise unknown(instruction)
    return space, kind


def _space_of(address: Array, mask: Mask) -> tuple[str, int]:
    """The state space of generic addresses, all of which must lie in one, and where it begins."""
    active = address if mask is None else address[mask]
    for space, window in (("shared", SHARED_WINDOW), ("param", PARAMETER_WINDOW), ("local", LOCAL_WINDOW)):
        inside = (active >= window) & (active < window + (1 << 40))
        if inside.all():
            return space, window
        if inside.any():
            raise Fault("one access to several state spaces")
    return "global", 0


@translates("ld")
def _ld(instruction: Instruction, operands: Operands) -> Step:
    space, kind = _form(instruction)
    names = operands.vector(instruction.operands[0])
    address = operands.address(instruction.operands[1])
    writes = [operands.write(name, kind) for name in names]
    width, count, to = SIZES[kind], len(names), dtype(kind)

    def step(gang: Gang, mask: Mask) -> None:
        at, here = address(gang), space
        if here == "generic":
            here, window = _space_of(at, mask)
            at = at - np.uint64(window)
        values = _LOADS[here](gang, at, mask, width, count)
        for write, value in zip(writes, values, strict=True):
            write(gang, mask, value.view(to))

    return step


@translates("st")
def _st(instruction: Instruction, operands: Operands) -> Step:
    space, kind = _form(instruction)
    if space == "param":
        raise unknown(instruction)
    address = operands.address(instruction.operands[0])
    bits = f"b{8 * SIZES[kind]}"
    reads = [
        operands.read(text, bits if text in operands.places else kind)
        for text in operands.vector(instruction.operands[1])
    ]
    to = RAW[SIZES[kind]]

    def step(gang: Gang, mask: Mask) -> None:
        at, here = address(gang), space
        if here == "generic":
            here, window = _space_of(at, mask)
            at = at - np.uint64(window)
        values = [np.broadcast_to(np.asarray(read(gang)).view(to), gang.lanes) for read in reads]
        if mask is not None:
            at, values = at[mask], [value[mask] for value in values]
        if here not in _STORES:
            raise Fault("stores to a parameter")
        _STORES[here](gang, at, values, mask)

    return step


def _load_parameters(gang: Gang, address: Array, mask: Mask, width: int, count: int) -> list[Array]:
    start = int(address[gang.active(mask)[0]])
    if start % width or start + width * count > len(gang.machine.parameters):
        raise Fault(f"out of bounds: parameters at {start}")
    values = gang.machine.parameters[start : start + width * count].view(RAW[width])
    return [np.full(gang.lanes, value) for value in values]


def load_global(gang: Gang, address: Array, mask: Mask, width: int, count: int) -> list[Array]:
    """Elements of each lane's address; zero in lanes that do not execute."""
    lanes = gang.active(mask)
    at = address[lanes].astype(np.uint64)
    values = gang.machine.memory.load(at, width, count, gang.block.number)
    if gang.machine.settings.count:
        gang.machine.counts.global_access("load", at, width * count, gang.warp_of_lane[lanes])
    return _spread(gang, lanes, values)


def store_global(gang: Gang, address: Array, values: list[Array], mask: Mask) -> None:
    """Elements of the lanes that execute to their addresses."""
    address = address.astype(np.uint64)
    gang.machine.memory.store(address, values, gang.block.number)
    if gang.machine.settings.count:
        nbytes = values[0].dtype.itemsize * len(values)
        gang.machine.counts.global_access("store", address, nbytes, gang.warp_of_lane[gang.active(mask)])


def locate(gang: Gang, address: Array) -> tuple[Block, Array]:
    """The block whose shared memory addresses name, and their offsets in it."""
    offsets = np.asarray(address).astype(np.int64)
    rank = int(offsets.max()) // CLUSTER_WINDOW
    if rank == 0:
        return gang.block, offsets
    if (offsets // CLUSTER_WINDOW != rank).any():
        raise Fault("one access to the shared memory of several blocks")
    if rank > len(gang.block.cluster):
        raise Fault(f"out of bounds: shared memory of block {rank - 1} of a cluster of {len(gang.block.cluster)}")
    return gang.block.cluster[rank - 1], offsets % CLUSTER_WINDOW


def load_shared(gang: Gang, address: Array, mask: Mask, width: int, count: int) -> list[Array]:
    """Elements of each lane's address; zero in lanes that do not execute."""
    lanes = gang.active(mask)
    block, offsets = locate(gang, address[lanes])
    block.shared.check("reads", offsets, width * count)
    each = offsets[:, None] + np.arange(width * count)
    block.shared.check_written(each)
    if block.races and block is gang.block:
        block.races.read(gang.warp_of_lane[lanes], each)
    if gang.machine.settings.count:
        gang.machine.counts.shared_access("ld.shared", offsets, width * count, gang.warp_of_lane[lanes])
    return _spread(gang, lanes, block.shared.views[width][offsets // width + np.arange(count)[:, None]])


def store_shared(gang: Gang, address: Array, values: list[Array], mask: Mask) -> None:
    """Elements of the lanes that execute to their addresses. A byte that is written again as it is counts as no write."""
    block, offsets = locate(gang, address)
    warps, data = gang.warp_of_lane[gang.active(mask)], _bytes_of(values)
    nbytes = data.shape[1]
    block.shared.check("writes", offsets, nbytes)
    write_bytes(gang, block, offsets[:, None] + np.arange(nbytes), data, warps)
    if gang.machine.settings.count:
        gang.machine.counts.shared_access("st.shared", offsets, nbytes, warps)


def _bytes_of(values: list[Array]) -> Array:
    """Elements of each lane -> its bytes, [lanes, n]."""
    return np.ascontiguousarray(np.stack(values, axis=1)).view(np.uint8)


def load_local(gang: Gang, address: Array, mask: Mask, width: int, count: int) -> list[Array]:
    """Elements of each lane's own memory; zero in lanes that do not execute."""
    lanes = gang.active(mask)
    threads = gang.warp_of_lane[lanes] * 32 + gang.lane[lanes]
    values = gang.block.local.load(threads, address[lanes].astype(np.int64), width, count)
    return _spread(gang, lanes, values)


def store_local(gang: Gang, address: Array, values: list[Array], mask: Mask) -> None:
    """Elements to the memory of each lane that executes."""
    lanes = gang.active(mask)
    threads = gang.warp_of_lane[lanes] * 32 + gang.lane[lanes]
    gang.block.local.store(threads, address.astype(np.int64), _bytes_of(values))


def write_bytes(gang: Gang, block: Block, each: Array, data: Array, warps: Array) -> None:
    """Bytes [rows, n] of warps to shared memory."""
    shared = block.shared
    changes = ~shared.written[each] | (shared.data[each] != data)
    shared.mark_written(each)
    shared.data[each] = data
    if (shared.data[each] != data).any():
        raise Fault("race: one instruction writes two values to a byte of shared memory")
    if block.races and block is gang.block:
        rows = changes.any(1)
        if rows.any():
            block.races.write(warps[rows], each[rows])
    gang.machine.events += 1


def _spread(gang: Gang, lanes: Array, values: Array) -> list[Array]:
    """Values of the lanes that execute, as values of all."""
    if len(lanes) == gang.lanes:
        return list(values)
    spread = []
    for value in values:
        full = np.zeros(gang.lanes, value.dtype)
        full[lanes] = value
        spread.append(full)
    return spread


_LOADS = {"param": _load_parameters, "global": load_global, "shared": load_shared, "local": load_local}
_STORES = {"global": store_global, "shared": store_shared, "local": store_local}
