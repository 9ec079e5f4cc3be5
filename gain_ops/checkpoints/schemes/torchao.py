"""torchao's tensors, as transformers writes them into safetensors: the parts of each, described in the header.

::

    Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor:     W = (qdata - zero_point) * scale        [outputs, groups]
    Int4Tensor:                                             W = q * scale + zero_point              [groups, outputs]
    Int4TilePackedTo4dTensor:                               W = (q - 8) * scale + zero              [groups, outputs, 2]
    Int4PlainInt32Tensor:                                   W = (q - zero_point) * scale            [groups, outputs]

Scales of rows and groups take row gains of either sign; a zero point that is a weight, not a code, is multiplied too. In the
first three formats, weights are rounded again for gains on inputs and for a scale of the full weight. An ``act_pre_scale``
[inputs], by which inputs are multiplied first, takes gains on inputs.

MXTensor and NVFP4Tensor, whose scales are in 8 bits and mostly laid out for one kernel, are refused.

Source: torchao/quantization/quantize_/workflows/, torchao/prototype/safetensors/; for Int4Tensor int4_row_quantize_zp in
FBGEMM's experimental gen_ai (now mslk).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError, Edit, Layer
from gain_ops.checkpoints.schemes import by_rows
from gain_ops.checkpoints.schemes.exact import OTHER_SIDE, check_gain, refused, scaled, tensor_of, unknown
from gain_ops.checkpoints.schemes.request import Request
from gain_ops.utils import strict_json

_BY_ROWS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


def edits(layer: Layer, request: Request) -> list[Edit]:
    """See schemes.edits."""
    codes = tensor_of(layer, "_weight_qdata")
    key = codes.name.removesuffix("_weight_qdata") + "weight"
    if key not in request.metadata:
        raise CheckpointError(f"{layer.name}: no header describes torchao's {key}; write the checkpoint again")
    described = strict_json.parse(request.metadata[key])
    kind, attributes = described["_type"], described["_data"]
    before = layer.tensors.get("_weight_act_pre_scale")
    if layer.side == "input" and before is not None:
        if "_weight_act_quant_scale" in layer.tensors:
            raise refused(layer, "its inputs are quantised with a scale that was chosen without the gain")
        check_gain(layer, 0, before.shape[-1])
        return [scaled(layer, before, layer.gain)]
    if kind in _BY_ROWS:
        size = attributes.get("block_size") or (None, None)
        return by_rows.edits(
            layer,
            codes,
            tensor_of(layer, "_weight_scale"),
            zeros=layer.tensors.get("_weight_zero_point"),
            block=tuple(size),
            requantize=request.requantize,
        )
    if kind not in ("Int4Tensor", "Int4PlainInt32Tensor", "Int4TilePackedTo4dTensor"):
        raise refused(layer, f"torchao's {kind} is not supported")
    return _int4(layer, kind, attributes)


def _int4(layer: Layer, kind: str, attributes: Mapping[str, Any]) -> list[Edit]:
    if len(attributes["shape"]) != 2:
        raise unknown(layer)
    outputs, inputs = attributes["shape"]
    check_gain(layer, outputs, inputs)
    if layer.side == "input":
        raise refused(layer, OTHER_SIDE)
    if kind == "Int4TilePackedTo4dTensor":
        both = tensor_of(layer, "_weight_scale_and_zero")
        return [scaled(layer, both, _padded(layer.gain, both.shape[1])[:, None])]
    scale, zero = tensor_of(layer, "_weight_scale"), tensor_of(layer, "_weight_zero_point")
    tensors = [scale, zero] if kind == "Int4Tensor" else [scale]
    return [scaled(layer, tensor, _padded(layer.gain, tensor.shape[1])) for tensor in tensors]


def _padded(gain: Tensor, outputs: int) -> Tensor:
    """The gain, with ones for the rows that a kernel has padded."""
    return torch.nn.functional.pad(gain, (0, outputs - gain.numel()), value=1.0)
