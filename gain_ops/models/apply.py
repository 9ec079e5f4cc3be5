"""Put gains on a model, and take them off again: apply() and remove()."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import nn

from gain_ops.gainfiles.names import canonical_name
from gain_ops.layers.gained import Gained, check_options
from gain_ops.layers.linears import is_kind, offloads, own_tensors, refuse_fsdp, refuse_sharded, sizes
from gain_ops.layers.make import gain_layer
from gain_ops.models.experts import attach, detach
from gain_ops.models.folded_activation import FoldedDown
from gain_ops.models.fused_mlp import FusedMlp, fuse_all, unfuse
from gain_ops.models.fused_residual import WithheldGain, unfuse_residual
from gain_ops.models.fused_residual import fuse_residual as fold_into_adds
from gain_ops.models.kept import find_kept, warn_of_frozen_head
from gain_ops.models.record import (
    RECORD,
    SETS,
    Applied,
    Record,
    all_gained,
    record_holders,
    refuse_gained,
    refuse_part,
)
from gain_ops.models.sites import PRESETS, Site, named_sites, refuse_ignored
from gain_ops.ops.dispatch import check_name
from gain_ops.utils.errors import UsageError
from gain_ops.utils.wording import first_of

MEMORIES = ("fast", "lean", "auto")

# Adapted layers, and the wrapper that trains a copy of a module (modules_to_save).
_PEFT_LAYERS = ("peft.BaseTunerLayer", "peft.AuxiliaryTrainingWrapper")


def apply(
    model: nn.Module,
    targets: str | Sequence[str] = "gain",
    *,
    side: str = "output",
    memory: str = "fast",
    backend: str = "auto",
    fuse_mlp: bool = False,
    mlp_chunk: int | None = None,
    fuse_residual: bool = False,
    modules_to_save: Sequence[str] | None = None,
    parts: str | Sequence[str] | None = None,
    experts: bool | str = True,
) -> Applied:
    r"""Put a gain on the chosen projections of a model, in place, and freeze everything else.

    ::

        side="output":  W_new = diag(gain) @ W            side="input":  W_new = W @ diag(gain)

    Args:
        model: any module, also a stack of layers or one of them. Its architecture is read from the tensor-parallel plan of
            its transformers config, and otherwise from names and shapes.
        targets: "gain", the attention output projections; "gain-ffn", these and the FFN down projections, those of experts
            among them; "gain-mixer", the output projections of layers without attention (Mamba, linear attention, short
            convolutions); or a list of these and of regular expressions for the end of a module's name, matched by full
            components: "o_proj" is every o_proj, r"layers\.[0-3]\.self_attn\.o_proj" four of them, ".*" every linear module.
        side: which features the gain scales, "output" or "input" (features of the linear map, for Conv1D as well); or
            "mixed", "output" at attention output projections and "input" elsewhere, for fuse_residual with fuse_mlp.
        memory: "fast" saves z = x @ W.T for backward at output-side sites. "lean" saves x at attention output projections,
            where scaled-dot-product attention already holds it, for one more GEMM in the backward, and elsewhere the
            smaller of the two. The input side always saves x. "auto" folds each gain into a pass that the model makes anyway,
            where it is known how, and is "fast" elsewhere: fuse_residual and fuse_mlp site by site, without a refusal.
            Applied.folded names the sites. A model that is sharded afterwards takes "fast" or "lean".
        backend: "auto", "triton", "cuda" or "eager"; see gain_ops.ops.dispatch.
        fuse_mlp: run each FFN whose down projection gets a gain as gain_ops.gain_mlp: its hidden activation, with the gain in
            it, is computed again in the backward and not saved, so that a gained FFN saves less than a frozen one. With
            memory="lean" the gate and up projections are computed again as well, and only the FFN's input is saved. For
            side="input" or "mixed", and for FFNs of transformers whose forward ffn_layout.py knows. Where an FFN does more in
            the same forward (Bloom, BERT), the gain is folded into its activation, which saves the gate's output alone.
        mlp_chunk: with fuse_mlp, how many tokens an FFN works on at a time, to bound its memory while it runs; None for all.
        fuse_residual: fold each output-side gain of o_proj and down_proj into the layer's residual add and the RMSNorm beside
            it (gain_ops.gain_add_rms_norm, gain_rms_norm_add, gain_add), so that the gain needs no pass of its own. For decoder
            layers of transformers whose forward decoder_layout.py knows; over any linear map. z is saved, whatever ``memory``
            says. Attention and the FFN, called by themselves, then return their output without the gain.
        modules_to_save: modules that are trained whole, such as a new head, by the ends of their names: save_gains() puts them
            into the gain file, load_gains() restores them, absorb() and remove() leave them as they are. None warns of a head
            that is frozen and that a checkpoint of the base model lacks (gain_ops.models.kept); [] says that it is meant so.
        parts: in which parts of a multimodal model the presets look: some of "language", "vision", "audio" and "projector", or
            "all". None is the language model alone, which is all that is no tower and no projector; or the whole model, where
            there is none. Patterns look everywhere.
        experts: what "gain-ffn" does with a mixture's experts whose weights are 3-D parameters: True gives each expert's down
            projection gains of its own, delta [experts, out]; "shared" gives the experts' sum one gain, [out]; False leaves
            them out. Experts that are linear modules get gains as any other.

    Returns:
        Applied: the names, the side, the targets, the number of trained parameters, and what was left out and why.

    A module that several names reach gets one gain, under every name. nn.Linear becomes GainLinear and transformers'
    Conv1D becomes GainConv1D, on the same Parameters; another linear map, such as a quantised one, is wrapped.

    Raises:
        ValueError: no model; no match of a preset or of one of the patterns; a part that the model does not have; weights that
            accelerate has offloaded; the model has gains already; it would ignore a gain at a chosen module; a chosen module
            is PEFT's, with an adapter in it; "gain-ffn" on a mixture whose experts have an unknown layout; an FFN that
            fuse_mlp or a layer that fuse_residual cannot serve; or an unknown option.

    Warns:
        UserWarning: PEFT adapters were trained before, and are now frozen like everything else; or a head is frozen that may
            be new.

    """
    running = Running(memory, backend, fuse_mlp, mlp_chunk, fuse_residual)
    if side != "mixed":
        check_options(side, "auto", backend)
    running.check(side)
    _check_experts(experts, targets, side)
    refuse_gained(model)
    if not isinstance(targets, str):
        if not isinstance(targets, Iterable):
            raise UsageError(
                f"targets={targets!r} is not one of {', '.join(map(repr, PRESETS))}, and no list of patterns"
            )
        targets = tuple(targets)
    elif targets not in PRESETS:
        raise UsageError(
            f"targets={targets!r} is not one of {', '.join(map(repr, PRESETS))}; patterns go in a list: [{targets!r}]"
        )
    found = named_sites(model, (targets,) if isinstance(targets, str) else targets, parts, experts)
    sites = found.sites
    if not sites:
        raise UsageError("targets is empty: give 'gain', 'gain-ffn' or at least one pattern")
    _refuse_inference(sites)
    kept = find_kept(model, modules_to_save or (), sites)
    if modules_to_save is None:
        warn_of_frozen_head(model)
    return place(model, [(site, _side(site, side)) for site in sites], targets, running, kept, found.left_out)


def remove(model: nn.Module) -> None:
    """Take every gain off a model, in place, as if apply() had never been called; the values of the gains are dropped.

    The original modules come back with their hooks and with the present weights and biases; state dict keys and every
    requires_grad flag are as before. This works on a copy and on an unpickled model. A GainLinear that was built by hand
    becomes an nn.Linear, still frozen. Named gain sets are dropped too.

    Raises:
        ValueError: the model has no gains; the gains were applied to a larger model that contains this one; or the model was
            sharded after apply().

    """
    gained = all_gained(model)
    if not gained:
        raise UsageError(f"{type(model).__name__} has no gains to remove")
    refuse_part(model, "remove")
    refuse_fsdp(model, "remove gains")
    unfuse(model)
    unfuse_residual(model)
    detach(gained.values())
    _replace(model, {key: module.plain() for key, module in gained.items()})
    for module in model.modules():
        vars(module).pop(SETS, None)
    for holder in record_holders(model):
        record: Record = vars(holder).pop(RECORD)
        _restore_flags(holder, record.requires_grad)


@dataclass(frozen=True)
class Running:
    """How gains run, whatever their values: the arguments of apply() of these names."""

    memory: str = "fast"
    backend: str = "auto"
    fuse_mlp: bool = False
    mlp_chunk: int | None = None
    fuse_residual: bool = False

    def check(self, side: str) -> None:
        """Raise ValueError for an option that does not exist, or does not go with the gains' side."""
        check_name(self.backend)
        if self.memory not in MEMORIES:
            raise UsageError(f"memory={self.memory!r} is not one of {', '.join(map(repr, MEMORIES))}")
        if self.mlp_chunk is not None and not self.fuse_mlp:
            raise UsageError(f"mlp_chunk={self.mlp_chunk} needs fuse_mlp=True")
        if self.mlp_chunk is not None and self.mlp_chunk < 1:
            raise UsageError(f"mlp_chunk={self.mlp_chunk} is a number of tokens, at least 1")
        if self.fuse_mlp and side == "output":
            raise UsageError(
                "fuse_mlp folds the gain into the FFN's activation, so it goes with side='input' or 'mixed'"
            )
        if self.fuse_residual and side == "input":
            raise UsageError(
                "fuse_residual folds the gain into the residual add, so it goes with side='output' or 'mixed'"
            )


