"""The common part of formats that store a matrix of codes [outputs, inputs], one number each, and scales beside it."""

import torch

from gain_ops.checkpoints.edits import Edit, Layer, Stored
from gain_ops.checkpoints.schemes.codes import Whole
from gain_ops.checkpoints.schemes.exact import check_gain, obstacle, refused, scaled, unknown
from gain_ops.checkpoints.schemes.requantize import Grid, blocks, requantized
from gain_ops.checkpoints.schemes.scales import FloatScales, PowerScales, Scales, matrix

WHOLE = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def edits(
    layer: Layer,
    codes: Stored,
    scale: Stored,
    *,
    zeros: Stored | None = None,
    block: tuple[int | None, int | None] = (None, None),
    requantize: bool,
) -> list[Edit]:
    """The scale's edit if it can take the gain, otherwise the edits of codes and scale.

    ::

        W[o, i] = (codes[o, i] - zeros[a, b]) * scale[a, b]

    Args:
        layer: the layer of these tensors.
        codes: int8 or float8 [outputs, inputs].
        scale: [outputs, groups], or of any coarser blocks, or one number; floating, or E8M0 (float8_e8m0fnu, uint8).
        zeros: as ``scale``, or None.
        block: the height and the width of a block, None where they divide evenly.
        requantize: whether codes may be rounded again.

    Raises:
        CheckpointError: the scale cannot take the gain, and ``requantize`` is off; or other tensors than these.

    """
    if len(codes.shape) != 2 or codes.dtype not in WHOLE or len(scale.shape) > 2:
        raise unknown(layer)
    outputs, inputs = codes.shape
    check_gain(layer, outputs, inputs)
    reason = obstacle(layer, scale, outputs)
    if reason is None:
        return [scaled(layer, scale, layer.gain if len(scale.shape) == 1 else layer.gain[:, None])]
    if not requantize:
        raise refused(layer, reason, requantizable=True)
    scales: Scales = PowerScales(scale) if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) else FloatScales(scale)
    grid = Grid(
        codes=codes,
        coding=Whole(codes.dtype),
        scales=scales,
        rows=blocks(outputs, scales.values.shape[0], block[0]),
        columns=blocks(inputs, scales.values.shape[1], block[1]),
        zeros=None if zeros is None else matrix(zeros.read()).double(),
        top=torch.finfo(codes.dtype).max if isinstance(scales, PowerScales) else None,
    )
    return requantized(layer, grid)
