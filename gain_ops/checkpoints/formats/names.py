"""Which layer of a checkpoint a layer of a gain file is: a checkpoint may call the same module by another prefix."""

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import takewhile

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.utils.wording import some_of

# Parts of a name that only say how deep inside another model the layers lie, as transformers, DDP and others call them.
_SHELLS = frozenset(["base_model", "language_model", "llm", "model", "module", "text_model", "transformer"])


def find_layers(layers: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """For every layer that the checkpoint has, the name that it has there.

    The same name if there is one. Else the name that agrees with it in the most parts from the end, at least from the
    first list on ("layers.0.self_attn.o_proj"). What is left in front may be on one of the two only (a checkpoint that
    was saved without its head), or shells on both ("model.language_model", in the file "language_model.model").

    Args:
        layers: names from a gain file.
        names: every module of the checkpoint.

    Raises:
        CheckpointError: several names fit one layer equally well, or one name several layers.

    """
    by_leaf: dict[str, list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        by_leaf.setdefault(parts[-1], []).append(parts)
    found: dict[str, str] = {}
    for layer in layers:
        parts = layer.split(".")
        fitting = [layer] if layer in names else _fitting(parts, by_leaf.get(parts[-1], []))
        if len(fitting) > 1:
            raise CheckpointError(f"{layer} could be any of {some_of(fitting)} in the checkpoint")
        if fitting:
            found[layer] = fitting[0]
    for name, count in Counter(found.values()).items():
        if count > 1:
            raise CheckpointError(f"{some_of(layer for layer in found if found[layer] == name)} would all be {name}")
    return found


def without_shells(name: str) -> str:
    """A module's name without the shells in front of it: "layers.0" for "module.model.layers.0"."""
    parts = name.split(".")
    shells = takewhile(_SHELLS.__contains__, parts[:-1])
    return ".".join(parts[sum(1 for _ in shells) :])


def _fitting(layer: list[str], names: Iterable[list[str]]) -> list[str]:
    """Of the names that may be ``layer``, those that agree with it in the most parts."""
    number = next((place for place, part in enumerate(layer) if part.isdecimal()), None)
    needed = 1 if number is None else len(layer) - max(0, number - 1)
    agreeing: dict[int, list[str]] = {}
    for name in names:
        common = _common(layer, name)
        fronts = layer[:-common], name[:-common]
        shells = number is not None and _SHELLS.issuperset([*fronts[0], *fronts[1]])
        if common >= needed and (not all(fronts) or shells):
            agreeing.setdefault(common, []).append(".".join(name))
    return agreeing[max(agreeing)] if agreeing else []


def _common(one: list[str], other: list[str]) -> int:
    """How many parts at the end are equal."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
