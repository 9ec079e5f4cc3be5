"""The record of a model's gains, and the checks that refuse a model."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from gain_ops.gainfiles.names import canonical_name
from gain_ops.layers.gained import Gained
from gain_ops.utils.errors import UsageError
from gain_ops.utils.wording import first_of

RECORD = "_gain_ops_record"
SETS = "_gain_ops_sets"


@dataclass(frozen=True)
class Applied:
    """What apply() did.

    Attributes:
        names: the modules that got a gain, in the model's order.
        side: "output", "input", or "mixed" when a gain file holds both.
        targets: as given: "gain", "gain-ffn", or the patterns.
        trained: how many parameters are now trained: gains, and those of modules_to_save.
        renamed: of load_gains(), the layers that the gain file calls by another name: (name in the file, name here).
        kept: the modules of modules_to_save, which are trained whole and saved with the gains.
        folded: the modules whose gain is computed in a pass that the model makes anyway (fuse_residual, fuse_mlp).
        left_out: what looks like a place for a gain and got none, a sentence for each reason; for presets alone.

    """

    names: tuple[str, ...]
    side: str
    targets: str | tuple[str, ...]
    trained: int
    renamed: tuple[tuple[str, str], ...] = ()
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()

    def __repr__(self) -> str:
        targets = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        layers = f"{len(self.names)} layer" + ("s" if len(self.names) != 1 else "")
        names = "".join(f"; {len(self.renamed)} by other names, {a} as {b}" for a, b in self.renamed[:1])
        folded = f"; {len(self.folded)} folded" if self.folded else ""
        kept = f"; {', '.join(self.kept)} trained whole" if self.kept else ""
        without = "".join(f"; left out: {text}" for text in self.left_out)
        said = f"{self.trained:,} trained parameters{folded}{kept}{names}{without}"
        return f"Applied({layers}, {self.side} side, targets {targets}: {said})"


@dataclass
class Record:
    """Stored on the model, so that a copy or a pickle has it too."""

    applied: Applied
    requires_grad: dict[str, bool]


@dataclass
class GainSets:
    """The named gain sets of a model, see gain_ops.models.sets; stored on it, so that a copy or a pickle has them too.

    Attributes:
        deltas: by set and layer; a layer that a set lacks has delta 0 in it. Those of the active set may be old: the model
            has its values.
        active: the set that the model computes with, or None for the base.

    """

    deltas: dict[str, dict[str, Tensor]]
    active: str | None


def gained_modules(model: nn.Module) -> dict[str, Gained]:
    """The layers with a gain by name, in the model's order, a shared one under its first name.

    Names are those of apply(): relative to the model that it was called on, even inside another model (such as DDP), and
    without the components that torch.compile, activation checkpointing and FSDP1 add.
    """
    named = _root(model).named_modules()
    return {module.site_name(canonical_name(name)): module for name, module in named if isinstance(module, Gained)}


def named_from(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by the name that gain files use: from where apply() was called, as in gained_modules()."""
    return {canonical_name(name): module for name, module in _root(model).named_modules()}


def record_holder(model: nn.Module) -> nn.Module | None:
    """The module that apply() was called on, if there is exactly one such in the model."""
    return _holder(model, RECORD)


def kept_sets(model: nn.Module) -> GainSets | None:
    """The named gain sets of a model, or None for a model without."""
    holder = _holder(model, SETS)
    return vars(holder)[SETS] if holder is not None else None


def keep_sets(model: nn.Module, sets: GainSets) -> None:
    """Store named gain sets on a model, where the names of its layers start."""
    setattr(_root(model), SETS, sets)


def refuse_base_active(model: nn.Module, action: str) -> None:
    """Raise ValueError if the model has named gain sets and the base is active: its deltas are no set's."""
    sets = kept_sets(model)
    if sets is not None and sets.active is None:
        raise UsageError(
            f"cannot {action} while the base is active: choose one of the gain sets {', '.join(sets.deltas)} with "
            "gain_ops.set_gains()"
        )


