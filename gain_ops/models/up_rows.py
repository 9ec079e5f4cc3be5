"""Where a gain on the input side of a down projection can go beside its weight's columns: the rows of the up projection.

::

    h = act(g) * u      u = x @ W_up.T + b_up      y = (h * gain) @ W_down.T
      = act(g) * u'     u' = x @ (diag(gain) @ W_up).T + gain * b_up

Exact whatever the activation is, as it does not see u. Not so without a gate, where the gain would have to pass through it.
"""

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from gain_ops.layers.linears import has_own_forward
from gain_ops.models.carriers import CannotFold
from gain_ops.models.ffn_layout import Layout, layout_of
from gain_ops.models.fused_mlp import FusedMlp


class NotGated(CannotFold):
    """Why there is no up projection whose rows could take the gain."""


@dataclass(frozen=True)
class UpRows:
    """The up projection of a gated FFN.

    Attributes:
        leaf: what the FFN calls it.
        module: the projection.
        packed: whether its rows are the gate's first and then up's, as many of each.

    """

    leaf: str
    module: nn.Module
    packed: bool

    def padded(self, values: Tensor, other: float) -> Tensor:
        """A value for each of its rows: those given for up's, and ``other`` for the gate's where they are packed."""
        return nn.functional.pad(values, (values.numel(), 0), value=other) if self.packed else values


def up_rows(model: nn.Module, down: nn.Module) -> UpRows:
    """The up projection that goes with a down projection of a model, by what the forward of their FFN says.

    Raises:
        NotGated: an FFN that is not known or has no gate, projections that more than this FFN calls, or hooks on what up
            returns.

    """
    uses = _uses(model, down)
    if len(uses) != 1:
        raise NotGated("several modules call it, each with an up projection of its own or none")
    parent, name = uses[0]
    layout = _layout(parent)
    if layout is None or not layout.gated or layout.down != name:
        raise NotGated(
            f"it is not known to be the down projection of a gated FFN (it is called by a {type(parent).__name__})"
        )
    leaf = cast(str, layout.gate if layout.packed else layout.up)
    up = parent.get_submodule(leaf)
    if len(_uses(model, up)) != 1:
        raise NotGated(f"several modules call {leaf}, and would get the gain as well")
    if up._forward_hooks:
        raise NotGated(f"{leaf} has forward hooks, which would see the gain: remove them")
    return UpRows(leaf, up, layout.packed)


def _uses(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that hold this one, and what they call it."""
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]


def _layout(parent: nn.Module) -> Layout | None:
    if isinstance(parent, FusedMlp):
        return parent._gain_layout
    return None if has_own_forward(parent) else layout_of(parent)
