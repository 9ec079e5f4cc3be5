"""GPTQ, as AutoGPTQ, GPTQModel and optimum write it: "gptq" (also without a name) and "gptq_v2".

::

    W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]),    g = g_idx[i]          zero = qzeros + 1, in gptq_v2 qzeros

qweight [inputs * bits / 32, outputs] holds q, the fields of an int32 word being inputs below each other; qzeros
[groups, outputs * bits / 32] holds beside each other. The scales, float16 [groups, outputs], take row gains of either
sign: every kernel multiplies by them, in order or permuted. Gains on inputs round q again, with the same zero points, for
2, 4 and 8 bits.

The repacked formats (marlin, bitblas, ...) have other orders and are refused.

Source: AutoGPTQ/auto_gptq/nn_modules/qlinear/qlinear_cuda.py; ModelCloud/GPTQModel.
"""

from collections.abc import Mapping
from typing import Any

import torch

from gain_ops.checkpoints.edits import Edit, Layer, Stored
from gain_ops.checkpoints.schemes.codes import Fields
from gain_ops.checkpoints.schemes.exact import OTHER_SIDE, check_gain, refused, scaled, tensor_of, unknown
from gain_ops.checkpoints.schemes.requantize import Grid, blocks, requantized
from gain_ops.checkpoints.schemes.request import Request
from gain_ops.checkpoints.schemes.scales import FloatScales

_BITS = (2, 4, 8)


def edits(layer: Layer, request: Request) -> list[Edit]:
    """See schemes.edits."""
    version = request.config.get("checkpoint_format") or (
        "marlin" if request.config.get("is_marlin_format") else "gptq"
    )
    if version not in ("gptq", "gptq_v2"):
        raise refused(layer, f"GPTQ's checkpoint_format {version!r} is laid out for one kernel")
    if request.config.get("rotation"):
        raise refused(layer, "its outputs are rotated, and the gain belongs to the unrotated ones")
    qweight, scales = tensor_of(layer, "qweight"), tensor_of(layer, "scales")
    if (qweight.dtype, len(qweight.shape)) != (torch.int32, 2) or scales.shape[1:] != qweight.shape[1:]:
        raise unknown(layer)
    outputs = qweight.shape[1]
    inputs = _inputs(layer, request.config, qweight)
    check_gain(layer, outputs, inputs)
    if layer.side == "output":
        return [scaled(layer, scales, layer.gain)]
    bits = qweight.shape[0] * 32 // max(1, inputs)
    if bits not in _BITS:
        raise refused(layer, f"{OTHER_SIDE}, and codes of {bits} bits cannot be unpacked")
    if not request.requantize:
        raise refused(layer, OTHER_SIDE, requantizable=True)
    codes = torch.arange(2**bits)
    zeros = Fields(codes, outputs, word=torch.int32).decode(tensor_of(layer, "qzeros").region.read())
    groups = layer.tensors["g_idx"].read().long() if "g_idx" in layer.tensors else blocks(inputs, scales.shape[0])
    grid = Grid(
        codes=qweight,
        coding=Fields(codes, outputs, word=torch.int32, downwards=True),
        scales=FloatScales(scales),
        rows=groups,
        columns=torch.arange(outputs),
        zeros=zeros + (version == "gptq"),
        outputs_first=False,
    )
    return requantized(layer, grid)


def _inputs(layer: Layer, config: Mapping[str, Any], qweight: Stored) -> int:
    if "g_idx" in layer.tensors:
        return layer.tensors["g_idx"].shape[0]
    bits = config.get("bits")
    if not isinstance(bits, int) or bits < 1:
        raise unknown(layer)
    return qweight.shape[0] * 32 // bits
