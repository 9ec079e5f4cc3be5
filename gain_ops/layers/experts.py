"""A gain on the experts of a mixture, whose weights are one 3-D parameter: a row of gains for each expert.

::

    output side:   z[e] = gain[e] * (x @ W[e].T)        gain [E, out]
    input side:    z[e] = (x * gain[e]) @ W[e].T        gain [E, in]         gain = 1 + delta

Such a parameter has no module of its own: the forward of the experts reads it. It reads a GainedWeight in its place, whose
products have the gain, so that the model's own code runs whichever way its user chose, and a bias is added after the gain.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gain_ops.layers.gained import Gained, check_options, frozen
from gain_ops.layers.linears import has_own_forward, refuse_sharded
from gain_ops.ops.grouped import gain_grouped_linear
from gain_ops.ops.linear import gain_scale
from gain_ops.reference import scale
from gain_ops.utils.errors import UsageError

_SUFFIX = "_gain"

SUM = "sum_gain"
"""The name of the gain of the experts' sum in the module of the experts."""


class ExpertsLinear(nn.Module):
    """The linear maps of a mixture's experts as a module: a handle on a parameter of the module that owns it, made on demand.

    ``weight`` is the owner's parameter, [E, out, in], or [E, in, out] if ``transposed``; or of two dimensions, the experts one
    below the other. ``reader`` is the module whose forward reads it.
    """

    def __init__(
        self, reader: nn.Module, owner: nn.Module, parameter: str, shape: tuple[int, int, int], *, transposed: bool
    ) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, owner._parameters[parameter])
        self.experts, rows, columns = self.shape = shape
        self.out_features, self.in_features = (columns, rows) if transposed else (rows, columns)
        self.parameter, self.transposed = parameter, transposed
        self._held = reader, owner  # in a tuple, or they would be children

    def gain_shape(self, side: str) -> tuple[int, ...]:
        """The shape of a delta on one of its sides."""
        return self.experts, self.out_features if side == "output" else self.in_features

    @property
    def reader(self) -> nn.Module:
        """The module whose forward reads the weight."""
        return self._held[0]

    @property
    def owner(self) -> nn.Module:
        """The module that has the weight."""
        return self._held[1]


