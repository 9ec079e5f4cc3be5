"""EETQ's int8: ``W[o, i] = int8(weight)[o, i] * weight_scales[o]``, the int8 laid out for its kernel, transposed.

The scales, float16, lie in the outputs' order and take row gains of either sign. The weight is never touched.

Source: transformers/integrations/eetq.py; github.com/NetEase-FuXi/EETQ.
"""

from gain_ops.checkpoints.edits import Edit, Layer
from gain_ops.checkpoints.schemes.exact import OTHER_SIDE, check_gain, refused, scaled, tensor_of, unknown
from gain_ops.checkpoints.schemes.request import Request


def edits(layer: Layer, _: Request) -> list[Edit]:
    """See schemes.edits."""
    weight, scales = tensor_of(layer, "weight"), tensor_of(layer, "weight_scales")
    if len(weight.shape) != 2:
        raise unknown(layer)
    check_gain(layer, weight.shape[1], weight.shape[0])
    if layer.side == "input":
        raise refused(layer, OTHER_SIDE)
    return [scaled(layer, scales, layer.gain)]
