"""Several named gain sets on one model, of which one is active: add_gains() and set_gains().

The model has one delta a layer, with the values of the active set; the other sets lie beside it. A switch copies values and
replaces nothing, so optimizers, compiled graphs and CUDA graphs stay valid. The state dict has the active set alone, under its
usual keys; a copy and a pickle of the model have all sets. absorb() folds in the active set and drops the others, remove()
drops all, and save_gains() saves the active one. One file for each set is ::

    set_gains(model, "law")
    save_gains(model, "law.safetensors")
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gain_ops.gainfiles.combining import merged_sides, merged_targets
from gain_ops.gainfiles.file import GainFileError
from gain_ops.models.apply import Running, place
from gain_ops.models.files import (
    named_linears,
    read_gains_for,
    refuse_absent,
    refuse_misfit,
    refuse_other_base,
    reshard,
)
from gain_ops.models.projections import names_attention_output
from gain_ops.models.record import Applied, GainSets, applied_record, gained_modules, keep_sets, kept_sets, refuse_lost
from gain_ops.models.sites import Site
from gain_ops.utils.dtensors import copy_delta, whole
from gain_ops.utils.errors import UsageError
from gain_ops.utils.wording import first_of

__all__ = ["active_gains", "add_gains", "list_gains", "set_gains", "using_gains"]


def add_gains(
    model: nn.Module,
    files: Mapping[str, str | os.PathLike[str] | None],
    *,
    check_base: bool = True,
    memory: str = "fast",
    backend: str = "auto",
    fuse_mlp: bool = False,
    mlp_chunk: int | None = None,
    fuse_residual: bool = False,
) -> Applied | None:
    """Add named gain sets to a model, from gain files or from the gains that it has; set_gains() switches between them.

    In a model without gains, every layer of any file gets a gain, as by apply(), and the base stays active. All files are
    checked as by load_gains() before anything is changed.

    Args:
        model: with gains on at least the layers of every file, or with none.
        files: a gain file for each new name; or None for the present values of the model's gains, and the first such set
            becomes active if no set is. A layer that a file lacks has delta 0 in its set.
        check_base: as in load_gains().
        memory: as in apply(), for a model without gains; a gain file has values and no options.
        backend: as in apply(), for a model without gains.
        fuse_mlp: as in apply(), for a model without gains; with the arguments that apply() had, the model runs as it did.
        mlp_chunk: as in apply(), for a model without gains.
        fuse_residual: as in apply(), for a model without gains.

    Returns:
        Applied as from apply(), or None for gains put on by hand.

    Raises:
        GainFileError: a file that cannot be read or does not fit the model; or files that differ in a layer's side.
        ValueError: no files, a name that is taken, None for a model without gains, or options that do not exist.
        FileNotFoundError: no such file.

    """
    running = Running(memory, backend, fuse_mlp, mlp_chunk, fuse_residual)
    running.check("mixed")
    sets = kept_sets(model) or GainSets(deltas={}, active=None)
    if not files:
        raise UsageError("give at least one gain file, as in add_gains(model, {'code': 'code.safetensors'})")
    if taken := [name for name in files if name in sets.deltas]:
        raise UsageError(f"the model already has a gain set {', '.join(taken)}: give another name")
    gained = gained_modules(model)
    present = [name for name, path in files.items() if path is None]
    if present and not gained:
        raise UsageError(
            f"the set {present[0]} should be the model's gains, and the model has none: use gain_ops.apply() first"
        )
    now = _values(model) if present else {}
    found: dict[str, nn.Module] = dict(gained) if gained else named_linears(model)
    opened = {name: (path, read_gains_for(found, path)[0]) for name, path in files.items() if path is not None}
    reshard(model)
    for path, file in opened.values():
        if file.modules:
            raise GainFileError(
                f"{path} holds {first_of(list(file.modules))}, trained whole, and a gain set has gains alone: load it with "
                "gain_ops.load_gains()"
            )
        refuse_misfit(file, found, exact=False, path=path)
        refuse_absent(file, found, path)
        if check_base:
            refuse_other_base(file, found, model, path)
    applied = applied_record(model)
    if not gained:
        named = {f"{name} ({path})": file for name, (path, file) in opened.items()}
        sides = merged_sides(named)
        sites = [(Site(n, found[n], names_attention_output(n)), sides[n]) for n in found if n in sides]
        applied = place(model, sites, merged_targets(named), running)
    sets.deltas.update({name: now if name in present else opened[name][1].deltas for name in files})
    if sets.active is None and present:
        sets.active = present[0]
    keep_sets(model, sets)
    return applied


def set_gains(model: nn.Module, name: str | None) -> None:
    """Let the model compute with another of its gain sets, or with None: the base, every delta 0.

    The values of the previously active set, trained or not, are stored for the next switch back to it. The delta Parameters
    and their memory stay the same, and torch.compile does not compile again. Their gradients and an optimizer's moments stay
    too: clear them before you train another set. Under DDP, FSDP2 or tensor parallelism every rank must call it.

    Raises:
        ValueError: the model has no such set, or no sets; a gain that apply() put on and that is no longer there; deltas
            that are on the meta device or partitioned by ZeRO-3; or gains that no set has, which a switch would lose: they
            were trained or loaded while the base was active.

    """
    sets = kept_sets(model)
    if sets is None:
        raise UsageError(f"{type(model).__name__} has no gain sets: gain_ops.add_gains() adds some")
    if name is not None and name not in sets.deltas:
        raise UsageError(f"the model has no gain set {name!r}, it has {', '.join(sets.deltas)}")
    if name == sets.active:
        return
    refuse_lost(model, "switch gains")
    before = _values(model)
    if sets.active is not None:
        sets.deltas[sets.active] = before
    elif any(bool(whole(delta).any()) for delta in before.values()):
        raise UsageError(
            "the model has gains that no set has, and the switch would lose them: name them first, as in "
            "gain_ops.add_gains(model, {'mine': None}), or set every delta to 0"
        )
    values = {} if name is None else sets.deltas[name]
    with torch.no_grad():
        for layer_name, layer in gained_modules(model).items():
            if layer_name in values:
                copy_delta(values[layer_name], layer.delta)
            else:
                layer.delta.zero_()
    sets.active = name


@contextmanager
def using_gains(model: nn.Module, name: str | None) -> Iterator[None]:
    """set_gains() for the time of a ``with`` block; after it the previous set is active again."""
    before = active_gains(model)
    set_gains(model, name)
    try:
        yield
    finally:
        set_gains(model, before)


def list_gains(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's gain sets, in the order they were added."""
    sets = kept_sets(model)
    return () if sets is None else tuple(sets.deltas)


def active_gains(model: nn.Module) -> str | None:
    """The name of the gain set that the model computes with, or None: the base, or a model without sets."""
    sets = kept_sets(model)
    return None if sets is None else sets.active


def _values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every delta, in its own sharding."""
    reshard(model)
    layers = gained_modules(model)
    for name, layer in layers.items():
        if layer.delta.is_meta or layer.delta.numel() != layer.features:
            where = (
                "on the meta device" if layer.delta.is_meta else "partitioned: use deepspeed.zero.GatheredParameters"
            )
            raise UsageError(f"cannot switch gains: the delta of {name} is {where}")
    return {name: layer.delta.detach().clone() for name, layer in layers.items()}