class ExpertsGain(Gained):
    """The gains of one linear map of a mixture's experts, a child of the module that owns the weight.

    Shapes: delta [E, out_features] or [E, in_features], float32 (float64 beside a float64 weight).

    Saved for backward, beside what the experts save: z on the output side and x on the input side, of every token that an
    expert gets.

    Raises:
        ValueError: a side or backend that does not exist, or a weight already sharded.

    """

    def __init__(self, linear: ExpertsLinear, *, side: str = "output", backend: str = "auto") -> None:
        check_options(side, "auto", backend)
        super().__init__()
        refuse_sharded(linear)
        if has_own_forward(linear.reader):
            raise UsageError(
                f"a gain on {linear.parameter} would be ignored: the {type(linear.reader).__name__} that reads it has a "
                "forward of its own (set on the instance). Leave it out of the targets."
            )
        weight = linear.weight.requires_grad_(False)
        self.experts, self.in_features, self.out_features = linear.experts, linear.in_features, linear.out_features
        self.parameter, self.transposed, self.shape = linear.parameter, linear.transposed, linear.shape
        self.side, self.save, self.backend = side, "auto", backend
        self._held = linear._held
        self.delta = self._new_delta(weight.device, weight.dtype)
        self.training = linear.owner.training

    @property
    def reader(self) -> nn.Module:
        """The module whose forward reads the weight."""
        return self._held[0]

    @property
    def owner(self) -> nn.Module:
        """The module that has the weight."""
        return self._held[1]

    @property
    def weight(self) -> Any:
        """The parameter, as its owner has it."""
        return self.owner._parameters[self.parameter]

    @property
    def features(self) -> int:
        """The number of gains, of all experts."""
        return math.prod(self.gain_shape)

    @property
    def gain_shape(self) -> tuple[int, ...]:
        """[E, features]."""
        return self.experts, self.out_features if self.side == "output" else self.in_features

    @property
    def gained_dim(self) -> int:
        """The dimension of the weight [E, ., .] that runs over the gain's features."""
        return 1 if (self.side == "output") != self.transposed else 2

    def scaled(self) -> Iterator[tuple[Tensor, int]]:
        """The tensors that the gain scales, with a dimension for the experts, and the dimension of the gain's features."""
        yield self._by_expert(), self.gained_dim

    def site_name(self, name: str) -> str:
        """The parameter's name: gains are named by what they scale."""
        owner = name.rpartition(".")[0]
        return owner if self.parameter == "weight" else f"{owner}.{self.parameter}".lstrip(".")

    def plain(self) -> nn.Module:
        """What it took the place of: nothing but a handle on the weight."""
        return self._original[0]

    def attach(self) -> None:
        """Become a child of the owner, beside the weight."""
        self.owner.add_module(self.parameter + _SUFFIX, self)

    def detach_from_owner(self) -> None:
        """Leave the owner as it was."""
        del self.owner._modules[self.parameter + _SUFFIX]

    def stand_in(self) -> "GainedWeight":
        """What the forward reads in the weight's place."""
        return GainedWeight(self, self._by_expert(), self.delta, transposed=self.transposed)

    def _by_expert(self) -> Tensor:
        weight = frozen(self.weight)
        if weight.numel() != math.prod(self.shape):
            raise UsageError(
                f"{self.parameter} of {type(self.owner).__name__} is partitioned: do it in deepspeed.zero.GatheredParameters"
            )
        return weight.view(self.shape)

    def forward(self, x: Tensor, product: Callable[[Tensor], Tensor], delta: Tensor) -> Tensor:
        """``product(x)`` with the gain on its side; delta is broadcast."""
        if self.side == "input":
            return product(self._scaled(x, delta))
        return self._scaled(product(x), delta)

    def _scaled(self, x: Tensor, delta: Tensor) -> Tensor:
        if delta.dim() == 1:
            return gain_scale(x, delta, backend=self.backend)
        return scale(x, delta)

    def extra_repr(self) -> str:
        """Sizes and side."""
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, side={self.side}"


class ExpertsSum(ExpertsLinear):
    """The output of a mixture's experts, which is linear in each down projection and its bias."""

    def gain_shape(self, side: str) -> tuple[int, ...]:
        """The shape of a delta, which has the output side alone."""
        return (self.out_features,)


class ExpertsSumGain(ExpertsGain):
    """One gain for the output of all experts of a mixture: the sum that the router weighs.

    ::

        y = gain * sum_e w_e * (h_e @ W[e].T + b[e])            gain = 1 + delta [out_features]
    """

    @property
    def gain_shape(self) -> tuple[int, ...]:
        """[out_features]."""
        return (self.out_features,)

    def scaled(self) -> Iterator[tuple[Tensor, int]]:
        """The down projections' weight and bias."""
        yield from super().scaled()
        if (bias := self.owner._parameters.get(f"{self.parameter}_bias")) is not None:
            yield bias, 1

    def site_name(self, name: str) -> str:
        """That of the experts."""
        return name.rpartition(".")[0]

    def attach(self) -> None:
        """Become a child of the experts."""
        self.reader.add_module(SUM, self)

    def detach_from_owner(self) -> None:
        """Leave the experts as they were."""
        del self.reader._modules[SUM]

    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
        """The experts' output with the gain."""
        return gain_scale(y, self.delta, backend=self.backend)


