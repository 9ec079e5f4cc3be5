"""What transformers calls the tensors of a checkpoint once it has loaded them: its own conversion, asked for names alone."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gain_ops.models.sites import linear_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Loaded:
    """The names of a model that transformers makes of a checkpoint; made by loaded().

    Attributes:
        stored: for a module of the model, the one of the checkpoint that has its tensors, each under the same name.
        converted: for a module whose tensors are computed from others, split or stacked, a stored tensor among these.
        tied: for a linear module, another one with the same weight.

    """

    stored: dict[str, str]
    converted: dict[str, str]
    tied: dict[str, str]

    @property
    def modules(self) -> Collection[str]:
        """Every module of which something is known."""
        return self.stored.keys() | self.converted.keys() | self.tied.keys()


def loaded(model: "PreTrainedModel", tensors: Iterable[str]) -> Loaded:
    """Ask transformers for the names that a checkpoint's tensors get in a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    stored: dict[str, set[str]] = {}
    converted: dict[str, str] = {}
    for tensor in tensors:
        name, converter = rename_source_key(tensor, renamings, converters, prefix, state)
        if name not in state and tensor in state:  # as transformers does where a pattern meant another tensor
            name, converter = tensor, None
        if converter is not None:
            targets = next(entry.target_patterns for entry in converters if converter in entry.source_patterns)
            # the name is that of the first target
            converted.update((name.replace(targets[0], target).rpartition(".")[0], tensor) for target in targets)
            continue
        here, there = name.split("."), tensor.split(".")
        while len(here) > 1 and len(there) > 1 and here.pop() == there.pop():
            stored.setdefault(".".join(here), set()).add(".".join(there))
    return Loaded(
        stored={module: names.pop() for module, names in stored.items() if len(names) == 1},
        converted=converted,
        tied=_tied(model),
    )


def _tied(model: "PreTrainedModel") -> dict[str, str]:
    """For a linear module, another one with the same weight."""
    by_weight: dict[int, list[str]] = {}
    for name, module in linear_modules(model):
        if (weight := module._parameters.get("weight")) is not None:
            by_weight.setdefault(id(weight), []).append(name)
    shared = [names for names in by_weight.values() if len(names) > 1]
    return {name: names[name == names[0]] for names in shared for name in names}
