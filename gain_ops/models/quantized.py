"""Quantised bases: the scales that a gain can be folded into, and the tensors that distinguish one base from another.

A gain on the output side multiplies rows of the weight, and so the scales of these rows; the codes stay as they are::

    W[o, i]           = scale[o, g] * (q[o, i] - zero[o, g])           i in group g
    gain[o] * W[o, i] = (gain[o] * scale[o, g]) * (q[o, i] - zero[o, g])

This is exact up to the rounding of the scale. Where the zero is added after scaling, W = scale * q + zero, both are
multiplied. A gain on the input side multiplies columns, and one scale covers many columns; the input gain of a down projection
goes into rows of another layer instead (up_rows.py).

No package of these formats is needed here: the names of the classes identify the layers.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gain_ops.layers.linears import describe, has_own_forward, has_plain_weight, is_kind, kind_name, sizes
from gain_ops.models.carriers import CannotFold, Carrier, Foldable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def forget_quantizer(model: "PreTrainedModel") -> bool:
    """Let a model whose weights were all unpacked on loading (a dequantised GGUF) count as the plain model that it is.

    transformers still calls such a model quantised: save_pretrained and Trainer refuse it. This removes ``hf_quantizer``,
    ``quantization_method`` and ``config.quantization_config``, and sets ``is_quantized`` to False. gain_ops.absorb does it
    for you; call it before training such a model with Trainer.

    Returns:
        Whether there was something to remove. A model that still has packed weights is not changed, and gives False.

    """
    quantizer = getattr(model, "hf_quantizer", None)
    packed = any(not parameter.is_floating_point() for parameter in model.parameters())
    packed = packed or any(sizes(module) is not None and not has_plain_weight(module) for module in model.modules())
    if quantizer is None or packed:
        return False
    quantizer.remove_quantization_config(model)
    return True


_PLAIN = "Load the model with plain weights, load_gains() with check_base=False, and absorb there."


def foldable(base: nn.Module, side: str) -> Foldable:
    """The scales of a quantised layer that carry a gain on ``side``, to be multiplied in place.

    =================================  ==========================================================
    bitsandbytes Linear8bitLt          the row statistics SCB
    bitsandbytes Linear4bit, nf4, fp4  absmax, where in_features is a multiple of the block size; for a double quantisation
                                       it is unpacked to float32
    torchao int8, intx, float8         scale, by row or by group in a row
    torchao int4                       scale and zero; plain, tile packed, and CPU's
    =================================  ==========================================================

    Raises:
        CannotFold: another layer, the input side, or scales that cover more than one row.

    """
    find = _finder(base)
    if find is None:
        raise CannotFold(
            f"it wraps a {describe(base)}, not a plain linear layer: its weight may be quantised, and would have to be "
            f"quantised again. {_PLAIN}"
        )
    if side != "output":
        raise CannotFold(
            "its gain is on the input side, and a scale of its quantised weight covers many input features: it would "
            f"have to be quantised again. {_PLAIN}"
        )
    return find(base)


def lasting_tensors(module: nn.Module) -> dict[str, Tensor] | None:
    """The tensors of a quantised layer that use does not change, by name; None where these are its own tensors.

    bitsandbytes stores scales beside its parameters, and repacks a 4-bit weight at its first inference on some CPUs: these are
    the codes in their original order, and the scales unpacked. compressed-tensors unpacks a layer in its first forward: this
    is the weight unpacked, as in a plain layer.
    """
    if is_kind(module, "bitsandbytes.Linear4bit"):
        state = getattr(module.weight, "quant_state", None)
        stated = None if state is None else {"weight": _codes(module), "weight.absmax": _absmax(state)}
    elif is_kind(module, "bitsandbytes.Linear8bitLt"):
        scale = _row_statistics(module)
        stated = None if scale is None else {"weight": cast(Tensor, module.weight), "SCB": scale}
    else:
        return _decompressed(module)
    if stated is not None and isinstance(module.bias, Tensor):
        stated["bias"] = module.bias
    return stated


def _finder(base: nn.Module) -> Callable[[Any], Foldable] | None:
    """The function that finds the scales of a layer whose forward is its package's own, perhaps in accelerate's hook."""
    package = type(base).forward.__module__.partition(".")[0]
    if has_own_forward(base):
        return None
    if package == "bitsandbytes":
        return next((find for kind, find in _LAYERS.items() if is_kind(base, kind)), None)
    if package == "torch" and isinstance(base, nn.Linear):
        return _WEIGHTS.get(kind_name(type(base.weight)))
    return None


# bitsandbytes


def _four_bit(base: Any) -> Foldable:
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        raise CannotFold("it is not quantised yet. Move it to its device, which quantises it, and absorb then.")
    if _is_repacked(state):
        raise CannotFold(
            "bitsandbytes has repacked its weight for inference on this CPU, and rounded its scales to bfloat16. Save the "
            "gains, load the model again, and load_gains() and absorb before its first forward."
        )
    rows, columns = base.out_features, base.in_features
    if tuple(state.shape) != (rows, columns) or columns % state.blocksize:
        raise CannotFold(
            f"a scale of its quantised weight covers {state.blocksize} weights, which do not end with a row of {columns}: "
            f"it would have to be quantised again. {_PLAIN}"
        )
    absmax = _absmax(state)

    def unnest() -> None:
        state.absmax, state.nested, state.state2, state.offset = absmax, False, None, None
        base.weight.compress_statistics = False
        base.quant_state = state

    return Foldable((Carrier(absmax.view(rows, -1), 0),), prepare=unnest)


def _absmax(state: Any) -> Tensor:
    """The scale of every block, in the order of the blocks: the state's own tensor, or an unpacked copy."""
    if _is_repacked(state):
        return cast(Tensor, state.absmax.T.reshape(-1))
    if not state.nested:
        return cast(Tensor, state.absmax)
    from bitsandbytes.functional import dequantize_blockwise

    return cast(Tensor, dequantize_blockwise(state.absmax, state.state2) + state.offset)


