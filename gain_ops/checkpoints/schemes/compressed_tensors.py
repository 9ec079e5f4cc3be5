"""compressed-tensors (llm-compressor, vLLM): every format of integers and floats, except the sparse ones and mxfp6.

::

    int-, float-, naive-quantized, mxfp8:   W = (weight - weight_zero_point) * weight_scale
    pack-quantized:                         the same; weight_packed holds fields of b bits less 2^(b-1)
    nvfp4-pack-quantized:                   W = e2m1(weight_packed) * weight_scale / weight_global_scale
    mxfp4-pack-quantized:                   W = e2m1(weight_packed) * 2^(weight_scale - 127)

Where every row has scales of its own (strategies "channel" and "group") in 16 bits or more, these take row gains of either
sign, and zero points stay. Scales for a full weight or for blocks, float8 scales and E8M0 scales take no row gains, and no
scale takes gains on inputs: there the codes are rounded again (in 2, 4 or 8 bits), or the gain is refused. New scales are
never negative. In nvfp4 a new scale is rounded to float8, which changes a weight by at most 6.25 %.

Quantised activations stay as they are: this layer's gains do not change its inputs. A fixed input_scale of a later layer was
chosen without the gains. A layer whose own outputs are quantised by a fixed scale (output_scale) is refused for this reason,
and so is a rotated layer.

Source: compressed_tensors/compressors/, quantization/lifecycle/forward_helpers.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gain_ops.checkpoints.edits import Edit, Layer, Stored
from gain_ops.checkpoints.schemes import by_rows
from gain_ops.checkpoints.schemes.codes import FP4_E2M1, Fields
from gain_ops.checkpoints.schemes.exact import check_gain, obstacle, refused, scaled, tensor_of, unknown
from gain_ops.checkpoints.schemes.requantize import Grid, blocks, requantized
from gain_ops.checkpoints.schemes.request import Request
from gain_ops.checkpoints.schemes.scales import FloatScales, PowerScales, TwoLevelScales

_FP4_TOP = 7.0  # a group's largest value may round down to 6, as compressed-tensors has it


def edits(layer: Layer, request: Request) -> list[Edit]:
    """See schemes.edits."""
    if request.config.get("transform_config"):
        raise refused(layer, "the model's weights are rotated, and the gain belongs to the unrotated ones")
    if "output_scale" in layer.tensors:
        raise refused(layer, "its outputs are quantised with a scale that was chosen without the gain")
    scale = tensor_of(layer, "weight_scale")
    if "weight_packed" in layer.tensors:
        return _packed(layer, request, layer.tensors["weight_packed"], scale)
    weight, zeros = tensor_of(layer, "weight"), layer.tensors.get("weight_zero_point")
    block = next(
        (size for size in _block_sizes(request.config) if _tiles(weight.shape, size) == scale.shape), (None, None)
    )
    return by_rows.edits(layer, weight, scale, zeros=zeros, block=block, requantize=request.requantize)


def _packed(layer: Layer, request: Request, packed: Stored, scale: Stored) -> list[Edit]:
    if len(packed.shape) != 2 or packed.dtype not in (torch.uint8, torch.int32):
        raise unknown(layer)
    is_fp4 = packed.dtype == torch.uint8
    outputs = packed.shape[0]
    inputs = packed.shape[1] * 2 if is_fp4 else int(tensor_of(layer, "weight_shape").read()[-1])
    check_gain(layer, outputs, inputs)
    reason = obstacle(layer, scale, outputs)
    if reason is None:
        return [scaled(layer, scale, layer.gain if len(scale.shape) == 1 else layer.gain[:, None])]
    if "weight_g_idx" in layer.tensors:
        raise refused(layer, f"{reason}; and its inputs are grouped in an order of their own")
    if not request.requantize:
        raise refused(layer, reason, requantizable=True)
    grid = _fp4(layer, packed, scale, inputs) if is_fp4 else _integers(layer, request.config, packed, scale, inputs)
    return requantized(layer, grid)


def _fp4(layer: Layer, packed: Stored, scale: Stored, inputs: int) -> Grid:
    scales = (
        PowerScales(scale)
        if scale.dtype == torch.uint8
        else TwoLevelScales(scale, tensor_of(layer, "weight_global_scale"))
    )
    return Grid(
        codes=packed,
        coding=Fields(torch.tensor(FP4_E2M1), inputs),
        scales=scales,
        rows=torch.arange(packed.shape[0]),
        columns=blocks(inputs, scale.shape[1]),
        top=_FP4_TOP if scale.dtype == torch.uint8 else None,
    )


def _integers(layer: Layer, config: Mapping[str, Any], packed: Stored, scale: Stored, inputs: int) -> Grid:
    widths = {args["num_bits"] for args in _weights(config) if packed.shape[1] == -(-inputs * args["num_bits"] // 32)}
    if len(widths) != 1 or not widths <= {2, 4, 8}:
        raise refused(layer, f"codes of {sorted(widths) or 'unknown'} bits cannot be unpacked")
    bits = widths.pop()
    codes = torch.arange(2**bits) - 2 ** (bits - 1)
    scales = FloatScales(scale)
    return Grid(
        codes=packed,
        coding=Fields(codes, inputs, word=torch.int32),
        scales=scales,
        rows=blocks(packed.shape[0], scales.values.shape[0]),
        columns=blocks(inputs, scales.values.shape[1]),
        zeros=_zeros(layer, codes, scales.values.shape),
    )


def _zeros(layer: Layer, codes: Tensor, shape: torch.Size) -> Tensor | None:
    """Zero points, which are packed downwards."""
    if "weight_zero_point" not in layer.tensors:
        return None
    stored = layer.tensors["weight_zero_point"]
    coding = Fields(codes, shape[1], word=torch.int32, downwards=True)
    return coding.decode(stored.region.read())[: shape[0]]


def _weights(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How the groups of the config quantise weights."""
    for group in config.get("config_groups", {}).values():
        if isinstance(group, Mapping) and group.get("weights"):
            yield group["weights"]


def _block_sizes(config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    for args in _weights(config):
        if size := args.get("block_structure"):
            height, width = size.split("x") if isinstance(size, str) else size
            yield int(height), int(width)


def _tiles(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-features // width) for features, width in zip(shape, size, strict=True))
