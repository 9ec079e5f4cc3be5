"""The experts of a mixture whose weights are 3-D parameters: which there are, and how their forward comes to use gains.

The module that reads such a weight gets a class of its own, as an FFN of fused_mlp.py does: its forward is the model's own,
called on a view of the module where the weight carries its gain. So the implementation that the user chose (transformers'
``experts_implementation``) is the one that runs. docs/decisions/0007-experts.md says why.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any, cast

from torch import nn

from gain_ops.layers.experts import SUM, ExpertsGain, ExpertsLinear, ExpertsSum, ExpertsSumGain
from gain_ops.layers.linears import floating_parameter

_DOWN = re.compile(r"(^|\.)(down_proj|w2|output_linear)$")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_PROJECTIONS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

# Implementations that hand the weights to a kernel, which knows no gain: grouped_mm runs in their place.
_KERNELS = ("deepgemm", "deepgemm_megamoe", "sonicmoe")


class GainedExperts(nn.Module):
    """A mixin before the class of a module whose forward reads the weights of experts that have gains."""

    _gain_kind: type[nn.Module]  # the class of the module before it got gains
    _gain_forward: Callable[..., Any]  # its forward, which torch.compile does not find through the class

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, with gains in its products."""
        instead, config = _stand_ins(self), getattr(self, "config", None)
        if getattr(config, "_experts_implementation", None) in _KERNELS:
            instead["config"] = _View(config, {"_experts_implementation": "grouped_mm"})
        y = self._gain_forward(_View(self, instead), *args, **kwargs)
        return self._modules[SUM](y) if SUM in self._modules else y  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the original class: the class made here has no name that pickle could find."""
        return _rebuild, (self._gain_kind,), self.__dict__


class _View:
    """A module, or its config, for a forward that reads it: some attributes are others, the rest is its own."""

    def __init__(self, of: Any, instead: dict[str, Any]) -> None:
        self._of, self._instead = of, instead

    def __getattr__(self, name: str) -> Any:
        instead = self._instead
        return instead[name] if name in instead else getattr(self._of, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._of(*args, **kwargs)


def expert_linears(model: nn.Module) -> list[tuple[str, ExpertsLinear]]:
    """(name, handle) of every linear map of a model that is a parameter with an expert a row, in the model's order."""
    found = []
    for name, module in model.named_modules():
        for path, linear in _linears_of(module):
            found.append((f"{name}.{path}".strip("."), linear))
    return found


def down_linears(model: nn.Module) -> list[tuple[str, ExpertsLinear]]:
    """Those that are the down projections of an FFN."""
    linears = expert_linears(model)
    return [(name, linear) for name, linear in linears if _DOWN.search(name) and not _ATTENTION.search(name)]


def expert_sums(model: nn.Module) -> list[tuple[str, ExpertsSum]]:
    """(name, handle) of the outputs of experts that are linear in their down projections, by the experts' names."""
    found = []
    for name, linear in down_linears(model):
        first = _first(linear.owner)
        linear_in_all = not getattr(linear.reader, "has_post_expert_norm", False) and (
            first is None or first.shape[0] == linear.experts  # others are experts without weights
        )
        if linear.parameter != "weight" and linear_in_all:
            shape, owned = linear.shape, (linear.reader, linear.owner, linear.parameter)
            experts = name.removesuffix(".mlp.w2").removesuffix(f".{linear.parameter}")
            found.append((experts, ExpertsSum(*owned, shape, transposed=linear.transposed)))
    return found


def attach(gains: Iterable[nn.Module]) -> None:
    """Put the gains of experts among these beside their weights, and have the forwards use them."""
    for gain in gains:
        if isinstance(gain, ExpertsGain):
            gain.attach()
            if not isinstance(gain.reader, GainedExperts):
                _become(gain.reader, _gained_class(cast(Any, type(gain.reader))))


def detach(gains: Iterable[nn.Module]) -> None:
    """Undo attach()."""
    for gain in gains:
        if isinstance(gain, ExpertsGain):
            gain.detach_from_owner()
            if isinstance(gain.reader, GainedExperts):
                _become(gain.reader, gain.reader._gain_kind)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    if "_old_forward" in vars(module):  # accelerate's hook calls this one
        cast(Any, module)._old_forward = MethodType(kind.forward, module)


