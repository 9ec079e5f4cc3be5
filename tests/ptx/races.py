"""Data races in shared memory, by vector clocks: an access that no chain of synchronisation orders is a race in any timing.

An agent is what accesses are ordered for: each warp; beside it the cp.async of each warp, the wgmma of each warpgroup, the
bulk stores of each warp, and the TMA loads of each mbarrier, which run by themselves until a wait. A warp's clock has an
entry for every agent: what of its past is known to the warp. A second clock holds what of it lies before a
fence.proxy.async too, without which the asynchronous proxy (TMA, wgmma) may not see it (PTX ISA, Memory Consistency Model).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ptx.faults import Fault
from ptx.formats import Array

MBARRIERS = 64
"""The most that a block may have at different addresses."""


class Clocks:
    """What some agents' past is known."""

    def __init__(self, rows: int, agents: int) -> None:
        self.known = np.zeros((rows, agents), np.int32)
        self.fenced = np.zeros((rows, agents), np.int32)

    def join(self, row: int, other: Clocks, other_row: int) -> None:
        """A row learns another."""
        np.maximum(self.known[row], other.known[other_row], out=self.known[row])
        np.maximum(self.fenced[row], other.fenced[other_row], out=self.fenced[row])


class Races:
    """The clocks of a block, and who touched each byte of its shared memory last."""

    def __init__(self, size: int, warps: int) -> None:
        groups = -(-warps // 4)
        self.warps = warps
        self.cp_async, self.wgmma = warps, 2 * warps
        self.bulk, self.barriers = 2 * warps + groups, 3 * warps + groups
        self.agents = self.barriers + MBARRIERS
        self.clocks = Clocks(warps, self.agents)
        self.clocks.known[np.arange(warps), np.arange(warps)] = 1
        self.barrier_agents: dict[int, int] = {}
        self.writer = np.full(size, -1, np.int16)
        self.write_clock = np.zeros(size, np.int32)
        # cp.async and TMA loads read no shared memory
        self.readers = np.r_[0:warps, self.wgmma : self.wgmma + groups, self.bulk : self.bulk + warps]
        self.row_of_reader = {int(agent): row for row, agent in enumerate(self.readers)}
        self.read_clock = np.zeros((len(self.readers), size), np.int32)

    def barrier_agent(self, offset: int) -> int:
        """The agent of the TMA loads that an mbarrier counts."""
        agent = self.barrier_agents.setdefault(offset, self.barriers + len(self.barrier_agents))
        if agent >= self.agents:
            raise Fault(f"more than {MBARRIERS} mbarriers")
        return agent

    # ---- accesses of warps

    def read(self, warps: Array, cells: Array) -> None:
        """Warps read cells [warps, bytes]."""
        self._after_writes("reads", warps[:, None], cells)
        self.read_clock[warps[:, None], cells] = self.clocks.known[warps, warps][:, None]

    def write(self, warps: Array, cells: Array) -> None:
        """Warps write cells [warps, bytes]."""
        self._after_writes("overwrites", warps[:, None], cells)
        self._after_reads(warps, cells)
        self.writer[cells] = warps[:, None]
        self.write_clock[cells] = self.clocks.known[warps, warps][:, None]

    # ---- accesses of what runs by itself, issued by a warp

    def read_later(self, agent: int, clock: int, warp: int, cells: Array) -> None:
        """Wgmma or a bulk store reads cells until its group is over, through the asynchronous proxy."""
        one = np.full((1, 1), warp)
        self._after_writes("reads", one, cells[None])
        self._behind_a_fence("reads", warp, cells)
        self.read_clock[self.row_of_reader[agent], cells] = clock

    def write_later(self, agent: int, clock: int, warp: int, cells: Array, *, through_proxy: bool) -> None:
        """A cp.async or a TMA load writes cells until a wait."""
        self._after_writes("overwrites", np.full((1, 1), warp), cells[None])
        self._after_reads(np.array([warp]), cells[None])
        if through_proxy:
            self._behind_a_fence("overwrites", warp, cells)
        self.writer[cells] = agent
        self.write_clock[cells] = clock

    def finished(self, agent: int, clock: int, warps: Iterable[int]) -> None:
        """Warps waited until an agent was at a clock."""
        for warp in warps:
            known = self.clocks.known[warp]
            known[agent] = max(known[agent], clock)
            if agent >= self.wgmma:
                self.clocks.fenced[warp, agent] = known[agent]

    # ---- synchronisation

    def fence(self, warps: Iterable[int]) -> None:
        """fence.proxy.async: what these warps know is visible to the asynchronous proxy."""
        for warp in warps:
            np.maximum(self.clocks.fenced[warp], self.clocks.known[warp], out=self.clocks.fenced[warp])

    def release(self, into: Clocks, warps: Iterable[int]) -> None:
        """Warps arrive somewhere: what they know is handed on, and what they do next is not."""
        for warp in warps:
            into.join(0, self.clocks, warp)
            self.clocks.known[warp, warp] += 1

    def acquire(self, of: Clocks, warps: Iterable[int]) -> None:
        """Warps learn what was handed on."""
        for warp in warps:
            self.clocks.join(warp, of, 0)

    def new_clocks(self) -> Clocks:
        """Of something that warps arrive at."""
        return Clocks(1, self.agents)

    # ---- checks

    def _after_writes(self, what: str, warps: Array, cells: Array) -> None:
        writer = self.writer[cells]
        wrong = (writer >= 0) & (writer != warps) & (self.write_clock[cells] > self.clocks.known[warps, writer])
        if wrong.any():
            warp = int(np.broadcast_to(warps, cells.shape)[wrong][0])
            raise Fault(
                f"race: warp {warp} {what} shared memory at {int(cells[wrong][0]):#x} that {self._name(writer[wrong][0])} "
                f"wrote, unsynchronised"
            )

    def _after_reads(self, warps: Array, cells: Array) -> None:
        last = self.read_clock[:, cells]
        if not last.any():
            return
        known = self.clocks.known[warps][:, self.readers].T
        wrong = last > known[:, :, None]
        wrong[warps, np.arange(len(warps))] = False
        if wrong.any():
            reader, row, column = (int(index[0]) for index in np.nonzero(wrong))
            raise Fault(
                f"race: warp {int(warps[row])} overwrites shared memory at {int(cells[row, column]):#x} that "
                f"{self._name(self.readers[reader])} read, unsynchronised"
            )

    def _behind_a_fence(self, what: str, warp: int, cells: Array) -> None:
        writer = self.writer[cells]
        generic = (writer >= 0) & (writer < self.wgmma)
        wrong = generic & (self.write_clock[cells] > self.clocks.fenced[warp, writer])
        if wrong.any():
            raise Fault(
                f"missing fence.proxy.async: the asynchronous proxy {what} shared memory at {int(cells[wrong][0]):#x} that "
                f"{self._name(writer[wrong][0])} wrote through the generic proxy"
            )

    def _name(self, agent: int) -> str:
        agent = int(agent)
        if agent < self.cp_async:
            return f"warp {agent}"
        if agent < self.wgmma:
            return f"a cp.async of warp {agent - self.cp_async}"
        if agent < self.bulk:
            return f"a wgmma of warpgroup {agent - self.wgmma}"
        if agent < self.barriers:
            return f"a bulk store of warp {agent - self.bulk}"
        return "a TMA load"
