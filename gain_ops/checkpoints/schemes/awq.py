"""AWQ as AutoAWQ writes it, version "gemm": 4 bits, in groups of inputs.

::

    W[o, i] = scales[i // size, o] * (q[i, o] - zero[i // size, o])

qweight [inputs, outputs / 8] and qzeros [groups, outputs / 8] hold 8 outputs in an int32 word, from the lowest bits
outputs 0, 2, 4, 6, 1, 3, 5, 7 of it. The scales, float16 [groups, outputs], are in the outputs' own order and take row
gains of either sign. Gains on inputs round q again, with the same zero points.

The other versions (gemv, gemv_fast, llm-awq, marlin, ...) have another layout of the scales, or scale the zero points too;
they are refused.

Source: casper-hansen/AutoAWQ, awq/modules/linear/gemm.py.
"""

import torch

from gain_ops.checkpoints.edits import Edit, Layer
from gain_ops.checkpoints.schemes.codes import Fields
from gain_ops.checkpoints.schemes.exact import OTHER_SIDE, check_gain, refused, scaled, tensor_of, unknown
from gain_ops.checkpoints.schemes.requantize import Grid, blocks, requantized
from gain_ops.checkpoints.schemes.request import Request
from gain_ops.checkpoints.schemes.scales import FloatScales

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def edits(layer: Layer, request: Request) -> list[Edit]:
    """See schemes.edits."""
    version = str(request.config.get("version") or request.config.get("format") or "gemm").lower()
    if version != "gemm" or request.config.get("backend") == "llm-awq":
        raise refused(layer, f"AWQ's version {version!r} is laid out for one kernel")
    qweight, scales = tensor_of(layer, "qweight"), tensor_of(layer, "scales")
    if (qweight.dtype, len(qweight.shape)) != (torch.int32, 2) or scales.shape[1:] != (8 * qweight.shape[1],):
        raise unknown(layer)
    inputs, outputs = qweight.shape[0], scales.shape[1]
    check_gain(layer, outputs, inputs)
    if layer.side == "output":
        return [scaled(layer, scales, layer.gain)]
    if not request.requantize:
        raise refused(layer, OTHER_SIDE, requantizable=True)
    coding = Fields(torch.arange(16), outputs, word=torch.int32, order=_ORDER)
    grid = Grid(
        codes=qweight,
        coding=coding,
        scales=FloatScales(scales),
        rows=blocks(inputs, scales.shape[0]),
        columns=torch.arange(outputs),
        zeros=coding.decode(tensor_of(layer, "qzeros").region.read()),
        outputs_first=False,
    )
    return requantized(layer, grid)
