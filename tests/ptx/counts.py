"""What a launch did, counted: instructions by class, bytes and sectors, conflicts of banks, products."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from ptx.formats import Array
from ptx.memory import SECTOR
from ptx.parse import Instruction

if TYPE_CHECKING:
    from ptx.program import Program

BANKS, WORD = 32, 4

_CLASSES = {
    **dict.fromkeys(("add", "sub", "mul", "mad", "fma", "min", "max", "neg", "abs"), "arithmetic"),
    **dict.fromkeys(("and", "or", "xor", "not", "shl", "shr", "shf", "bfe", "bfi", "prmt", "lop3"), "logic"),
    **dict.fromkeys(("setp", "selp"), "choice"),
    **dict.fromkeys(("ex2", "lg2", "rcp", "rsqrt", "sqrt", "tanh", "sin", "cos", "div", "rem"), "function"),
    **dict.fromkeys(("cvt", "cvta"), "conversion"),
    **dict.fromkeys(("bra", "ret", "exit"), "branch"),
    **dict.fromkeys(("bar", "barrier", "mbarrier", "fence"), "synchronisation"),
    **dict.fromkeys(("shfl", "vote", "elect", "redux"), "warp"),
}


def class_of(instruction: Instruction) -> str:
    """What an instruction is counted as."""
    mnemonic = instruction.opcode[0]
    if mnemonic in ("ld", "st"):
        space = next((part for part in instruction.opcode if part in ("global", "shared", "param")), "generic")
        return f"{mnemonic}.{space}"
    if mnemonic in ("cp", "wgmma"):
        return ".".join(instruction.opcode[:3] if instruction.opcode[1] == "async" else instruction.opcode[:2])
    if mnemonic in ("add", "sub", "mul", "mad", "fma", "min", "max", "neg", "abs"):
        return "floating" if "f" in instruction.opcode[-1] else "integer"
    return _CLASSES.get(mnemonic, mnemonic)


class Counts(Counter[str]):
    """Totals of a launch. Instructions are a warp's."""

    def add_instructions(self, program: Program, executed: Array) -> None:
        """``executed`` warps ran each basic block."""
        for code, warps in zip(program.codes, executed, strict=True):
            for instruction in code.instructions:
                self["instructions " + class_of(instruction)] += int(warps)
                self["instructions"] += int(warps)

    def global_access(self, what: str, addresses: Array, nbytes: int, warps: Array) -> None:
        """Bytes that lanes ask for, and the sectors of each warp's request."""
        if not len(addresses):
            return
        self[f"global {what} bytes"] += nbytes * len(addresses)
        first, last = addresses // SECTOR, (addresses + np.uint64(nbytes - 1)) // SECTOR
        spans = np.concatenate([first, last]) if nbytes > 1 else first
        keys = spans.astype(np.int64) * 64 + np.tile(warps, len(spans) // len(warps))
        self[f"global {what} sectors"] += len(np.unique(keys))

    def shared_access(self, what: str, offsets: Array, nbytes: int, warps: Array) -> None:
        """Wavefronts that a warp's access takes beyond the fewest that its words could."""
        for warp in np.unique(warps):
            words = np.unique((offsets[warps == warp][:, None] + np.arange(0, nbytes, WORD)) // WORD)
            needed = int(np.bincount(words % BANKS, minlength=BANKS).max())
            self[f"{what} wavefronts"] += needed
            self["bank conflicts"] += needed - -(-len(words) // BANKS)
