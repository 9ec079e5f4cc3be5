"""The block types of GGUF files: where the scales of a block lie, and how a gain changes them.

::

    F(c * scales, quants) = c * F(scales, quants)        for every type in BLOCKS, of either sign, and zero

so the scales of a row alone take its gain: each is multiplied and rounded once, to float16, and no quant changes. Sources:
the structures of ggml/src/ggml-common.h in https://github.com/ggml-org/llama.cpp, and the decoders of the package gguf.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError, Rounding
from gain_ops.checkpoints.schemes.plain import rounding


@dataclass(frozen=True)
class BlockType:
    """A block: the number of its values and of its bytes, and the offsets of its float16 scales (and minima)."""

    values: int
    size: int
    offsets: tuple[int, ...]

    def scales(self, blocks: Tensor) -> Tensor:
        """Uint8 [..., size] to float16 [..., number of scales], a copy."""
        return torch.cat([blocks[..., at : at + 2] for at in self.offsets], dim=-1).view(torch.float16)

    def replaced(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """The blocks with other scales, a copy."""
        blocks = blocks.clone()
        for at, pair in zip(self.offsets, scales.view(torch.uint8).split(2, dim=-1), strict=True):
            blocks[..., at : at + 2] = pair
        return blocks


class ScatteredScale(BlockType):
    """A block with one scale, whose four nibbles, the lowest first, are the upper halves of the bytes at the offsets."""

    def scales(self, blocks: Tensor) -> Tensor:
        """As in BlockType."""
        first, second, third, fourth = (blocks[..., at] >> 4 for at in self.offsets)
        return torch.stack([first | second << 4, third | fourth << 4], dim=-1).view(torch.float16)

    def replaced(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """As in BlockType."""
        blocks = blocks.clone()
        low, high = scales.view(torch.uint8).unbind(-1)
        for at, nibble in zip(self.offsets, (low << 4, low, high << 4, high), strict=True):
            blocks[..., at] = blocks[..., at] & 0x0F | nibble & 0xF0
        return blocks


BLOCKS: dict[str, BlockType] = {
    "Q1_0": BlockType(128, 18, (0,)),
    "Q4_0": BlockType(32, 18, (0,)),
    "Q4_1": BlockType(32, 20, (0, 2)),
    "Q5_0": BlockType(32, 22, (0,)),
    "Q5_1": BlockType(32, 24, (0, 2)),
    "Q8_0": BlockType(32, 34, (0,)),
    "Q2_K": BlockType(256, 84, (80, 82)),
    "Q3_K": BlockType(256, 110, (108,)),
    "Q4_K": BlockType(256, 144, (0, 2)),
    "Q5_K": BlockType(256, 176, (0, 2)),
    "Q6_K": BlockType(256, 210, (208,)),
    "IQ1_S": BlockType(256, 50, (0,)),
    "IQ1_M": ScatteredScale(256, 56, (49, 51, 53, 55)),
    "IQ2_XXS": BlockType(256, 66, (0,)),
    "IQ2_XS": BlockType(256, 74, (0,)),
    "IQ2_S": BlockType(256, 82, (0,)),
    "IQ3_XXS": BlockType(256, 98, (0,)),
    "IQ3_S": BlockType(256, 110, (0,)),
    "IQ4_NL": BlockType(32, 18, (0,)),
    "IQ4_XS": BlockType(256, 136, (0,)),
    "TQ1_0": BlockType(256, 54, (52,)),
    "TQ2_0": BlockType(256, 66, (64,)),
}


def scale_rows(kind: str, rows: Tensor, gain: Tensor) -> tuple[Tensor, Rounding]:
    """Multiply the scales of each row by its gain, in float32, and round them once to float16.

    Args:
        kind: a key of BLOCKS.
        rows: uint8 [n, bytes of a row].
        gain: float32 [n, 1].

    Returns:
        The new rows, and the rounding of the scales. The relative one is at most 2^-11 where the scale is a normal
        float16, and up to 1 where it falls below 6e-5 or to zero. Where a block has one scale, its values err by the
        same; where it has a minimum as well, by the sum of both terms' errors.

    Raises:
        CheckpointError: scales that are not finite, before or after.

    """
    block = BLOCKS[kind]
    blocks = rows.view(len(rows), -1, block.size)
    before = block.scales(blocks)
    gain = gain[..., None]
    after = (before.float() * gain).to(torch.float16)
    if not after.isfinite().all():
        why = "overflow float16 with their gain" if before.isfinite().all() else "are not finite to begin with"
        raise CheckpointError(f"scales of its {kind} blocks {why}")
    return block.replaced(blocks, after).view_as(rows), rounding(after, before.double() * gain.double())


def requantize_rows(kind: str, rows: Tensor, gain: Tensor) -> tuple[Tensor, Rounding]:
    """Decode rows, multiply them by a gain that broadcasts to them, and quantise the product again to the same type.

    Returns:
        The new rows, and the largest error of a value against the exact product: absolute, and relative to the largest
        value of its block.

    Raises:
        CheckpointError: values that are not finite, before or after.

    """
    import gguf

    decoded = decode(kind, rows)
    scaled = decoded * gain
    with np.errstate(all="ignore"):  # what overflows is refused below
        quantized = gguf.quants.quantize(scaled.numpy(), gguf.GGMLQuantizationType[kind])
    found = torch.from_numpy(quantized).view_as(rows)
    stored = decode(kind, found)
    if not (scaled.isfinite().all() and stored.isfinite().all()):
        why = "overflows with its gain" if decoded.isfinite().all() else "is not finite to begin with"
        raise CheckpointError(f"its weight {why} in {kind}")
    exact = (decoded.double() * gain.double()).view(len(rows), -1, block_size(kind)[0])
    error = (stored.double().view_as(exact) - exact).abs()
    largest = exact.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return found, Rounding(error.max().item(), (error / largest).max().item())


def decode(kind: str, rows: Tensor) -> Tensor:
    """Uint8 [n, bytes of a row] to float32 [n, values of a row].

    Raises:
        CheckpointError: the package gguf cannot decode the type.

    """
    import gguf

    try:
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise CheckpointError(
            f"the installed gguf cannot decode {kind}; a later one may: pip install -U gguf"
        ) from error
    return torch.from_numpy(values)


def can_requantize(kind: str) -> bool:
    """Whether the package gguf can quantise to the type."""
    import gguf

    try:
        gguf.quants.quantize(np.zeros((1, block_size(kind)[0]), np.float32), gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return True


def block_size(kind: str) -> tuple[int, int]:
    """(values, bytes) of a block of any type that the package gguf knows; (1, bytes) for plain numbers."""
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return values, size
