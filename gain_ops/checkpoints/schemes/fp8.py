"""transformers' float8 formats: finegrained_fp8 (DeepSeek's, one scale a block of 128 x 128), mxfp8, and fbgemm_fp8.

::

    fp8, mxfp8:     W[o, i] = weight[o, i] * weight_scale_inv[o // height, i // width]        or one scale for all
    fbgemm_fp8:     W[o, i] = weight[o, i] * weight_scale[o, 0]

fbgemm's scales take row gains, of either sign: the kernels multiply by them. A block's scale serves many rows, and an E8M0
scale is a power of two: there the float8 weights are rounded again, or the gain is refused. Activations are quantised
dynamically, or by a scale of their own that does not depend on this layer's gains.

Source: transformers/integrations/finegrained_fp8.py, fbgemm_fp8.py.
"""

import torch

from gain_ops.checkpoints.edits import Edit, Layer
from gain_ops.checkpoints.schemes import by_rows
from gain_ops.checkpoints.schemes.exact import tensor_of, unknown
from gain_ops.checkpoints.schemes.request import Request


def edits(layer: Layer, request: Request) -> list[Edit]:
    """See schemes.edits."""
    weight = tensor_of(layer, "weight")
    if weight.dtype == torch.int8:  # two e2m1 in a byte, as experts may be stored
        raise unknown(layer)
    name = "weight_scale" if "weight_scale" in layer.tensors else "weight_scale_inv"
    scale = tensor_of(layer, name)
    size = request.config.get("weight_block_size") if len(scale.shape) == 2 else None
    block = (size[0], size[1]) if size and name == "weight_scale_inv" else (None, None)
    return by_rows.edits(layer, weight, scale, block=block, requantize=request.requantize)
