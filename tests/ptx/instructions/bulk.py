"""TMA: boxes of a tensor to shared memory, counted by an mbarrier, and back, in groups of a thread (PTX ISA, Tensor copy)."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ptx.faults import Fault
from ptx.formats import Array
from ptx.gang import Gang, Mask
from ptx.groups import Groups
from ptx.instructions.accesses import locate
from ptx.instructions.mbarriers import Mbarrier, find, touch
from ptx.machine import Block
from ptx.memory import SECTOR
from ptx.operands import PARAMETER_WINDOW, Operands, Reader
from ptx.parse import Instruction
from ptx.program import Step, unknown
from ptx.tensor_maps import BYTES, SPANS, TensorMap, swizzled

ALIGNMENT = 128
"""Of a box in shared memory."""


def translate(instruction: Instruction, operands: Operands) -> Step:
    """The step of a cp.async.bulk instruction."""
    kind, *options = instruction.opcode[3:]
    if kind == "commit_group":
        return _commit
    if kind == "wait_group":
        return _wait(int(instruction.operands[0], 0), "read" in options)
    if kind == "tensor" and options[1] in ("shared::cta", "shared::cluster") and options[2] == "global":
        if set(options[3:]) - {"tile", "mbarrier::complete_tx::bytes", "multicast::cluster", "L2::cache_hint"}:
            raise unknown(instruction)
        return _load(instruction, operands, "multicast::cluster" in options)
    if kind == "tensor" and options[1:3] == ["global", "shared::cta"]:
        if set(options[3:]) - {"tile", "bulk_group", "L2::cache_hint"}:
            raise unknown(instruction)
        return _store(instruction, operands)
    raise unknown(instruction)


def _box(text: str, operands: Operands) -> Callable[[Gang, int], tuple[TensorMap, list[int]]]:
    """``[map, {coordinates}]``: the map and where the box is."""
    found = re.match(r"\[\s*([^,]+?)\s*,\s*\{(.*)\}\s*\]$", text)
    if found is None:
        raise Fault(f"no map and coordinates: {text}")
    address = operands.address(f"[{found.group(1)}]")
    readers = [operands.read(part.strip(), "s32") for part in found.group(2).split(",")]

    def box(gang: Gang, lane: int) -> tuple[TensorMap, list[int]]:
        tensor_map = _map_at(gang, int(address(gang)[lane]))
        coordinates = [int(np.broadcast_to(read(gang), gang.lanes)[lane]) for read in readers]
        if len(coordinates) != len(tensor_map.box):
            raise Fault(f"{len(coordinates)} coordinates of a tensor of {len(tensor_map.box)} dimensions")
        return tensor_map, coordinates

    return box


def _map_at(gang: Gang, address: int) -> TensorMap:
    machine = gang.machine
    start = address - PARAMETER_WINDOW
    if not 0 <= start <= len(machine.parameters) - BYTES:
        raise Fault(f"a tensor map at {address:#x}: expected one in a parameter")
    if start % 64:
        raise Fault(f"misaligned: a tensor map at parameter {start}")
    data = machine.parameters[start : start + BYTES].tobytes()
    if data not in machine.maps:
        machine.maps[data] = TensorMap.unpack(data)
    return machine.maps[data]


def _check_place(block: Block, offset: int, nbytes: int, what: str) -> None:
    if offset % ALIGNMENT:
        raise Fault(f"misaligned: {what} {offset:#x} for {ALIGNMENT} bytes")
    if offset + nbytes > block.shared.size:
        raise Fault(f"out of bounds: {what} {offset:#x} for {nbytes} bytes of {block.shared.size:#x}")


def _load(instruction: Instruction, operands: Operands, multicast: bool) -> Step:
    to, box = operands.address(instruction.operands[0]), _box(instruction.operands[1], operands)
    barrier = operands.address(instruction.operands[2])
    receivers: Reader | None = operands.read(instruction.operands[3], "b16") if multicast else None

    def step(gang: Gang, mask: Mask) -> None:
        for lane in gang.active(mask):
            tensor_map, coordinates = box(gang, int(lane))
            block, offsets = locate(gang, to(gang)[lane : lane + 1])
            counting, place, _ = find(gang, int(barrier(gang)[lane]))
            if receivers is None:
                pairs = [(block, counting)]
            else:
                chosen = int(np.broadcast_to(receivers(gang), gang.lanes)[lane])
                if chosen >> len(gang.block.cluster):
                    raise Fault(f"multicast to {chosen:#x} in a cluster of {len(gang.block.cluster)}")
                pairs = [(one, one) for rank, one in enumerate(gang.block.cluster) if chosen >> rank & 1]
            targets = []
            for receiver, counter in pairs:
                if place not in counter.mbarriers:
                    raise Fault(f"no mbarrier at {place:#x} of block {counter.rank} of the cluster")
                targets.append((receiver, counter.mbarriers[place]))
                _check_place(receiver, int(offsets[0]), tensor_map.box_bytes, "a box to")
                if receiver is gang.block is counter:
                    _note_load(gang, int(lane), int(offsets[0]), tensor_map, place)
            gang.machine.counts["TMA loads"] += 1
            gang.machine.counts["TMA bytes"] += tensor_map.box_bytes * len(targets)
            load = _Load(gang, tensor_map, coordinates, int(offsets[0]), targets)
            if gang.machine.happens_at_once():
                load()
            else:
                gang.machine.in_flight.append(load)
        gang.machine.events += 1

    return step


def _note_load(gang: Gang, lane: int, offset: int, tensor_map: TensorMap, place: int) -> None:
    block, warp = gang.block, int(gang.warp_of_lane[lane])
    touch(gang, block, place, np.array([warp]))
    if block.races:
        cells = np.arange(offset, offset + tensor_map.box_bytes)
        clock = block.mbarriers[place].clock + 1
        block.races.write_later(block.races.barrier_agent(place), clock, warp, cells, through_proxy=True)


class _Load:
    """A box on its way to shared memory; what is outside of the tensor is zero."""

    def __init__(
        self,
        gang: Gang,
        tensor_map: TensorMap,
        coordinates: list[int],
        offset: int,
        targets: list[tuple[Block, Mbarrier]],
    ) -> None:
        self.machine, self.block, self.map = gang.machine, gang.block, tensor_map
        self.coordinates, self.offset, self.targets = coordinates, offset, targets

    def __call__(self) -> None:
        element = self.map.element
        offsets, inside = self.map.elements(self.coordinates)
        data = np.zeros((len(offsets), element), np.uint8)
        if inside.any():
            addresses = np.uint64(self.map.address) + offsets[inside].astype(np.uint64)
            values = self.machine.memory.load(addresses, element, 1, self.block.number)
            data[inside] = np.ascontiguousarray(values[0]).view(np.uint8).reshape(-1, element)
            self.machine.counts["global load bytes"] += len(addresses) * element
            self.machine.counts["global load sectors"] += len(np.unique(addresses // np.uint64(SECTOR)))
        cells = swizzled(np.arange(self.offset, self.offset + data.size), SPANS[self.map.swizzle])
        for block, mbarrier in self.targets:
            block.shared.mark_written(cells)
            block.shared.data[cells] = data.ravel()
            mbarrier.transactions -= data.size
            mbarrier.settle()
        self.machine.events += 1


class BulkStores(Groups):
    """The bulk stores of a thread: a wait is for their reads of shared memory, or for all."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0
        """Groups whose shared memory has been read."""

    def wait_read(self, pending: int) -> int:
        """Let at most the last groups still read: -> the groups that have."""
        for group in self.committed[: max(0, len(self.committed) - pending)]:
            for store in group:
                assert isinstance(store, _Store)
                store.take()
        self.read = max(self.read, self.finished + len(self.committed) - pending)
        return self.read

    def end(self) -> None:
        super().end()
        if self.read < self.finished + len(self.committed):
            raise Fault("exits while a bulk store still reads shared memory: cp.async.bulk.wait_group.read is missing")
        self.wait(0)


