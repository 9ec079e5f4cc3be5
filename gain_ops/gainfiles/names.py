"""Which layer of a model or a checkpoint a layer of a gain file is: both may call the same module by another prefix."""

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import pairwise, takewhile

from gain_ops.gainfiles.file import GainFileError
from gain_ops.utils.wording import some_of

# Components that torch.compile, activation checkpointing and FSDP1 put into module names.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})

# Parts of a name that only say how deep inside another model the layers lie, as transformers, DDP and others call them.
_SHELLS = frozenset(
    ["auto_model", "backbone", "base_model", "language_model", "llm", "model", "module", "text_model", "transformer"]
)


def canonical_name(name: str) -> str:
    """A module's name without the components that torch.compile, activation checkpointing and FSDP1 put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def find_layers(layers: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """For every layer that a model or a checkpoint has, the name that it has there.

    The same name if there is one. Else a name that agrees with it at its end, at least from the first list on
    ("layers.0.self_attn.o_proj"). What is left in front may be shells on both ("model.language_model", in the file
    "language_model.model"; SentenceTransformer's "0.auto_model"), and of several such names the one that agrees in the
    most parts is it. Otherwise it may be on one of the two only (an outer module's prefix), where one name alone fits.

    Args:
        layers: names from a gain file.
        names: every module of the model or the checkpoint.

    Raises:
        GainFileError: several names fit one layer equally well, or one name several layers.

    """
    by_leaf: dict[str, list[tuple[list[str], str]]] = {}
    for name in names:
        parts = canonical_name(name).split(".")
        by_leaf.setdefault(parts[-1], []).append((parts, name))
    found: dict[str, str] = {}
    for layer in layers:
        parts = canonical_name(layer).split(".")
        fitting = [layer] if layer in names else _fitting(parts, by_leaf.get(parts[-1], []))
        if len(fitting) > 1:
            raise GainFileError(f"{layer} of the gain file could be any of {some_of(fitting)}")
        if fitting:
            found[layer] = fitting[0]
    for name, count in Counter(found.values()).items():
        if count > 1:
            same = some_of(layer for layer in found if found[layer] == name)
            raise GainFileError(f"{same} of the gain file would all be {name}")
    return found


def without_shells(name: str) -> str:
    """A module's name without the shells in front of it: "layers.0" for "module.model.layers.0"."""
    parts = name.split(".")
    return ".".join(parts[_shells(parts) :])


def _shells(parts: list[str]) -> int:
    """How many shells stand in front; a number before a shell is one too, as it only counts the models of a container."""
    return sum(
        1
        for _ in takewhile(
            lambda pair: pair[0] in _SHELLS or (pair[0].isdecimal() and pair[1] in _SHELLS), pairwise(parts)
        )
    )


def _fitting(layer: list[str], names: Iterable[tuple[list[str], str]]) -> list[str]:
    """Of the names that may be ``layer``, those in shells that agree with it in the most parts, or else all."""
    shells = _shells(layer)
    number = next((place for place in range(shells, len(layer)) if layer[place].isdecimal()), None)
    needed = 1 if number is None else len(layer) - max(shells, number - 1)
    in_shells: dict[int, list[str]] = {}
    others: list[str] = []
    for parts, name in names:
        common = _common(layer, parts)
        fronts = len(layer) - common, len(parts) - common
        if common < needed:
            continue
        if fronts[0] <= shells and fronts[1] <= _shells(parts):
            in_shells.setdefault(common, []).append(name)
        elif not all(fronts) and common > 1:  # one part alone says too little of a name
            others.append(name)
    return in_shells[max(in_shells)] if in_shells else others


def _common(one: list[str], other: list[str]) -> int:
    """How many parts at the end are equal."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
