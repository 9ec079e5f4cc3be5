"""Blocks of threads, their barriers and their scheduler: what runs when, and what it means that nothing can."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from ptx.counts import Counts
from ptx.faults import Fault
from ptx.formats import Array
from ptx.gang import Gang, merged
from ptx.groups import Groups
from ptx.memory import GlobalMemory, LocalMemory, SharedMemory
from ptx.races import Clocks, Races

if TYPE_CHECKING:
    from ptx.instructions.bulk import BulkStores
    from ptx.instructions.mbarriers import Mbarrier
    from ptx.program import Program
    from ptx.tensor_maps import TensorMap

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_90a": 232_448}
"""Bytes of shared memory that a block can have."""

CLUSTER_WINDOW = 1 << 24
"""shared::cluster addresses of other blocks: (rank + 1) * CLUSTER_WINDOW + offset."""


@dataclass(frozen=True)
class Settings:
    """The timing of a run, and what it watches."""

    timing: Literal["late", "early", "random"] = "late"
    """When what is asynchronous happens: as late as PTX allows, at once, or by a coin."""
    seed: int = 0
    together: bool = True
    """Whether a block's warps run in lockstep; else each by itself, in random order."""
    races: bool = True
    count: bool = False
    """Count sectors and bank conflicts too."""
    limit: int = 2_000_000
    """Basic blocks that a launch may execute: more is a kernel without an end."""


@dataclass
class NamedBarrier:
    """A barrier of bar.sync that some warps have arrived at."""

    count: int | None
    clocks: Clocks | None
    arrived: int = 0
    waiting: list[Gang] = field(default_factory=list)


class ClusterBarrier:
    """The barrier of a cluster's blocks: all warps arrive before one that waits goes on."""

    def __init__(self, warps: int) -> None:
        self.warps, self.arrived, self.phase = warps, 0, 0
        self.expected: dict[tuple[int, int], int] = {}
        """The phase that each warp of a block arrived in."""
        self.waiting: list[Gang] = []
        self.clocks: dict[int, Clocks] = {}

    def arrive(self, gang: Gang) -> None:
        """Warps arrive, and go on."""
        block = gang.block
        for warp in gang.warps:
            if self.expected.get((block.rank, int(warp)), -1) == self.phase:
                raise Fault("a warp arrives twice at the cluster's barrier, and does not wait between")
            self.expected[block.rank, int(warp)] = self.phase
        if block.races:
            # what blocks do in each other's shared memory is not watched
            block.races.release(self.clocks.setdefault(block.rank, block.races.new_clocks()), gang.warps)
        self.arrived += len(gang.warps)
        block.machine.events += 1
        if self.arrived == self.warps:
            self.arrived, self.phase = 0, self.phase + 1
            for waiting in self.waiting:
                self._go_on(waiting)
            self.waiting = []

    def wait(self, gang: Gang) -> None:
        """Warps wait for the phase that they arrived in."""
        if any(self.expected.get((gang.block.rank, int(warp)), self.phase) == self.phase for warp in gang.warps):
            gang.blocked = True
            self.waiting.append(gang)
        else:
            self._go_on(gang)

    def _go_on(self, gang: Gang) -> None:
        gang.blocked = False
        if gang.block.races:
            gang.block.races.acquire(self.clocks[gang.block.rank], gang.warps)