def _store(instruction: Instruction, operands: Operands) -> Step:
    box, source = _box(instruction.operands[0], operands), operands.address(instruction.operands[1])

    def step(gang: Gang, mask: Mask) -> None:
        issued: set[tuple[object, ...]] = set()
        for lane in gang.active(mask):
            tensor_map, coordinates = box(gang, int(lane))
            block, offsets = locate(gang, source(gang)[lane : lane + 1])
            if block is not gang.block:
                raise Fault("a bulk store from another block's shared memory")
            offset, warp, thread = int(offsets[0]), int(gang.warp_of_lane[lane]), gang.thread(int(lane))
            # CUTLASS lets all lanes of a warp issue one store: the same bytes, so once
            same = warp, tensor_map, tuple(coordinates), offset
            if same in issued:
                continue
            issued.add(same)
            _check_place(block, offset, tensor_map.box_bytes, "a box from")
            groups = block.bulk_stores.setdefault(thread, BulkStores())
            store = _Store(gang, tensor_map, coordinates, offset)
            if block.races:
                if any(one // 32 == warp and one != thread for one in block.bulk_stores):
                    raise Fault("bulk stores by several threads of a warp: their races are not told apart")
                agent = block.races.bulk + warp
                block.races.read_later(agent, groups.next_clock, warp, store.live_cells())
            if gang.machine.happens_at_once():
                store.take()
            groups.add(store)
            gang.machine.counts["TMA stores"] += 1
            gang.machine.counts["TMA bytes"] += tensor_map.box_bytes
        gang.machine.events += 1

    return step


class _Store:
    """A box on its way to global memory; what is outside of the tensor is not written."""

    def __init__(self, gang: Gang, tensor_map: TensorMap, coordinates: list[int], offset: int) -> None:
        self.machine, self.block, self.map = gang.machine, gang.block, tensor_map
        self.offsets, self.inside = tensor_map.elements(coordinates)
        cells = swizzled(np.arange(offset, offset + tensor_map.box_bytes), SPANS[tensor_map.swizzle])
        self.cells = cells.reshape(-1, tensor_map.element)
        self.data: Array | None = None

    def live_cells(self) -> Array:
        """The bytes that are inside of the tensor."""
        return self.cells[self.inside].ravel()

    def take(self) -> Array:
        """Read shared memory."""
        if self.data is None:
            live = self.cells[self.inside]
            self.block.shared.check_written(live)
            self.data = self.block.shared.data[live]
        return self.data

    def __call__(self) -> None:
        data = self.take()
        if self.inside.any():
            addresses = np.uint64(self.map.address) + self.offsets[self.inside].astype(np.uint64)
            kind = np.dtype(f"u{self.map.element}")
            self.machine.memory.store(addresses, [data.view(kind)[:, 0]], self.block.number)
            self.machine.counts["global store bytes"] += data.size
            self.machine.counts["global store sectors"] += len(np.unique(addresses // np.uint64(SECTOR)))


def _threads(gang: Gang, mask: Mask) -> dict[int, BulkStores]:
    """The threads that execute and have issued a bulk store."""
    executing = {gang.thread(int(lane)) for lane in gang.active(mask)}
    return {thread: groups for thread, groups in gang.block.bulk_stores.items() if thread in executing}


def _commit(gang: Gang, mask: Mask) -> None:
    for groups in _threads(gang, mask).values():
        groups.commit()


def _wait(pending: int, read: bool) -> Step:
    def step(gang: Gang, mask: Mask) -> None:
        races = gang.block.races
        for thread, groups in _threads(gang, mask).items():
            if not read:
                groups.wait(pending)
            seen = groups.wait_read(pending)
            if races:
                races.finished(races.bulk + thread // 32, seen, [thread // 32])

    return step
