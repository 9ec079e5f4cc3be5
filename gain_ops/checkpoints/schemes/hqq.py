"""HQQ: ``W = ((W_q - zero) * scale)``, groups along a row (axis=1) or across rows (axis=0), then taken as [outputs, inputs].

With axis=1 ``scale`` and ``zero`` are [outputs * groups, 1], row after row: the scale takes row gains of either sign,
and the zero, which counts in codes, stays. With axis=0 every scale serves many rows, and the gain is refused, as are
gains on inputs.

Source: hqq/core/quantize.py in github.com/mobiusml/hqq.
"""

from gain_ops.checkpoints.edits import Edit, Layer
from gain_ops.checkpoints.schemes.exact import OTHER_SIDE, check_gain, refused, scaled, tensor_of
from gain_ops.checkpoints.schemes.request import Request


def edits(layer: Layer, _: Request) -> list[Edit]:
    """See schemes.edits."""
    tensor_of(layer, "W_q")
    scale = tensor_of(layer, "scale")
    outputs, inputs = tensor_of(layer, "shape").read().tolist()
    check_gain(layer, outputs, inputs)
    if layer.side == "input":
        raise refused(layer, OTHER_SIDE)
    if scale.shape[1:] != (1,) or scale.shape[0] % outputs:
        raise refused(layer, "HQQ's scales serve several rows (axis=0)")
    return [scaled(layer, scale, layer.gain.repeat_interleave(scale.shape[0] // outputs)[:, None])]