class Block:
    """A block of threads."""

    def __init__(self, machine: Machine, index: tuple[int, int, int], rank: int) -> None:
        self.machine, self.index, self.rank = machine, index, rank
        grid = machine.grid
        self.number = index[0] + grid[0] * (index[1] + grid[1] * index[2])
        self.warps = machine.warps
        self.live = np.ones(self.warps, bool)
        self.shared = SharedMemory(machine.shared_bytes)
        self.local = LocalMemory(32 * self.warps, machine.program.local_bytes)
        self.barriers: dict[int, NamedBarrier] = {}
        self.mbarriers: dict[int, Mbarrier] = {}
        self.barrier_clocks: dict[int, int] = {}
        self.copies = [Groups() for _ in range(self.warps)]
        self.products = [Groups() for _ in range(-(-self.warps // 4))]
        self.bulk_stores: dict[int, BulkStores] = {}
        self.races = Races(len(self.shared.data), self.warps) if machine.settings.races else None
        self.cluster: list[Block] = [self]
        self.cluster_barrier = ClusterBarrier(self.warps)

    def special(self, name: str, gang: Gang) -> Array:
        """A special register's value in each lane (PTX ISA, Special Registers)."""
        machine, axis = self.machine, {"x": 0, "y": 1, "z": 2}.get(name[-1], 0)
        threads = gang.warp_of_lane * 32 + gang.lane
        width, height, _ = machine.threads
        one, lane = np.uint32(1), gang.lane
        by_lane: dict[str, Callable[[], Array]] = {
            "%laneid": lambda: lane,
            "%warpid": lambda: gang.warp_of_lane.astype(np.uint32),
            "%tid": lambda: [threads % width, threads // width % height, threads // (width * height)][axis],
            "%lanemask_eq": lambda: one << lane,
            "%lanemask_lt": lambda: (one << lane) - one,
            "%lanemask_le": lambda: (one << lane) - one | one << lane,
            "%lanemask_gt": lambda: ~((one << lane) - one | one << lane),
            "%lanemask_ge": lambda: ~((one << lane) - one),
        }
        everywhere = {
            "%ntid": machine.threads[axis],
            "%ctaid": self.index[axis],
            "%nctaid": machine.grid[axis],
            "%cluster_ctarank": self.rank,
            "%cluster_ctaid": self.index[axis] % machine.cluster[axis],
            "%cluster_nctarank": len(self.cluster),
            "%cluster_nctaid": machine.cluster[axis],
            "%clusterid": self.index[axis] // machine.cluster[axis],
            "%nclusterid": machine.grid[axis] // machine.cluster[axis],
        }
        stem = name.rpartition(".")[0] or name
        if stem in by_lane:
            return by_lane[stem]().astype(np.uint32)
        if stem in everywhere:
            return gang.full(everywhere[stem], np.dtype(np.uint32))
        raise Fault(f"unknown special register {name}")

    def arrive(self, number: int, count: int | None, gang: Gang, waits: bool) -> None:
        """A gang's warps arrive at a named barrier."""
        barrier = self.barriers.get(number)
        if barrier is None:
            barrier = self.barriers[number] = NamedBarrier(count, self.races.new_clocks() if self.races else None)
        if barrier.count != count:
            raise Fault(f"barrier {number} of {barrier.count} threads, and of {count}")
        barrier.arrived += gang.lanes
        if self.races and barrier.clocks:
            self.races.release(barrier.clocks, gang.warps)
        if waits:
            gang.blocked = True
            barrier.waiting.append(gang)
        self.machine.events += 1
        self._complete(number, barrier)

    def _complete(self, number: int, barrier: NamedBarrier) -> None:
        expected = 32 * int(self.live.sum()) if barrier.count is None else barrier.count
        if barrier.arrived > expected:
            raise Fault(f"barrier {number}: {barrier.arrived} threads arrived, of {expected}")
        if barrier.arrived == expected:
            for gang in barrier.waiting:
                gang.blocked = False
                if self.races and barrier.clocks:
                    self.races.acquire(barrier.clocks, gang.warps)
            del self.barriers[number]

    def end_warps(self, gang: Gang, warps: Array) -> None:
        """Warps ended: nothing of theirs may be in flight, and no barrier waits for them."""
        self.live[warps] = False
        for warp in warps:
            if self.copies[warp].in_flight:
                raise Fault("exits with a cp.async in flight")
            if self.products[warp // 4].in_flight:
                raise Fault("exits with a wgmma in flight")
            for thread, groups in self.bulk_stores.items():
                if thread // 32 == warp:
                    groups.end()
        for number, barrier in list(self.barriers.items()):
            if barrier.count is None:
                self._complete(number, barrier)


class Machine:
    """One launch of a program."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        parameters: bytes,
        memory: GlobalMemory,
        *,
        dynamic_shared: int = 0,
        cluster: tuple[int, int, int] = (1, 1, 1),
        settings: Settings | None = None,
    ) -> None:
        self.program, self.grid, self.threads, self.memory, self.cluster = program, grid, threads, memory, cluster
        self.settings = settings or Settings()
        self.random = random.Random(self.settings.seed)
        count = threads[0] * threads[1] * threads[2]
        if not 0 < count <= 1024 or count % 32:
            raise Fault(f"{count} threads a block: expected a multiple of 32 to 1024")
        if program.threads not in (None, count):
            raise Fault(f"{count} threads a block, and .reqntid {program.threads}")
        if any(size % of for size, of in zip(grid, cluster, strict=True)):
            raise Fault(f"a grid {grid} of clusters {cluster}")
        self.warps = count // 32
        self.shared_bytes = program.static_shared + dynamic_shared
        if self.shared_bytes > SHARED_LIMIT.get(program.target, 101_376):
            raise Fault(f"{self.shared_bytes} bytes of shared memory: more than {program.target} has")
        if len(parameters) != program.parameter_bytes:
            raise Fault(f"{len(parameters)} bytes of parameters, expected {program.parameter_bytes}")
        self.parameters = np.frombuffer(parameters.ljust(-(-len(parameters) // 16) * 16, b"\0"), np.uint8)
        self.maps: dict[bytes, TensorMap] = {}
        self.counts = Counts()
        self.executed = np.zeros(len(program.codes), np.int64)
        self.events = 0
        self.gangs: list[Gang] = []
        self.in_flight: list[Callable[[], None]] = []
        """TMA loads: each may happen at any time."""
        self._blocks_left = self.settings.limit

    def run(self) -> Counts:
        """Run every block, cluster after cluster: -> what was counted."""
        columns, rows, layers = (range(0, self.grid[i], self.cluster[i]) for i in range(3))
        with np.errstate(all="ignore"):
            for z in layers:
                for y in rows:
                    for x in columns:
                        self._run_cluster((x, y, z))
        self.counts.add_instructions(self.program, self.executed)
        return self.counts

    def count_block(self, number: int, warps: int) -> None:
        """Warps execute a basic block."""
        self.executed[number] += warps
        self._blocks_left -= 1
        if self._blocks_left < 0:
            raise Fault(
                f"no end after {self.settings.limit} basic blocks, at {self.program.codes[number].instructions[0]}"
            )

    def happens_at_once(self) -> bool:
        """Whether what is issued now is done now."""
        timing = self.settings.timing
        return timing == "early" or (timing == "random" and self.random.random() < 0.5)

    def turn(self) -> int:
        """The basic blocks that a gang executes before others do."""
        return 10_000 if self.settings.together else self.random.randint(1, 40)

    def _run_cluster(self, origin: tuple[int, int, int]) -> None:
        wide, high, deep = self.cluster
        blocks: list[Block] = []
        for z in range(deep):
            for y in range(high):
                for x in range(wide):
                    index = (origin[0] + x, origin[1] + y, origin[2] + z)
                    blocks.append(Block(self, index, len(blocks)))
        everybody, barrier = np.arange(self.warps), ClusterBarrier(self.warps * len(blocks))
        for block in blocks:
            block.cluster, block.cluster_barrier = blocks, barrier
            parts = [everybody] if self.settings.together else list(everybody.reshape(-1, 1))
            self.gangs += [Gang(block, part) for part in parts]
        try:
            while self.gangs:
                self._round(blocks)
            if self.in_flight:
                raise Fault(f"{len(self.in_flight)} TMA loads are in flight when the block ends")
            for block in blocks:
                if block.barriers:
                    raise Fault(f"warps arrived at barriers that never completed: {sorted(block.barriers)}")
        finally:
            # megabytes a block, which would wait for the collector of cycles
            self.gangs, self.in_flight = [], []
            for block in blocks:
                block.cluster = []

    def _round(self, blocks: list[Block]) -> None:
        ready = [gang for gang in self.gangs if not gang.blocked]
        self.random.shuffle(ready)
        progress = False
        for gang in ready:
            if gang.frames and not gang.blocked and any(gang is one for one in self.gangs):
                progress |= gang.run()
        self.gangs = [gang for gang in self.gangs if gang.frames]
        if self.settings.together and len(self.gangs) > 1:
            self._merge()
        if self.in_flight and (not progress or (self.settings.timing == "random" and self.random.random() < 0.3)):
            self.in_flight.pop(self.random.randrange(len(self.in_flight)))()
        elif self.gangs and not progress:
            waiting = "; ".join(f"{gang} at block of code {gang.frames[-1].at}" for gang in self.gangs)
            states = [f"{at:#x}: {mbarrier}" for block in blocks for at, mbarrier in block.mbarriers.items()]
            raise Fault(f"deadlock: {waiting}; mbarriers {states}")

    def _merge(self) -> None:
        places: dict[tuple[int, int], list[Gang]] = {}
        for gang in self.gangs:
            if not gang.blocked and len(gang.frames) == 1 and gang.frames[0].mask is None:
                places.setdefault((gang.block.number, gang.frames[0].at), []).append(gang)
        for gangs in places.values():
            if len(gangs) > 1:
                self._replace(gangs)

    def _replace(self, gangs: list[Gang]) -> Gang:
        made = merged(gangs)
        self.gangs = [gang for gang in self.gangs if all(gang is not one for one in gangs)]
        self.gangs.append(made)
        for gang in gangs:
            gang.frames = []
        return made

    def gather_warpgroups(self, gang: Gang) -> bool:
        """A warpgroup's warps meet before a wgmma: -> whether this gang may go on."""
        whole = gang.warps.reshape(-1, 4) if gang.lanes % 128 == 0 else None
        if whole is not None and (whole == whole[:, :1] // 4 * 4 + np.arange(4)).all():
            return True
        if len(gang.frames) != 1 or gang.frames[0].mask is not None:
            raise Fault(f"divergent: wgmma that part of a warp executes, by {gang}")
        gang.blocked = True
        here = [one for one in self.gangs if one.block is gang.block and one.blocked and one.frames]
        here = [one for one in here if one.frames[-1].at == gang.frames[-1].at and not self._at_barrier(one)]
        groups = {int(warp) // 4 for one in here for warp in one.warps}
        for group in groups:
            parts = [one for one in here if any(int(warp) // 4 == group for warp in one.warps)]
            warps = sorted(int(warp) for one in parts for warp in one.warps)
            if len(warps) % 4 == 0 and all(warps.count(w // 4 * 4 + i) for w in warps for i in range(4)):
                for one in parts:
                    one.blocked = False
                self._replace(parts)
                return False
        return False

    def _at_barrier(self, gang: Gang) -> bool:
        waiting = [*gang.block.cluster_barrier.waiting]
        for barrier in gang.block.barriers.values():
            waiting += barrier.waiting
        return any(gang is one for one in waiting)