def _stand_ins(reader: nn.Module) -> dict[str, Any]:
    """What a forward reads in the place of the weights that have gains, in the module itself or in a child of it."""
    instead: dict[str, Any] = {}
    for name, child in reader._modules.items():
        if isinstance(child, ExpertsSumGain):
            continue
        if isinstance(child, ExpertsGain):
            instead[child.parameter] = child.stand_in()
        elif child is not None and any(_reads(reader, gain) for gain in child._modules.values()):
            instead[name] = _View(child, _stand_ins(child))
    return instead


def _reads(reader: nn.Module, gain: nn.Module | None) -> bool:
    return isinstance(gain, ExpertsGain) and gain.reader is reader


def _linears_of(module: nn.Module) -> Iterator[tuple[str, ExpertsLinear]]:
    """(path, handle) of the parameters that a module's forward reads as the linear maps of experts."""
    weights = {name: weight for name in _PROJECTIONS if (weight := _weight(module, name, 3)) is not None}
    transposed = _transposed(module, weights)
    if transposed is not None:
        for name, weight in weights.items():
            yield name, ExpertsLinear(module, module, name, cast(Any, tuple(weight.shape)), transposed=transposed)
    elif (weight := _weight(module, "weight", 3)) is not None:
        sizes = (
            getattr(module, "num_experts", None),
            getattr(module, "output_size", None),
            getattr(module, "input_size", None),
        )
        if tuple(weight.shape) == sizes:
            yield "", ExpertsLinear(module, module, "weight", cast(Any, sizes), transposed=False)
    else:
        yield from _flat_linears(module)


def _weight(module: nn.Module, name: str, dims: int) -> nn.Parameter | None:
    weight = floating_parameter(module, name)
    return weight if weight is not None and weight.dim() == dims else None


def _transposed(module: nn.Module, weights: dict[str, nn.Parameter]) -> bool | None:
    """Whether weights [E, ., .] are stored as [E, in, out], by their sizes; None where they are not those of an FFN."""
    down, first = weights.get("down_proj"), _first(module)
    if down is None or first is None:
        return None
    parts = 2 if first is weights.get("gate_up_proj") else 1
    plain = first.shape[1] == parts * down.shape[2] and first.shape[2] == down.shape[1]
    turned = first.shape[2] == parts * down.shape[1] and first.shape[1] == down.shape[2]
    if plain and turned:
        return bool(getattr(module, "is_transposed", False))
    return turned if plain or turned else None


def _first(module: nn.Module) -> nn.Parameter | None:
    """The projection that experts begin with."""
    packed = _weight(module, "gate_up_proj", 3)
    return _weight(module, "up_proj", 3) if packed is None else packed


def _flat_linears(module: nn.Module) -> Iterator[tuple[str, ExpertsLinear]]:
    """Those of DBRX: 2-D parameters of a child, w1 and v1 [E * ffn, hidden] and, transposed, w2 of the same shape."""
    child, experts = module._modules.get("mlp"), getattr(module, "num_experts", None)
    if child is None or not isinstance(experts, int):
        return
    weights = {name: _weight(child, name, 2) for name in ("w1", "v1", "w2")}
    shapes = {None if weight is None else tuple(weight.shape) for weight in weights.values()}
    rows, hidden = shapes.pop() or (0, 0)
    if not shapes and rows and rows % experts == 0:
        for name in weights:
            shape = experts, rows // experts, hidden
            yield f"mlp.{name}", ExpertsLinear(module, child, name, shape, transposed=name == "w2")


@functools.cache
def _gained_class(kind: Any) -> type[nn.Module]:
    return type(
        f"Gain{kind.__name__}",
        (GainedExperts, kind),
        {"__module__": __name__, "_gain_kind": kind, "_gain_forward": staticmethod(kind.forward)},
    )


def _rebuild(kind: type[nn.Module]) -> nn.Module:
    gained = _gained_class(cast(Any, kind))
    return gained.__new__(gained)
