"""Matrices between shared memory and registers, and the product of a warp (PTX ISA, ldmatrix, stmatrix, mma)."""

from __future__ import annotations

import numpy as np

from ptx.counts import BANKS, WORD
from ptx.formats import Array
from ptx.fragments import accumulators, gathered_8x8, matrix_a, matrix_b, spread_8x8
from ptx.gang import Gang, Mask
from ptx.instructions.accesses import locate, write_bytes
from ptx.machine import Block
from ptx.operands import Operands
from ptx.parse import Instruction
from ptx.program import Step, translates, unknown

ROW_BYTES = 16


def _form(instruction: Instruction) -> tuple[int, bool]:
    """How many matrices, and whether they are transposed."""
    *options, kind = instruction.opcode[1:]
    count = next((option for option in options if option in ("x1", "x2", "x4")), None)
    if set(options) - {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"}:
        raise unknown(instruction)
    if kind != "b16" or "m8n8" not in options or count is None:
        raise unknown(instruction)
    return int(count[1]), "trans" in options


def _rows(gang: Gang, address: Array, mask: Mask, count: int, what: str) -> tuple[Block, Array]:
    """The block, and the addresses of rows [warps, count, 8]: lane 8 i + r has row r of matrix i."""
    gang.whole_warps(mask, what)
    by_warp = np.broadcast_to(address, gang.lanes).reshape(-1, 32)[gang.executing(mask)]
    block, rows = locate(gang, by_warp[:, : 8 * count])
    block.shared.check(what, rows, ROW_BYTES)
    if gang.machine.settings.count:
        for row in rows.reshape(-1, 8):
            words = np.unique((row[:, None] + np.arange(0, ROW_BYTES, WORD)) // WORD)
            wavefronts = int(np.bincount(words % BANKS, minlength=BANKS).max())
            gang.machine.counts[f"{what} wavefronts"] += wavefronts
            gang.machine.counts["bank conflicts"] += wavefronts - 1
    return block, rows.reshape(-1, count, 8)


@translates("ldmatrix")
def _ldmatrix(instruction: Instruction, operands: Operands) -> Step:
    count, transposed = _form(instruction)
    names = operands.vector(instruction.operands[0])
    if len(names) != count:
        raise unknown(instruction)
    writes = [operands.write(name, "b32") for name in names]
    address = operands.address(instruction.operands[1])

    def step(gang: Gang, mask: Mask) -> None:
        block, rows = _rows(gang, address(gang), mask, count, "ldmatrix")
        each = rows[..., None] + np.arange(ROW_BYTES)
        block.shared.check_written(each)
        warps = gang.warps[gang.executing(mask)]
        if block.races and block is gang.block:
            block.races.read(warps, each.reshape(len(warps), -1))
        matrices = block.shared.views[2][each[..., ::2] // 2]
        registers = spread_8x8(matrices.swapaxes(2, 3) if transposed else matrices)
        for place, write in enumerate(writes):
            value = np.zeros((len(gang.warps), 32), np.uint32)
            value[gang.executing(mask)] = registers[:, place]
            write(gang, mask, value.ravel())

    return step


@translates("stmatrix")
def _stmatrix(instruction: Instruction, operands: Operands) -> Step:
    count, transposed = _form(instruction)
    reads = [operands.read(text, "b32") for text in operands.vector(instruction.operands[1])]
    if len(reads) != count:
        raise unknown(instruction)
    address = operands.address(instruction.operands[0])

    def step(gang: Gang, mask: Mask) -> None:
        block, rows = _rows(gang, address(gang), mask, count, "stmatrix")
        some = gang.executing(mask)
        registers = [np.broadcast_to(read(gang), gang.lanes).reshape(-1, 32)[some] for read in reads]
        matrices = gathered_8x8(np.stack(registers, axis=1))
        data = np.ascontiguousarray(matrices.swapaxes(2, 3) if transposed else matrices).view(np.uint8)
        each = (rows[..., None] + np.arange(ROW_BYTES)).reshape(-1, ROW_BYTES)
        write_bytes(gang, block, each, data.reshape(-1, ROW_BYTES), np.repeat(gang.warps[some], 8 * count))

    return step


@translates("mma")
def _mma(instruction: Instruction, operands: Operands) -> Step:
    *form, result, a_kind, b_kind, added = instruction.opcode[1:]
    if form != ["sync", "aligned", "m16n8k16", "row", "col"] or a_kind not in ("f16", "bf16"):
        raise unknown(instruction)
    if (result, added) != ("f32", "f32") or a_kind != b_kind:
        raise unknown(instruction)
    to, a, b, c = (operands.vector(text) for text in instruction.operands)
    writes = [operands.write(name, "f32") for name in to]
    read_a, read_b = ([operands.read(name, "b32") for name in names] for names in (a, b))
    read_c = [operands.read(name, "f32") for name in c]
    if (len(to), len(a), len(b), len(c)) != (4, 4, 2, 4):
        raise unknown(instruction)

    def step(gang: Gang, mask: Mask) -> None:
        some = gang.whole_warps(mask, "mma")
        left, right = (
            [np.broadcast_to(read(gang), gang.lanes).reshape(-1, 32) for read in reads] for reads in (read_a, read_b)
        )
        product = np.matmul(matrix_a(left, a_kind), matrix_b(right, a_kind))
        for write, value, addend in zip(writes, accumulators(product), read_c, strict=True):
            write(gang, mask, addend(gang) + value.ravel())
        gang.machine.counts["mma.sync"] += int(some.sum())

    return step
