"""bitsandbytes' int8 (LLM.int8()), nf4 and fp4.

::

    int8:           W[o, i] = weight[o, i] * SCB[o] / 127
    nf4, fp4:       W.flatten()[k] = quant_map[code[k]] * absmax[k // blocksize]

SCB takes row gains of either sign. absmax takes them if blocks end with rows (in_features is a multiple of blocksize) and if
it is stored as float32: an absmax that is quantised itself ("double quantisation") is refused, as are gains on the inputs of
4-bit weights. Gains on the inputs of int8 weights round the weights again.

Source: bitsandbytes/functional.py (QuantState, int8_vectorwise_dequant), nn/modules.py.
"""

import math

from gain_ops.checkpoints.edits import Edit, Layer
from gain_ops.checkpoints.schemes.codes import Whole
from gain_ops.checkpoints.schemes.exact import OTHER_SIDE, check_gain, refused, scaled, tensor_of, unknown
from gain_ops.checkpoints.schemes.requantize import Grid, blocks, requantized
from gain_ops.checkpoints.schemes.request import Request
from gain_ops.checkpoints.schemes.scales import FloatScales
from gain_ops.utils import strict_json

_STATE = "weight.quant_state.bitsandbytes__"


def edits(layer: Layer, request: Request) -> list[Edit]:
    """See schemes.edits."""
    return _int8(layer, request.requantize) if "SCB" in layer.tensors else _four_bits(layer)


def _int8(layer: Layer, requantize: bool) -> list[Edit]:
    weight, scale = tensor_of(layer, "weight"), tensor_of(layer, "SCB")
    if len(weight.shape) != 2 or scale.shape != weight.shape[:1]:
        raise unknown(layer)
    outputs, inputs = weight.shape
    check_gain(layer, outputs, inputs)
    if layer.side == "output":
        return [scaled(layer, scale, layer.gain)]
    if not requantize:
        raise refused(layer, OTHER_SIDE, requantizable=True)
    scales = FloatScales(scale, unit=1 / 127)
    return requantized(
        layer, Grid(weight, Whole(weight.dtype), scales, rows=blocks(outputs, outputs), columns=blocks(inputs, 1))
    )


def _four_bits(layer: Layer) -> list[Edit]:
    absmax = tensor_of(layer, "weight.absmax")
    packed = next((tensor for name, tensor in layer.tensors.items() if name.startswith(_STATE)), None)
    if packed is None:
        raise unknown(layer)
    state = strict_json.parse(bytes(packed.read().flatten().tolist()))
    (outputs, inputs), size = state["shape"], state["blocksize"]
    if type(size) is not int or size < 1:
        raise unknown(layer)
    check_gain(layer, outputs, inputs)
    if layer.side == "input":
        raise refused(layer, "its scales belong to runs of a row, and the gain to inputs")
    if "weight.nested_absmax" in layer.tensors:
        raise refused(layer, "its scales are quantised themselves (double quantisation)")
    if inputs % size:
        raise refused(layer, f"its blocks of {size} do not end with rows of {inputs}, so that a scale serves two rows")
    if outputs * inputs != math.prod(absmax.shape) * size:
        raise unknown(layer)
    return [scaled(layer, absmax, layer.gain.repeat_interleave(inputs // size))]