def place(
    model: nn.Module,
    sites: Iterable[tuple[Site, str]],
    targets: str | tuple[str, ...],
    running: Running,
    kept: Mapping[str, nn.Module] = MappingProxyType({}),
    left_out: tuple[str, ...] = (),
) -> Applied:
    """Put gains on (site, side) pairs, in place, for apply() and load_gains(); and train ``kept``. The sides must exist."""
    first: dict[int, tuple[Site, str]] = {}
    for site, side in sites:
        first.setdefault(id(site.module), (site, side))  # two parts of a model may share a module
    sites = list(first.values())
    sides = {side for _, side in sites}
    whole_side = "mixed" if len(sides) > 1 else min(sides, default="output")
    running.check(whole_side)
    refuse_fsdp(model, "put gains on")
    refuse_ignored(model, [site for site, _ in sites])
    _refuse_offloaded(model, [site for site, _ in sites])
    for site, _ in sites:
        refuse_sharded(site.module)
        _refuse_adapted(site)
    _warn_of_adapters(model)
    flags = {canonical_name(name): p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    gains: dict[int, Gained] = {}
    try:
        for site, side in sites:
            save = _save(site, side, running.memory)
            gains[id(site.module)] = gain_layer(site.module, side=side, save=save, backend=running.backend)
    except BaseException:
        _restore_flags(model, flags)  # each layer is frozen as it gets its gain
        raise
    for site, _ in sites:
        gains[id(site.module)].stand_in_for(site.module)
    model.requires_grad_(False)  # before the gains are in it
    trained = [p for module in kept.values() for p in module.parameters() if p.is_floating_point()]
    for parameter in trained:
        parameter.requires_grad_(True)
    _replace(model, gains)
    attach(gains.values())
    applied = Applied(
        names=tuple(canonical_name(site.name) for site, _ in sites),
        side=whole_side,
        targets=targets,
        trained=sum(gain.features for gain in gains.values()) + sum(p.numel() for p in trained),
        kept=tuple(canonical_name(name) for name in kept),
        left_out=left_out,
    )
    record = Record(applied, flags)
    setattr(model, RECORD, record)
    try:
        if running.fuse_mlp:
            fuse_all(model, recompute=running.memory == "lean", chunk=running.mlp_chunk)
        if running.fuse_residual:
            fold_into_adds(model)
        if running.memory == "auto":
            fuse_all(model, recompute=False, chunk=None, where_possible=True)
            fold_into_adds(model, where_possible=True)
    except ValueError:
        remove(model)
        raise
    record.applied = replace(applied, folded=_folded(model))
    return record.applied


def _folded(model: nn.Module) -> tuple[str, ...]:
    """The names of the projections whose gain another module computes."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, FusedMlp):
            names.append(f"{name}.{module._gain_layout.down}" if name else module._gain_layout.down)
        elif isinstance(module, FoldedDown | WithheldGain):
            names.append(name)
    return tuple(map(canonical_name, names))


def _restore_flags(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """Restore the requires_grad flags of parameters, by their canonical names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(flags.get(canonical_name(name), parameter.requires_grad))


def _refuse_inference(sites: Iterable[Site]) -> None:
    """Raise ValueError for tensors of torch.inference_mode(): autograd does not take them, even outside of it."""
    made = (site.name for site in sites for tensor in own_tensors(site.module).values() if tensor.is_inference())
    name = "the gains" if torch.is_inference_mode_enabled() else next(made, None)
    if name is not None:
        raise UsageError(
            f"{name} cannot be trained under, or after, torch.inference_mode(): what is made in it can never have a "
            "gradient. Load the model and call apply() outside of it, under torch.no_grad() if need be; load_gains() "
            "serves a model in inference mode."
        )


def _refuse_offloaded(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raise ValueError for weights that accelerate has offloaded: a delta beside them would be on the meta device."""
    inside = {id(module) for holder in model.modules() if offloads(holder) for module in holder.modules()}
    names = [s.name for s in sites if id(s.module) in inside and any(p.is_meta for p in own_tensors(s.module).values())]
    if names:
        raise UsageError(
            f"cannot put gains on {first_of(names)}: accelerate has offloaded their weights (cpu_offload, disk_offload, or a "
            "device_map with 'cpu' or 'disk'). Load the model without offloading, as by a device_map of one device or by "
            "quantised weights."
        )


def _refuse_adapted(site: Site) -> None:
    """Raise ValueError for a PEFT layer: a gain around it would scale the adapter too, and could not be absorbed."""
    kind = type(site.module)
    if any(is_kind(site.module, name) for name in _PEFT_LAYERS):
        raise UsageError(
            f"{site.name} is PEFT's {kind.__module__}.{kind.__qualname__}: merge it first (merge_and_unload()), or choose "
            "other targets"
        )


def _warn_of_adapters(model: nn.Module) -> None:
    """Warn if PEFT trains parameters of the model: from now on only gains are trained."""
    if not any(is_kind(module, name) for module in model.modules() for name in _PEFT_LAYERS):
        return
    trained = [canonical_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained:
        warnings.warn(
            f"only gains are trained from now on, and no longer PEFT's parameters: {first_of(trained)}. "
            "To train both, call requires_grad_(True) on these parameters again.",
            stacklevel=4,  # the caller of apply() or load_gains()
        )


def _check_experts(experts: bool | str, targets: str | Sequence[str], side: str) -> None:
    if experts not in (True, False, "shared"):
        raise UsageError(f"experts={experts!r} is not one of True, False, 'shared'")
    if experts is not True and targets != "gain-ffn" and (isinstance(targets, str) or "gain-ffn" not in targets):
        raise UsageError(
            f"experts={experts!r} goes with targets='gain-ffn'; patterns name the experts, or leave them out"
        )
    if experts == "shared" and side != "output":
        raise UsageError("experts='shared' scales the experts' sum, so it goes with side='output'")


def _side(site: Site, side: str) -> str:
    if side != "mixed":
        return side
    return "output" if site.attention else "input"


def _save(site: Site, side: str, memory: str) -> str:
    """What the site saves for backward."""
    if side == "input" or memory != "lean":
        return "auto"
    n_in, n_out = sizes(site.module) or (0, 0)
    return "input" if site.attention or n_out > n_in else "output"


def _replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put replacements[id(child)] for every child that has one, under each of its names."""
    for parent in list(model.modules()):
        if isinstance(parent, Gained):
            continue  # a wrapper's base is not a child to replace
        for name, child in list(parent._modules.items()):  # named_children() skips a child's second name
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
