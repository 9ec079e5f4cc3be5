"""A model's own FFN modules, run as gain_mlp: recognised by their forward, and changed by their class alone.

Modules, names, state dict and hooks of the FFN stay. Its three (or two) projections are no longer called; their parameters
are read. unfuse() restores the class.
"""

import functools
from collections.abc import Container, Iterator
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from gain_ops.layers.experts import ExpertsGain
from gain_ops.layers.gained import Gained, frozen_bias, frozen_weight
from gain_ops.layers.linears import is_conv1d, is_plain_linear
from gain_ops.layers.wrapper import GainWrapper
from gain_ops.models.ffn_layout import Chain, Layout, chains_of, layout_of
from gain_ops.models.folded_activation import fold, unfold_activations
from gain_ops.models.mixins import unmix
from gain_ops.models.projections import ATTENTION, MIXER, Linear, named_kind
from gain_ops.ops.glu import gain_activation, gain_glu
from gain_ops.ops.mlp import gain_mlp
from gain_ops.utils.errors import UsageError

_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "BloomGelu": "gelu_tanh",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}


class FusedMlp(nn.Module):
    """A mixin that fuse() puts before the class of an FFN: its forward, with the gain of the down projection's input side.

    fuse() refuses a down projection with hooks, since it is not called. Hooks that are added afterwards do not run, and
    cannot be refused: DeepSpeed adds its own to every module.
    """

    _gain_layout: Layout
    _gain_activation: str
    _gain_recompute: bool
    _gain_chunk: int | None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        layout = self._gain_layout
        gate, down = self.get_submodule(layout.gate), cast(Gained, self.get_submodule(layout.down))
        if down._hooked:
            down.refuse_offloaded()
        up = None if layout.up is None else self.get_submodule(layout.up)
        if _is_readable(self):
            y = gain_mlp(
                hidden_states,
                frozen_weight(gate),
                None if up is None else frozen_weight(up),
                frozen_weight(down),
                down.delta,
                gate_bias=frozen_bias(gate),
                up_bias=None if up is None else frozen_bias(up),
                down_bias=frozen_bias(down),
                activation=self._gain_activation,
                recompute=self._gain_recompute,
                chunk=self._gain_chunk,
                backend=down.backend,
            )
        else:
            h = self._hidden(hidden_states, gate, up, down)
            y = down.base(h) if isinstance(down, GainWrapper) else F.linear(h, frozen_weight(down), frozen_bias(down))
        return y if layout.dropout is None else cast(Tensor, self.get_submodule(layout.dropout)(y))

    def _hidden(self, x: Tensor, gate: nn.Module, up: nn.Module | None, down: Gained) -> Tensor:
        """h, by calling the projections: for quantised ones, whose weight is not for a matmul."""
        if self._gain_layout.gated:
            return gain_glu(
                gate(x),
                None if up is None else up(x),
                down.delta,
                activation=self._gain_activation,
                backend=down.backend,
            )
        return gain_activation(gate(x), down.delta, activation=self._gain_activation, backend=down.backend)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the original class: the class made here has no name that pickle could find."""
        return _rebuild, (type(self).__bases__[1],), self.__dict__


def fuse(module: nn.Module, *, recompute: bool, chunk: int | None) -> None:
    """Give an FFN, whose down projection has a gain on its input side, the class that runs it as gain_mlp.

    Raises:
        ValueError: an unknown FFN or activation; or, with ``recompute`` or ``chunk``, projections that are not plain linear
            layers.

    """
    layout = layout_of(module)
    ffn = layout or _gained_chain(module)
    if ffn is None:
        raise UsageError(
            f"fuse_mlp cannot serve {type(module).__name__}: its forward is none of the known ones "
            "(gain_ops/models/ffn_layout.py). Leave fuse_mlp off."
        )
    side = getattr(module.get_submodule(ffn.down), "side", "input")
    if side != "input":
        raise UsageError(
            f"fuse_mlp folds a gain on the input side of {ffn.down} into the FFN's activation, and this one is on the {side} "
            "side: leave fuse_mlp off"
        )
    if layout is None:
        if recompute or chunk is not None:
            raise UsageError(
                f"memory='lean' and mlp_chunk with fuse_mlp need an FFN whose forward is that alone, and "
                f"{type(module).__name__} does more: use memory='fast' and no mlp_chunk"
            )
        fold(module, cast(Chain, ffn), _activation)
        return
    activation = layout.activation if layout.functional else _activation(module.get_submodule(layout.activation))
    projections = [module.get_submodule(name) for name in (layout.gate, layout.up, layout.down) if name is not None]
    if hooked(projections[-1]):
        raise UsageError(f"fuse_mlp does not call {layout.down}, which has hooks: remove them, or leave fuse_mlp off")
    if (recompute or chunk is not None) and not _is_readable(module, layout):
        kinds = ", ".join(sorted({type(getattr(p, "base", p)).__name__ for p in projections}))
        raise UsageError(
            f"memory='lean' and mlp_chunk with fuse_mlp need plain linear layers without hooks or gains of their own, and "
            f"{type(module).__name__} has {kinds}: use memory='fast' and no mlp_chunk"
        )
    module._gain_layout, module._gain_activation = layout, activation  # type: ignore[assignment]
    module._gain_recompute, module._gain_chunk = recompute, chunk  # type: ignore[assignment]
    module.__class__ = _fused_class(cast(Any, type(module)))


def fuse_all(model: nn.Module, *, recompute: bool, chunk: int | None, where_possible: bool = False) -> None:
    """fuse() every module of a model that holds a down projection with a gain on its input side.

    Raises:
        ValueError: as fuse(); or there is none. FFNs that were fused before stay fused; unfuse() undoes it. With
            ``where_possible`` an FFN that cannot be served stays as it is instead.

    """
    chains = {module: chain for module in model.modules() if (chain := _gained_chain(module)) is not None}
    chained = {id(module.get_submodule(chain.down)) for module, chain in chains.items()}
    found = [m for name, m in model.named_modules() if m in chains or _is_gained_ffn(name, m, chained)]
    if not found and not where_possible:
        raise UsageError(
            "fuse_mlp found no FFN whose down projection has a gain: use targets='gain-ffn', or leave it off"
        )
    for module in found:
        try:
            fuse(module, recompute=recompute, chunk=chunk)
        except UsageError:
            if not where_possible:
                raise


def unfuse(model: nn.Module) -> None:
    """Give every fused FFN of a model its own class again."""
    for module in list(fused_modules(model)):
        unmix(module)
        for name in ("_gain_layout", "_gain_activation", "_gain_recompute", "_gain_chunk"):
            delattr(module, name)
    unfold_activations(model)


def fused_modules(model: nn.Module) -> Iterator[FusedMlp]:
    """The FFNs of a model that run as gain_mlp."""
    return (module for module in model.modules() if isinstance(module, FusedMlp))


def _gained_chain(module: nn.Module) -> Chain | None:
    """The chain of an FFN that does more than that, if its down projection has a gain."""
    near = (grandchild for child in module.children() for grandchild in (child, *child.children()))
    gained = any(isinstance(one, Gained) for one in near)  # forwards are read where it matters alone
    chains = chains_of(module) if gained and layout_of(module) is None else []
    modules = dict(module.named_modules()) if chains else {}
    for chain in chains:
        if {chain.gate, chain.activation} <= modules.keys() and isinstance(modules.get(chain.down), Gained):
            return chain
    return None


def _is_gained_ffn(name: str, module: nn.Module, chained: Container[int]) -> bool:
    """Whether it holds a gained down projection: by its layout, or otherwise by names, for fuse() to refuse it.

    chained: the ids of the down projections that chains hold.
    """
    layout = layout_of(module)
    if layout is not None:
        return isinstance(getattr(module, layout.down, None), Gained)
    children = ((leaf, child) for leaf, child in module.named_children() if not isinstance(child, ExpertsGain))
    gained = [(leaf, child) for leaf, child in children if isinstance(child, Gained) and id(child) not in chained]
    kinds = [named_kind(Linear(f"{name}.{leaf}" if name else leaf, child, module)) for leaf, child in gained]
    return any(kind not in (ATTENTION, MIXER) for kind in kinds)


def _is_readable(module: nn.Module, layout: Layout | None = None) -> bool:
    """Whether gain_mlp may read the weights of an FFN's projections instead of calling them."""
    layout = layout or cast(FusedMlp, module)._gain_layout
    first = [module.get_submodule(name) for name in (layout.gate, layout.up) if name is not None]
    down = module.get_submodule(layout.down)
    plain = all((is_plain_linear(p) or is_conv1d(p)) and not hooked(p) for p in first)
    return plain and isinstance(down, Gained) and not isinstance(down, GainWrapper)


def hooked(module: nn.Module) -> bool:
    """Whether hooks of any kind are registered on a module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _activation(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    if name not in _ACTIVATIONS:
        raise UsageError(
            f"fuse_mlp does not know the activation {name}: {', '.join(_ACTIVATIONS)}. Leave fuse_mlp off."
        )
    return _ACTIVATIONS[name]


@functools.cache
def _fused_class(kind: Any) -> type[nn.Module]:
    return type(f"Gain{kind.__name__}", (FusedMlp, kind), {"__module__": __name__})


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    fused = _fused_class(cast(Any, kind))
    return fused.__new__(fused)
