"""transformers' language models: the class that makes one of a config, its decoder layers, and what predicts no next token."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gain_ops.utils.errors import GainOpsError, UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["auto_class", "decoder_layers", "first_line", "refuse_encoder", "refused", "text_config"]

_LONGEST = 200  # characters of another library's message


def auto_class(config: Any) -> Any:
    """transformers' AutoModelForCausalLM, or for other multimodal models AutoModelForMultimodalLM.

    Raises:
        UsageError: an encoder-decoder model, or a config of which transformers makes neither.

    """
    import transformers

    kind = getattr(config, "model_type", None) or type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"{kind} is an encoder-decoder model: give a model that predicts the next token of a text")
    causal = transformers.AutoModelForCausalLM
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return causal  # by code of its own, which transformers runs only if it is trusted
    for auto in (causal, transformers.AutoModelForMultimodalLM, transformers.AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    raise UsageError(f"transformers makes no causal language model of {kind}")


def text_config(config: Any) -> Any:
    """The config of the part that predicts text: the config itself, or a section of it."""
    with refused(f"transformers finds no text part in a {getattr(config, 'model_type', '')} config"):
        return config.get_text_config(decoder=True)


def decoder_layers(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name of the list of decoder layers, and the layers in order: those of the language model, not of a vision tower.

    transformers never splits them, and FSDP and checkpointing take them one by one.

    Raises:
        UsageError: a model that does not say which they are.

    """
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    anything = cast(Any, model)
    unsplit = set(anything._no_split_modules or ())
    layers = getattr(text_config(anything.config), "num_hidden_layers", None)

    def is_layer(module: nn.Module, number: int) -> bool:
        return isinstance(module, GradientCheckpointingLayer) or type(module).__name__ in unsplit or number == layers

    decoder = {id(module) for module in anything.get_decoder().modules()}
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(is_layer(child, len(module)) for child in module)
    ]
    # a list inside another is a part of a layer
    outer = [(name, m) for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    inside = [(name, m) for name, m in outer if id(m) in decoder] or outer
    if not inside:
        raise UsageError(f"{type(model).__name__} does not say what its blocks are (_no_split_modules)")
    name, found = max(inside, key=lambda each: (len(each[1]) == layers, sum(p.numel() for p in each[1].parameters())))
    return name, list(found)


def refuse_encoder(model: nn.Module) -> None:
    """Raise UsageError for a model whose attention sees the tokens that it would have to predict, as far as its config says so.

    refuse_lookahead() of gain_ops.training.loading asks the model itself, which takes weights.
    """
    config = text_config(cast(Any, model).config)
    encodes = getattr(config, "is_decoder", None) is False or getattr(config, "use_bidirectional_attention", False)
    causal = any(
        getattr(module, "is_causal", False) for layer in decoder_layers(model)[1] for module in layer.modules()
    )
    if encodes and not causal:  # GPT-NeoX is causal whatever is_decoder says
        raise UsageError(
            f"{getattr(config, 'model_type', type(model).__name__)} is an encoder, which sees the tokens to predict: "
            "give a model that predicts the next token of a text"
        )


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn any error of another library, on what the caller gave it, into a UsageError of one line."""
    try:
        yield
    except GainOpsError:
        raise
    except Exception as error:
        raise UsageError(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The kind of an error, the first line of its text, and where in a model of transformers it came from; cut where long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if text.endswith(":") and len(lines) > 1:
        text += f" {lines[1]}"
    said = f"{type(error).__name__}: {_cut(text)}" if text else type(error).__name__
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if "modeling_" in Path(frame.filename).name]
    # an error that says what is wrong needs no place
    if places and isinstance(error, (TypeError, AttributeError, LookupError, AssertionError)):
        said += f" ({Path(places[-1].filename).name}, line {places[-1].lineno}: {_cut(places[-1].line or '')})"
    return said


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
