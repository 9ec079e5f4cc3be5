"""The other place for a gain on the input side of a down projection, beside its weight's columns: the up projection's rows.

::

    h = act(g) * u      u = x @ W_up.T + b_up      y = (h * gain) @ W_down.T
      = act(g) * u'     u' = x @ (diag(gain) @ W_up).T + gain * b_up

This is exact for any activation, since act does not see u. Without a gate the gain would have to pass through the activation.
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
        leaf: its name in the FFN.
        module: the projection.
        packed: whether its rows are those of the gate and then those of up, the same number of each.

    """

    leaf: str
    module: nn.Module
    packed: bool

    def padded(self, values: Tensor, other: float) -> Tensor:
        """A value for each of its rows: the given ones for up's rows, and ``other`` for the gate's rows if it is packed."""
        return nn.functional.pad(values, (values.numel(), 0), value=other) if self.packed else values


def up_rows(model: nn.Module, down: nn.Module) -> UpRows:
    """The up projection that belongs to a down projection of a model, by the forward of their FFN.

    Raises:
        NotGated: an FFN that is unknown or has no gate, projections that other modules call too, or hooks on up's output.

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
    """The modules that hold this one, and its name in each."""
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]


def _layout(parent: nn.Module) -> Layout | None:
    if isinstance(parent, FusedMlp):
        return parent._gain_layout
    return None if has_own_forward(parent) else layout_of(parent)