def _codes(base: nn.Module) -> Tensor:
    """The packed codes, [n, 1], in the order that a checkpoint has."""
    weight: Any = base.weight
    if not _is_repacked(weight.quant_state):
        return cast(Tensor, weight.data)
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

    codes: Tensor = unpack(weight.data, copy.copy(weight.quant_state))[0]  # unpack changes the state that it gets
    return codes


def _is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _eight_bit(base: Any) -> Foldable:
    scale = _row_statistics(base)
    if scale is None:
        raise CannotFold(
            "its weight is not held in 8 bits: it was not moved to its device yet, or built with has_fp16_weights=True. "
            "Build it with False, move it to its device, which quantises it, and absorb then."
        )
    return Foldable((Carrier(scale, 0),))


def _row_statistics(base: Any) -> Tensor | None:
    """On the weight until the first forward, which moves them to the layer's state; None if each forward makes new ones."""
    if base.state.has_fp16_weights:
        return None
    scale = getattr(base.weight, "SCB", None)
    return cast("Tensor | None", base.state.SCB if scale is None else scale)


# torchao


def _by_row(base: Any) -> Foldable:
    return Foldable((_carrier(base, base.weight.scale, 0),))


def _transposed(base: Any) -> Foldable:
    """``W = scale * q + zero``, both [in / group, out]."""
    return Foldable((_carrier(base, base.weight.scale, 1), _carrier(base, base.weight.zero_point, 1)))


def _tinygemm(base: Any) -> Foldable:
    """``W = scale * (q - 8) + zero``, both in one tensor, [in / group, out or more, 2]."""
    if getattr(base.weight, "act_mapping_type", None) is not None:
        raise CannotFold(f"its scales are packed for a kernel of int8 activations. {_PLAIN}")
    both = base.weight.scale_and_zero
    return Foldable((_carrier(base, both[:, : base.out_features], 1),))


def _carrier(base: Any, scale: Tensor, dim: int) -> Carrier:
    if scale.dim() <= dim or scale.shape[dim] != base.out_features or (scale.stride(dim) == 0 and scale.shape[dim] > 1):
        raise CannotFold(
            f"a scale of its quantised weight covers more than one row (scales {tuple(scale.shape)} for "
            f"{base.out_features} rows): it would have to be quantised again. {_PLAIN}"
        )
    return Carrier(scale, dim)


_LAYERS: dict[str, Callable[[Any], Foldable]] = {
    "bitsandbytes.Linear4bit": _four_bit,
    "bitsandbytes.Linear8bitLt": _eight_bit,
}

_WEIGHTS: dict[str, Callable[[Any], Foldable]] = {
    "torchao.Float8Tensor": _by_row,
    "torchao.Int8Tensor": _by_row,
    "torchao.IntxUnpackedToInt8Tensor": _by_row,
    "torchao.Int4Tensor": _transposed,
    "torchao.Int4OpaqueTensor": _tinygemm,
    "torchao.Int4TilePackedTo4dTensor": _tinygemm,
}


# compressed-tensors


def _decompressed(module: nn.Module) -> dict[str, Tensor] | None:
    scheme: Any = getattr(module, "quantization_scheme", None)
    status = getattr(getattr(module, "quantization_status", None), "value", None)
    if scheme is None or status != "compressed":
        return None
    tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    if any(tensor.is_meta for tensor in tensors.values()):
        return tensors
    from compressed_tensors.compressors import BaseCompressor

    with torch.no_grad():
        unpacked = BaseCompressor.get_value_from_registry(scheme.format.value).decompress(tensors, scheme)
    return {"weight": cast(Tensor, unpacked["weight"])}
