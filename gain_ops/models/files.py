"""Save and load the gains of a model: the gain files of gainfiles/ for a model."""

import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from gain_ops._version import __version__
from gain_ops.gainfiles.file import GainFile, GainFileError, read_gains, write_gains
from gain_ops.gainfiles.fingerprints import digest, is_copy, sample, spots
from gain_ops.gainfiles.names import canonical_name, find_layers
from gain_ops.layers.gained import Gained
from gain_ops.layers.linears import describe, has_plain_weight, is_packed, own_tensors
from gain_ops.layers.make import gain_shape
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.apply import Running, place
from gain_ops.models.experts import expert_linears, expert_sums
from gain_ops.models.kept import kept_tensors, load_kept, modules_of
from gain_ops.models.projections import names_attention_output
from gain_ops.models.record import (
    Applied,
    applied_record,
    gained_modules,
    refuse_base_active,
    refuse_lost,
    refuse_outside,
)
from gain_ops.models.sites import Site, linear_modules
from gain_ops.utils.dtensors import copy_delta, is_sharded, whole
from gain_ops.utils.errors import FileError, UsageError
from gain_ops.utils.wording import first_of, some_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def save_gains(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the gains of a model to a gain file (a few hundred kilobytes; its format: gain_ops.gainfiles.file).

    Modules that apply() got as modules_to_save are written too, whole, as large as they are.

    The file is written beside ``path`` and moved into place, so an interrupted save does not damage an old file. Deltas of
    other dtypes are rounded to float32.

    Under FSDP2 or tensor parallelism every rank must call it: the deltas are gathered, and the 8 KB of each frozen weight
    for its fingerprint. The first rank of the mesh writes, and no rank returns before the file exists. Under DDP call it on
    one rank.

    Args:
        model: a model with gains, by apply(), load_gains() or by hand.
        path: the file to write; its folder is made.

    Raises:
        ValueError: the model has no gains, or a delta that is not finite, on the meta device or partitioned by ZeRO-3;
            a module of modules_to_save that is not finite or no longer there; it has gains outside the module that apply()
            was called on; a gain that apply() put on is no longer there; or it has named gain sets, and none of them is
            active.
        OSError: the file cannot be written; under FSDP2 or tensor parallelism on every rank.

    """
    _write_once(collect_gains(model), path, _mesh(model))


def collect_gains(
    model: nn.Module, gathered: Callable[[Gained], AbstractContextManager[object]] = lambda layer: nullcontext()
) -> GainFile:
    """The contents of a model's gain file; ``gathered(layer)`` is entered while a layer's parameters are read.

    Raises:
        ValueError: as save_gains().

    """
    refuse_lost(model, "save the gains")
    layers = gained_modules(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no gains to save: put them on with gain_ops.apply()")
    refuse_outside(model, "save")
    refuse_base_active(model, "save")
    reshard(model)
    deltas, fingerprints, values = {}, {}, {}
    for name, layer in layers.items():
        with gathered(layer):
            deltas[name] = _saveable(name, layer)
            fingerprints[name], values[name] = _identity(layer)
    applied = applied_record(model)
    return GainFile(
        deltas=deltas,
        sides={name: layer.side for name, layer in layers.items()},
        fingerprints=fingerprints,
        targets=tuple(layers) if applied is None else applied.targets,
        base_model=base_model_of(model),
        package=__version__,
        spots={name: text for name, text in values.items() if text is not None},
        modules=kept_tensors(model),
    )


def load_gains(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    check_base: bool = True,
    memory: str = "fast",
    backend: str = "auto",
    fuse_mlp: bool = False,
    mlp_chunk: int | None = None,
    fuse_residual: bool = False,
) -> Applied | None:
    """Load a gain file into a model; a model without gains gets them first, as by apply().

    The file is checked against the model before anything is changed: layers, sides, sizes, finite values, and whether each
    frozen weight is the one that the gain was trained on. Under FSDP2 or tensor parallelism every rank must call it, and
    reads the file; only the samples of the fingerprints are gathered.

    A layer may have another name here than in the file: the text model inside a multimodal one, a model in DDP, in
    torch.compile, in another module or in a SentenceTransformer. It is taken where one name alone fits (the rule:
    gain_ops.gainfiles.names.find_layers), and Applied.renamed says so.

    Args:
        model: with gains on exactly the layers and sides of the file, or with none.
        path: a file written by save_gains().
        check_base: whether each layer's frozen weight must be the one of the file, by its fingerprint, or a copy of it in
            another floating dtype. With False gains can be used on quantised, or on other weights.
        memory: as in apply(), for a model without gains; a gain file has values and no options.
        backend: as in apply(), for a model without gains.
        fuse_mlp: as in apply(), for a model without gains; with the arguments that apply() had, the model runs as it did.
        mlp_chunk: as in apply(), for a model without gains.
        fuse_residual: as in apply(), for a model without gains.

    Returns:
        Applied as from apply(), or None for gains put on by hand.

    Raises:
        GainFileError: not a gain file, damaged, of a later version, not finite, or not fitting the model; or a model whose
            weights are on the meta device or offloaded.
        ValueError: options that do not exist; or the model has named gain sets, and none of them is active.
        FileNotFoundError: no such file.

    """
    running = Running(memory, backend, fuse_mlp, mlp_chunk, fuse_residual)
    running.check("mixed")
    refuse_base_active(model, "load gains")
    gained = gained_modules(model)
    found: dict[str, nn.Module] = dict(gained) if gained else named_linears(model)
    file, renamed = read_gains_for(found, path)
    reshard(model)
    refuse_misfit(file, found, exact=bool(gained), path=path)
    refuse_absent(file, found, path)
    kept = modules_of(file, model, path)
    if check_base:
        refuse_other_base(file, found, model, path)
    applied = applied_record(model)
    if not gained:
        sites = [(Site(n, found[n], names_attention_output(n)), file.sides[n]) for n in file.deltas]
        applied = place(model, sites, file.targets, running, kept)
        gained = gained_modules(model)
    with torch.no_grad():
        for name, delta in file.deltas.items():
            copy_delta(delta, gained[name].delta)
    load_kept(file, kept)
    return applied and replace(applied, renamed=renamed)


def read_gains_for(
    names: Collection[str], path: str | os.PathLike[str]
) -> tuple[GainFile, tuple[tuple[str, str], ...]]:
    """A gain file with its layers named as in ``names``, and the names that differ: (in the file, in ``names``).

    Raises:
        GainFileError: as read_gains(), or names that fit more than one layer.
        MissingFileError: no such file.

    """
    file = read_gains(path)
    found = find_layers(file.deltas, names)
    return file.renamed(found), tuple((layer, name) for layer, name in found.items() if layer != name)


def fingerprint(layer: nn.Module) -> str | None:
    """A short hash of a layer's frozen weight, cheap to compute, also without torch.

    ::

        blake2b(text + bytes, digest_size=16) in hex, over every tensor in turn
        text  = "<name>:<shape>;"                 as in "weight:576,1536;"
        bytes = every k-th value in row-major order, k = ceil(n / 4096), as little-endian bfloat16

    Of a floating layer only the weight is sampled, rounded to bfloat16 (to nearest, ties to even), so that a checkpoint
    loaded in float32 and in bfloat16 has one fingerprint; a copy in float16 is known by weight_spots(). Of a quantised layer
    the parameters and buffers are sampled, in
    order of their names, or those that use does not change (gain_ops.models.quantized.lasting_tensors); values that are
    not floating are hashed as they are stored. Of a DTensor only the sample is gathered: every rank must call it.

    Returns:
        32 hexadecimal digits, or None where there is nothing to sample: no tensors, or tensors on the meta device.

    """
    return _identity(layer)[0]


def weight_spots(layer: nn.Module) -> str | None:
    """gain_ops.gainfiles.fingerprints.spots() of a layer's plain weight; None for a quantised one, or on the meta device."""
    return _identity(layer)[1]


def _identity(layer: nn.Module) -> tuple[str | None, str | None]:
    """The fingerprint and the spots of a layer's weight, from one sample."""
    base = layer.base if isinstance(layer, GainWrapper) else layer
    if isinstance(base, Gained) and is_packed(cast(Tensor, base.weight)):
        raise UsageError(
            f"{describe(base)} was quantised after it got its gain: take the gains off with gain_ops.remove(), and quantise "
            "before apply()"
        )
    if isinstance(base, Gained) or has_plain_weight(base):
        tensors = {"weight": cast(Tensor, base.weight)}
    else:
        tensors = dict(sorted(raw_tensors(base).items()))
    if not tensors or any(tensor.is_meta for tensor in tensors.values()):
        return None, None
    samples = {name: sample(tensor) for name, tensor in tensors.items()}
    plain = has_plain_weight(base) and samples["weight"].numel() > 0
    found = digest((name, tensor.shape, samples[name]) for name, tensor in tensors.items())
    return found, spots(samples["weight"]) if plain else None


def reshard(model: nn.Module) -> None:
    """After a forward, FSDP2 may still show the gathered parameters; values written into these are lost."""
    for module in model.modules():
        if isinstance(reshard := getattr(module, "reshard", None), MethodType):
            reshard()


def _mesh(model: nn.Module) -> "DeviceMesh | None":
    """The device mesh that a model's layers with a gain are sharded over, the largest of several, or None."""
    parameters = (p for layer in gained_modules(model).values() for p in layer.parameters())
    meshes = [cast("DTensor", p).device_mesh for p in parameters if is_sharded(p)]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def _write_once(file: GainFile, path: str | os.PathLike[str], mesh: "DeviceMesh | None") -> None:
    """write_gains() on the first rank of a mesh; the others wait for it, and raise if it failed."""
    if mesh is None:
        write_gains(file, path)
        return
    import torch.distributed as dist

    error: Exception | None = None
    coordinate = mesh.get_coordinate()
    if coordinate is not None and not any(coordinate):
        try:
            write_gains(file, path)
        except Exception as raised:  # raised again after the other ranks know
            error = raised
    failures = torch.tensor([error is not None], dtype=torch.int32, device=mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(failures, group=mesh.get_group(dim))
    if error is not None:
        raise error
    if failures.item():
        raise FileError(f"{path} could not be written; the error of the mesh's first rank says why")


def _saveable(name: str, layer: Gained) -> Tensor:
    delta = whole(layer.delta.detach())
    if delta.is_meta or delta.numel() != layer.features:
        where = (
            "on the meta device, or offloaded by accelerate"
            if delta.is_meta
            else "partitioned: call gain_ops.integrations.deepspeed.save_gains() on every process, or under FSDP1 save "
            "inside FullyShardedDataParallel.summon_full_params(model)"
        )
        raise UsageError(f"cannot save {name}: its delta is {where}")
    if not delta.isfinite().all():
        raise UsageError(f"cannot save {name}: its delta is not finite; the training has diverged")
    return delta.to("cpu", torch.float32, copy=True)


def base_model_of(model: nn.Module) -> str | None:
    """The name of a transformers model's folder or repository, or None."""
    paths = (getattr(getattr(module, "config", None), "_name_or_path", None) for module in model.modules())
    return next((Path(path).name for path in paths if isinstance(path, str) and path), None)


def named_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear maps of a model, with a gain or without, by the names that gain files use."""
    found = [*linear_modules(model), *expert_linears(model), *expert_sums(model)]
    return {canonical_name(name): module for name, module in found}


def refuse_misfit(file: GainFile, found: dict[str, nn.Module], *, exact: bool, path: object) -> None:
    """Raise GainFileError unless names, sides and sizes fit; with ``exact`` the model may have no other gains."""
    problems = []
    missing = [name for name in file.deltas if name not in found]
    if missing:
        problems.append(f"layers of the file that the model does not have: {some_of(missing)}")
    surplus = [name for name in found if name not in file.deltas] if exact else []
    if surplus:
        problems.append(f"gains of the model that the file does not have: {some_of(surplus)}")
    for name in (name for name in file.deltas if name in found):
        layer, side = found[name], file.sides[name]
        if isinstance(layer, Gained) and layer.side != side:
            problems.append(f"{name} has its gain on the {layer.side} side, in the file on the {side} side")
            continue
        if isinstance(layer, Gained) and layer.delta.numel() != layer.features:
            problems.append(f"{name} has a partitioned delta: load inside deepspeed.zero.GatheredParameters")
            continue
        expected, stored = gain_shape(layer, side), tuple(file.deltas[name].shape)
        if stored != expected:
            takes, has = ("x".join(map(str, shape)) for shape in (expected, stored))
            problems.append(f"{name} takes {takes} gains on the {side} side, the file has {has}")
    if problems:
        raise GainFileError(f"{path} does not fit the model: {first_of(problems, '; ')}")


def refuse_absent(file: GainFile, found: dict[str, nn.Module], path: object) -> None:
    """Raise GainFileError for layers that have no values yet: a delta beside them would be lost with to_empty()."""
    absent = [name for name in file.deltas if any(tensor.is_meta for tensor in raw_tensors(found[name]).values())]
    if absent:
        raise GainFileError(
            f"{path} cannot be loaded yet: the weights of {some_of(absent)} are not there (meta device, or offloaded by "
            "accelerate). Load the weights first, as by from_pretrained() or load_checkpoint_and_dispatch() without "
            "offloading, and load the gains after them."
        )


def refuse_other_base(file: GainFile, found: dict[str, nn.Module], model: nn.Module, path: object) -> None:
    """Raise GainFileError unless every frozen weight is the one the gain was trained on."""
    differing = [
        name
        for name, expected in file.fingerprints.items()
        if expected is not None
        and fingerprint(found[name]) != expected
        and not _is_copy(file.spots.get(name), found[name])
    ]
    if differing:
        raise GainFileError(
            f"{path} was trained on other weights (base model {file.base_model or 'unknown'}; this one is "
            f"{base_model_of(model) or 'unknown'}): the frozen weights differ in {len(differing)} of {len(file.deltas)} "
            f"layers, {some_of(differing)}. Load the base it was trained on, or pass check_base=False to use them anyway."
        )


def _is_copy(spots: str | None, layer: nn.Module) -> bool:
    """Whether a layer's weight may be that of these spots in another dtype."""
    here = weight_spots(layer) if spots is not None else None
    return here is not None and is_copy(cast(str, spots), here)


def raw_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors of a linear map, by name: its own, or for a quantised layer those that use does not change."""
    from gain_ops.models.quantized import lasting_tensors  # it builds on this module

    lasting = lasting_tensors(module)
    return own_tensors(module) if lasting is None else lasting
