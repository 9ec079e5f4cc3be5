"""Modules that are trained whole beside the gains, and saved with them: modules_to_save, as PEFT calls it."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gain_ops.gainfiles.file import GainFile, GainFileError
from gain_ops.gainfiles.names import canonical_name, find_layers
from gain_ops.models.record import applied_record, named_from
from gain_ops.models.sites import Site
from gain_ops.utils.dtensors import copy_delta, whole
from gain_ops.utils.errors import UsageError
from gain_ops.utils.wording import first_of, some_of


def find_kept(model: nn.Module, names: Sequence[str], sites: Iterable[Site]) -> dict[str, nn.Module]:
    """The modules of these names, or whose names end in these by full components.

    Raises:
        ValueError: a name that no module with parameters has, a module with a gain in it or around it, or a module that
            shares a parameter with the rest of the model.

    """
    if isinstance(names, str):
        raise UsageError(f"modules_to_save={names!r} is a string: give a list, [{names!r}]")
    found: dict[str, nn.Module] = {}
    for end in names:
        ending = re.compile(rf"(?:.*\.)?{re.escape(end)}")
        fitting = {
            n: m for n, m in model.named_modules() if n and ending.fullmatch(n) and any(True for _ in m.parameters())
        }
        if not fitting:
            raise UsageError(f"modules_to_save names {end!r}, and no module with parameters has this name")
        found |= fitting
    for name, module in found.items():
        if inside := [s.name for s in sites if f"{s.name}.".startswith(f"{name}.") or name.startswith(f"{s.name}.")]:
            raise UsageError(f"{name} is in modules_to_save, and {inside[0]} gets a gain: leave one of them out")
        own = {id(parameter) for parameter in module.parameters()}
        for other, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in own and not other.startswith(f"{name}."):
                raise UsageError(
                    f"{name} is in modules_to_save and shares a weight with {other}, which would be trained too"
                )
    return found


def warn_of_frozen_head(model: nn.Module) -> None:
    """Warn of a head that a checkpoint of the base model lacks: it may be new, and is frozen now.

    transformers forgets after loading what was new. The rule: what lies outside ``base_model`` in a model without output
    embeddings, such as the "score" or "classifier" of a model for classification.
    """
    base = getattr(model, "base_model", None)
    embeddings = getattr(model, "get_output_embeddings", None)
    if not isinstance(base, nn.Module) or base is model or embeddings is None or embeddings() is not None:
        return
    inside = {id(parameter) for parameter in base.parameters()}
    heads = {name.partition(".")[0]: None for name, p in model.named_parameters() if id(p) not in inside}
    if heads:
        warnings.warn(
            f"{first_of(list(heads))} of {type(model).__name__} is frozen, and no gain file holds it. If it is new, train and "
            f"save it: modules_to_save={list(heads)}. If it was trained before, modules_to_save=[] says so.",
            stacklevel=3,
        )


def kept_tensors(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The tensors of a model's modules_to_save, on the CPU, by module; empty where there are none.

    Raises:
        ValueError: a module that is not there any more, or a tensor that is not there or not finite.

    """
    applied = applied_record(model)
    modules = named_from(model)
    found: dict[str, dict[str, Tensor]] = {}
    for name in () if applied is None else applied.kept:
        if name not in modules:
            raise UsageError(f"cannot save {name}: it was in modules_to_save and is no longer there")
        found[name] = {
            canonical_name(key): whole(value.detach()).to("cpu", copy=True).contiguous()
            for key, value in modules[name].state_dict().items()
        }
        for key, value in found[name].items():
            if value.is_meta or not value.isfinite().all():
                raise UsageError(f"cannot save {name}: {key} is {'not there' if value.is_meta else 'not finite'}")
    return found


def modules_of(file: GainFile, model: nn.Module, path: object) -> dict[str, nn.Module]:
    """The modules of a model, by its names, that take the file's modules; GainFileError unless all fit."""
    modules = named_from(model)
    names = find_layers(file.modules, modules)
    if missing := [name for name in file.modules if name not in names]:
        raise GainFileError(f"{path} holds trained modules that the model does not have: {some_of(missing)}")
    for name, tensors in file.modules.items():
        own = {canonical_name(key): value for key, value in modules[names[name]].state_dict().items()}
        if {k: t.shape for k, t in tensors.items()} != {k: t.shape for k, t in own.items()}:
            sizes = ", ".join(f"{key} {list(value.shape)}" for key, value in own.items())
            raise GainFileError(f"{path} holds {name} with other tensors than the model's, which are {sizes}")
        if any(value.is_meta for value in own.values()):
            raise GainFileError(f"{path} cannot be loaded yet: the weights of {names[name]} are not there")
    return {name: modules[name] for name in names.values()}


def load_kept(file: GainFile, modules: Mapping[str, nn.Module]) -> None:
    """Copy the file's modules into these, in the same order."""
    with torch.no_grad():
        for tensors, module in zip(file.modules.values(), modules.values(), strict=True):
            for key, value in module.state_dict().items():
                copy_delta(tensors[canonical_name(key)], value)