def refuse_part(model: nn.Module, action: str) -> None:
    """Raise ValueError if gains of the model were applied to a larger model, which alone knows what they replaced."""
    if any(module.placed for module in all_gained(model).values()) and not record_holders(model):
        raise UsageError(f"the gains were applied to a larger model: call {action}() on that one")


def lost_gains(model: nn.Module) -> tuple[str, ...]:
    """The layers that apply() put a gain on and that have none any more, since something replaced or removed the module.

    Not those below an nn.Identity, which stands for a block that another stage of a pipeline has.
    """
    applied = applied_record(model)
    if applied is None:
        return ()
    modules = named_from(model)
    present = [f"{name}." for name in gained_modules(model)]

    def stands_in(name: str) -> bool:
        parts = name.split(".")
        return any(isinstance(modules.get(".".join(parts[:i])), nn.Identity) for i in range(1, len(parts)))

    # inside another layer of that name it is still there: PEFT wraps an adapter around it
    gone = (name for name in applied.names if not any(other.startswith(f"{name}.") for other in present))
    return tuple(name for name in gone if not stands_in(name))


def refuse_lost(model: nn.Module, action: str) -> None:
    """Raise ValueError if a gain that apply() put on is no longer there."""
    if lost := lost_gains(model):
        now = named_from(model)
        what = type(now[lost[0]]).__name__ if lost[0] in now else "nothing"
        raise UsageError(
            f"cannot {action}: apply() put a gain on {first_of(lost)}, and it is gone: {what} is there now, put in its place "
            "by something that ran later, such as resize_token_embeddings(). Change the model before apply(); or put the "
            "layer with the gain back, or call gain_ops.remove() to give up all gains."
        )


def refuse_outside(model: nn.Module, action: str) -> None:
    """Raise ValueError if the model has gains that gained_modules() does not name."""
    root = _root(model)
    outside = all_gained(model).keys() - all_gained(root).keys()
    if outside:
        name = next(canonical_name(name) for name, module in model.named_modules() if id(module) in outside)
        raise UsageError(
            f"cannot {action} while {name} has a gain outside the module that apply() was called on, a "
            f"{type(root).__name__}: {action} that module by itself first"
        )


def applied_record(model: nn.Module) -> Applied | None:
    """What apply() returned for this model, or None for gains put on by hand."""
    holder = record_holder(model)
    record: Record | None = vars(holder)[RECORD] if holder is not None else None
    return record.applied if record is not None else None


def refuse_gained(model: nn.Module) -> None:
    """Raise ValueError if the model has a gain somewhere."""
    count = len(all_gained(model))
    if count:
        raise UsageError(
            f"{type(model).__name__} already has gains on {count} layers: gain_ops.absorb() them into the weights or "
            "gain_ops.remove() them first"
        )


def _root(model: nn.Module) -> nn.Module:
    """The module that layers are named from: where apply() was called, or where sets of gains put on by hand are stored."""
    return record_holder(model) or _holder(model, SETS) or model


def all_gained(model: nn.Module) -> dict[int, Gained]:
    """Every layer with a gain, whether named from _root() or not, by id."""
    return {id(module): module for module in _modules(model) if isinstance(module, Gained)}


def record_holders(model: nn.Module) -> list[nn.Module]:
    """The modules that apply() was called on."""
    return [module for module in model.modules() if RECORD in vars(module)]


def _holder(model: nn.Module, attribute: str) -> nn.Module | None:
    holders = [module for module in _modules(model) if attribute in vars(module)]
    return holders[0] if len(holders) == 1 else None


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of a model; ValueError for what is no model. Each public function on a model begins with this."""
    if not isinstance(model, nn.Module):
        what = repr(model) if model is None or isinstance(model, str) else f"a {type(model).__name__}"
        load = ": load it first, as by transformers.AutoModelForCausalLM.from_pretrained()" * isinstance(model, str)
        raise UsageError(f"expected a model, a torch.nn.Module, and got {what}{load}")
    return model.modules()
