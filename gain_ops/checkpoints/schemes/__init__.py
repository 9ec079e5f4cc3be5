"""How a quantised layer takes a gain: one file for each format, and here the choice of the format.

A row gain goes into the row's scales, exactly up to their own rounding; an adapter that adds has to requantise. Where no
scale can take a gain (on inputs, or under a scale for many rows), it is refused, or with ``requantize`` new codes and scales
are chosen.
"""

from collections.abc import Callable, Mapping
from typing import Any

from gain_ops.checkpoints.edits import CheckpointError, Edit, Layer
from gain_ops.checkpoints.schemes import awq, bitsandbytes, compressed_tensors, eetq, fp8, gptq, hqq, torchao
from gain_ops.checkpoints.schemes.exact import REMEDY
from gain_ops.checkpoints.schemes.request import Request
from gain_ops.utils.errors import GainOpsError
from gain_ops.utils.wording import named

_SCHEMES: Mapping[str, Callable[[Layer, Request], list[Edit]]] = {
    "awq": awq.edits,
    "bitsandbytes": bitsandbytes.edits,
    "compressed-tensors": compressed_tensors.edits,
    "eetq": eetq.edits,
    "fbgemm_fp8": fp8.edits,
    "fp8": fp8.edits,
    "gptq": gptq.edits,
    "hqq": hqq.edits,
    "mxfp8": fp8.edits,
    "torchao": torchao.edits,
}


def edits(config: Mapping[str, Any], metadata: Mapping[str, str], layer: Layer, *, requantize: bool) -> list[Edit]:
    """The edits that fold a gain into a quantised layer; plain.py has plain layers.

    ::

        side="output":  W <- diag(gain) @ W            side="input":  W <- W @ diag(gain)            b unchanged

    Where a scale takes the gain, the product runs in float32 and is rounded once to the scale's dtype, and the edit's
    rounding is the scale's. Where new codes are chosen, the rounding is that of the weights.

    Args:
        config: "quantization_config" in config.json.
        metadata: the entries in the header of the layer's file beside its tensors.
        layer: the layer, with the gain.
        requantize: whether codes may be rounded again where no scale can take the gain.

    Raises:
        InexactError: a gain that its scales cannot take, without ``requantize`` or where the format is not unpacked here.
        CheckpointError: a format that is not known; a description that does not fit the tensors; a gain of another length.

    """
    unnamed = "bitsandbytes" if config.get("load_in_8bit") or config.get("load_in_4bit") else "nothing"
    method = str(config.get("quant_method") or unnamed)
    if method not in _SCHEMES:
        raise CheckpointError(
            f"{layer.name} is quantised by {named(method)}, which is not among the known methods ({', '.join(_SCHEMES)}). "
            f"{REMEDY}"
        )
    try:
        return _SCHEMES[method](layer, Request(config, metadata, requantize))
    except GainOpsError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{layer.name} is not stored as {method} stores layers, by its entries in config.json and the header "
            f"({error!r}): fetch them again. {REMEDY}"
        ) from error