class GainedWeight:
    """The weight of some experts with its gain, in the place of the weight alone: products with it have the gain.

    ``weight`` [..., out, in] (or [..., in, out] if ``transposed``), ``delta`` [..., features]. It can be indexed by expert,
    transposed, viewed in its own shape and cast, as the forwards of experts do, and gives the answers of the weight to
    questions such as its dtype; any other use is refused.
    """

    def __init__(self, layer: ExpertsGain, weight: Tensor, delta: Tensor, *, transposed: bool) -> None:
        self._layer, self._weight, self._delta, self._transposed = layer, weight, delta, transposed

    def _with(self, weight: Tensor, delta: Tensor, *, transposed: bool) -> "GainedWeight":
        return GainedWeight(self._layer, weight, delta, transposed=transposed)

    @property
    def shape(self) -> torch.Size:
        """The weight's."""
        return self._weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """The weight's."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """The weight's."""
        return self._weight.device

    @property
    def T(self) -> "GainedWeight":
        """Of one expert, the other way round."""
        return self.transpose(-2, -1)

    def data_ptr(self) -> int:
        """The weight's, which transformers asks for its alignment."""
        return self._weight.data_ptr()

    def dim(self) -> int:
        """The weight's."""
        return self._weight.dim()

    def __getitem__(self, expert: Any) -> "GainedWeight":
        """The weight of an expert, or of an expert for each token."""
        if self._delta.dim() != 2 or not isinstance(expert, int | Tensor):
            raise self._refused(f"an index {expert!r}")
        return self._with(self._weight[expert], self._delta[expert], transposed=self._transposed)

    def transpose(self, dim0: int, dim1: int) -> "GainedWeight":
        """The last two dimensions exchanged."""
        dims = self._weight.dim()
        if {dim0 % dims, dim1 % dims} != {dims - 2, dims - 1}:
            raise self._refused(f"transpose({dim0}, {dim1})")
        return self._with(self._weight.transpose(dim0, dim1), self._delta, transposed=not self._transposed)

    def view(self, *shape: Any) -> "GainedWeight":
        """With a dimension for the experts, which it has already."""
        viewed = self._weight.view(*shape)
        if viewed.shape != self._weight.shape:
            raise self._refused(f"view{shape}")
        return self

    def to(self, dtype: torch.dtype) -> "GainedWeight":
        """The weight cast, and the gain as it is."""
        return self._with(self._weight.to(dtype), self._delta, transposed=self._transposed)

    def float(self) -> "GainedWeight":
        """The weight in float32, and the gain as it is."""
        return self.to(torch.float32)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(str(self._refused(name)))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, cls))
        return given._product(func, args, dict(kwargs or {}))

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A torch function of a tensor and this weight: a product, or it is refused."""
        name = getattr(func, "__name__", str(func))
        if len(args) < 2 or not self._may(name, args):
            raise self._refused(name)
        if name in _GROUPED:
            return self._grouped(args[0], kwargs["offs"])
        if args[0] is self:  # W @ x: rows are features
            turned = self._layer(args[1].mT, lambda x: func(self._weight, x.mT, **kwargs).mT, self._delta.unsqueeze(-2))
            return cast(Tensor, turned.mT)
        bias = kwargs.pop("bias", args[2] if len(args) > 2 else None)
        delta = self._delta.unsqueeze(-2) if self._delta.dim() > 1 else self._delta
        y = self._layer(args[0], lambda x: func(x, self._weight, **kwargs), delta)
        return cast(Tensor, y if bias is None else y + bias)

    def _may(self, name: str, args: tuple[Any, ...]) -> bool:
        """Whether a function multiplies by this weight in the way that its layout was taken for."""
        if args[0] is self:
            return name == "bmm" and not self._transposed
        return name in _PRODUCTS and self._transposed == _PRODUCTS[name]

    def _grouped(self, x: Tensor, offsets: Tensor) -> Tensor:
        layer = self._layer
        return gain_grouped_linear(x, self._weight.mT, self._delta, offsets, side=layer.side, backend=layer.backend)

    def _refused(self, use: str) -> UsageError:
        owner, layer = type(self._layer.owner).__name__, self._layer
        return UsageError(
            f"the gain on {layer.parameter} of {owner} cannot be used: the forward of {type(layer.reader).__name__} uses the "
            f"weight in {use}, and a gain knows products with it alone (linear, matmul, bmm, grouped_mm). Leave it out of the "
            "targets, or choose another experts_implementation."
        )


# Products x @ W by name, and whether they take W as [in, out].
_GROUPED = frozenset(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"))
_PRODUCTS = {"linear": False, "matmul": True, "__matmul__": True, "bmm": True, **dict.fromkeys(_GROUPED, True)}
