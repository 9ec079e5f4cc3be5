"""One model, many gain sets in one batch: mix_gains() and use_sets().

Each layer gets its gains of all sets as one tensor beside its delta, and while use_sets() runs it scales each sequence by the
row of that sequence's set. Outside, the model computes with its active set, as add_gains() left it. remove() takes off all.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gain_ops.layers.gained import Gained
from gain_ops.layers.linear import GainLinear
from gain_ops.layers.mixed import Mixed, put
from gain_ops.models.apply import remove
from gain_ops.models.record import GainSets, gained_modules, kept_sets
from gain_ops.models.sets import add_gains
from gain_ops.utils.dtensors import is_sharded
from gain_ops.utils.errors import UsageError

__all__ = ["mix_gains", "use_sets"]


def mix_gains(
    model: nn.Module, files: Mapping[str, str | os.PathLike[str]], *, check_base: bool = True
) -> tuple[str, ...]:
    """Put named gain sets on a model without gains, of which use_sets() gives each sequence of a batch its own.

    ::

        y[b] = gain[set of b] * (x[b] @ W.T) + bias

    A layer that a file lacks has gain 1 in its set. The model is frozen but for its own deltas, and remove() restores it.

    Args:
        model: without gains. Its weights stay where they are.
        files: a gain file for each name.
        check_base: as in load_gains().

    Returns:
        The names, in order.

    Raises:
        GainFileError: a file that cannot be read or does not fit the model; or files that differ in a layer's side.
        ValueError: no files; a model with gains; or layers whose gains cannot be mixed: experts in 3-D weights, Conv1D and
            quantised bases. The model is then as before.
        FileNotFoundError: no such file.

    """
    if gained_modules(model):
        raise UsageError(
            f"{type(model).__name__} already has gains: save them (gain_ops.save_gains) and gain_ops.remove() them, then give "
            "mix_gains() the file"
        )
    add_gains(model, files, check_base=check_base)
    layers, sets = gained_modules(model), kept_sets(model)
    reason = next((why for name, layer in layers.items() if (why := _obstacle(name, layer))), None)
    if reason is not None or sets is None:
        remove(model)
        raise UsageError(
            f"cannot mix gain sets: {reason}. Absorb one set, or switch between them: gain_ops.add_gains()"
        )
    for name, layer in layers.items():
        layer.mixed = Mixed(_table(sets, name, layer))
    return tuple(sets.deltas)


@contextmanager
def use_sets(model: nn.Module, names: Sequence[str | None], *, beams: int = 1) -> Iterator[None]:
    """Compute each sequence of a batch with its own gain set, for the time of a ``with`` block.

    ::

        with gain_ops.use_sets(model, ["legal", None, "code"]):
            model.generate(ids)                                     # ids [3, L]; None is the base

    Another choice of as many names compiles nothing again.

    Args:
        model: from mix_gains().
        names: one for each sequence, in the batch's order.
        beams: how many rows each sequence has in the model: num_beams or num_return_sequences of generate().

    Raises:
        ValueError: names that the model does not have; no names; a block inside another; a model without mixed sets; and in
            the model's forward, a batch of another size.

    """
    tables = [(layer.mixed, layer.delta.device) for layer in gained_modules(model).values() if layer.mixed is not None]
    sets = kept_sets(model)
    if not tables or sets is None:
        raise UsageError(f"{type(model).__name__} has no mixed gain sets: gain_ops.mix_gains() puts some on")
    if isinstance(names, str) or not names:
        raise UsageError(f"names must be a list with a name, or None for the base, for each sequence, got {names!r}")
    known = list(sets.deltas)[: tables[0][0].delta.shape[0]]
    if unknown := [name for name in names if name is not None and name not in known]:
        raise UsageError(f"the model has no gain set {unknown[0]!r}, it has {', '.join(known)}")
    if beams < 1:
        raise UsageError(f"beams must be at least 1, got {beams}")
    if any(table.ids is not None for table, _ in tables):
        raise UsageError("use_sets() is running on this model already: leave that block first")
    ids = [-1 if name is None else known.index(name) for name in names for _ in range(beams)]
    try:
        for table, device in tables:
            put(table, ids, device)
        yield
    finally:
        for table, device in tables:
            put(table, None, device)


def _obstacle(name: str, layer: Gained) -> str | None:
    if type(layer) is not GainLinear:
        return f"{name} has its gain in a {type(layer).__name__}, and sets are mixed in plain linears alone"
    return f"{name} is sharded" if is_sharded(layer.weight) else None


def _table(sets: GainSets, name: str, layer: Gained) -> torch.Tensor:
    """The gains of all sets on one layer: [N, features], zeros where a set lacks it."""
    like = layer.delta.detach()
    rows = [deltas[name].to(like) if name in deltas else torch.zeros_like(like) for deltas in sets.deltas.values()]
    return torch.stack(rows)
