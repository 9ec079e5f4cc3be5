"""The parts of a model: its language model, and the towers and projectors beside it.

The language model is all that is no tower and no projector. Another part begins at a module whose config has another
``model_type`` than the part around it, as the vision tower inside a multimodal model; or, outside of numbered layers, at one
whose name says what it is ("visual", "multi_modal_projector").
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gain_ops.layers.linears import sizes
from gain_ops.utils.errors import UsageError

KINDS = ("language", "vision", "audio", "projector")
"""What a part may be, as ``apply(parts=...)`` names it."""

_TEXT_CONFIGS = ("text_encoder", "decoder", "decoder_config", "generator", "llm_config", "language_config")
_INPUTS = {
    "language": ("input_ids",),
    "vision": ("pixel_",),
    "audio": ("input_features", "input_values", "spectrogram"),
}
_WORDS = {
    "vision": "vision|visual|image|video",
    "audio": "audio|speech|acoustic|sound",
    "projector": "projector|projection|connector|qformer|perceiver|resampler|merger|adapter|adaptor|aligner|multi_modal",
}


@dataclass(frozen=True)
class Part:
    """A part of a model: ``name`` is where it begins, "" for the whole; ``config`` is its own, or None."""

    kind: str
    name: str
    module: nn.Module
    config: Any

    @property
    def model_type(self) -> str | None:
        """Its architecture, as transformers names it."""
        return _model_type(self.config)


def parts_of(model: nn.Module) -> list[Part]:
    """The parts of a model, the outermost first. A model without a config has that of the first module that has one."""
    config = next((module.config for module in model.modules() if _model_type(_config(module))), None)
    texts = _text_types(config)
    found = [Part(_kind("", model, None, texts), "", model, config)]
    for name, module in model.named_modules():
        if name and sizes(module) is None:
            around = part_around(name, found)
            own = _config(module)
            if _model_type(own) not in (None, around.model_type):
                found.append(Part(_kind(name, module, around, texts), name, module, own))
            elif around.kind == "language" and not re.search(r"(?:^|\.)\d+(?:\.|$)", name):
                kind = _said(name.rpartition(".")[2], whole=True)
                if kind is not None:
                    found.append(Part(kind, name, module, None))
    return found


def part_around(name: str, parts: Iterable[Part]) -> Part:
    """The innermost of the parts that a module of this name is in."""
    return max((part for part in parts if not part.name or f"{name}.".startswith(f"{part.name}.")), key=_depth)


def chosen_kinds(parts: Sequence[Part], wanted: str | Sequence[str] | None) -> frozenset[str]:
    """The kinds of part that get gains: those wanted, or the language model, or all where a model has none.

    Raises:
        ValueError: an unknown kind, or one that the model does not have.

    """
    present = {part.kind for part in parts}
    if wanted is None:
        return frozenset(["language"] if "language" in present else KINDS)
    kinds = KINDS if wanted == "all" else (wanted,) if isinstance(wanted, str) else tuple(wanted)
    for kind in kinds if wanted != "all" else ():
        if kind not in KINDS:
            raise UsageError(f"parts has {kind!r}, which is not one of {', '.join(map(repr, (*KINDS, 'all')))}")
        if kind not in present:
            raise UsageError(f"parts has {kind!r}, and this model has only {', '.join(sorted(present))}")
    return frozenset(kinds)


def _depth(part: Part) -> int:
    return len(part.name)


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _model_type(config: Any) -> str | None:
    model_type = getattr(config, "model_type", None)
    return model_type if isinstance(model_type, str) and model_type else None


def _text_types(config: Any) -> frozenset[str]:
    """The architectures of the text models that a config names, at any depth."""
    return frozenset(_model_type(text) or "" for text in _texts(config))


def _texts(config: Any) -> Iterator[Any]:
    for name, value in vars(config).items() if config is not None else ():
        if _model_type(value) is not None:
            if name == "text_config" or (name in _TEXT_CONFIGS and _said(_model_type(value) or "") is None):
                yield value
            yield from _texts(value)


def _kind(name: str, module: nn.Module, around: Part | None, texts: frozenset[str]) -> str:
    own = _model_type(_config(module)) or ""
    if own in texts or (around is None and texts):
        return "language"
    if around is not None:
        named = _said(name.rpartition(".")[2], whole=True)
        called = _said(f"{type(module).__name__} {own}")
        return named or _by_input(_arguments(module)) or called or around.kind
    return _by_input(_arguments(module)) or _by_input([getattr(module, "main_input_name", "")]) or "language"


def _arguments(module: nn.Module) -> Iterable[str]:
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # a forward that is not Python
        return ()


def _by_input(names: Iterable[str]) -> str | None:
    """The kind of a part whose forward takes arguments of these names."""
    return next((kind for kind, inputs in _INPUTS.items() if any(name.startswith(inputs) for name in names)), None)


def _said(text: str, *, whole: bool = False) -> str | None:
    """The kind that a name says; with ``whole``, by words between underscores."""
    form = r"(?:^|_)(?:{})(?:_|$)" if whole else "{}"
    return next((kind for kind, words in _WORDS.items() if re.search(form.format(words), text, re.IGNORECASE)), None)
