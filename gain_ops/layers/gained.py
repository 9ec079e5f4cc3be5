"""What the layers with a gain share.

::

    output side:   y = gain * (x @ W.T) + b         gain [out_features]
    input side:    y = (x * gain) @ W.T + b         gain [in_features]         gain = 1 + delta

``delta`` is the only learned parameter: 1-D, contiguous, zeros at the start, float32 (float64 beside a float64 weight).
It stays float32 when the model is cast to half precision, where small updates would be lost.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from gain_ops.layers.linears import is_packed, offloads, refuse_sharded
from gain_ops.layers.mixed import Mixed
from gain_ops.ops.dispatch import check_name
from gain_ops.ops.linear import check_side_and_save
from gain_ops.utils.errors import UsageError

_Linear = TypeVar("_Linear", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Gained(nn.Module):
    """What the layers with a gain share: ``delta``, ``gain``, ``side``, and the way back to the plain layer.

    GainLinear, GainWrapper and gain_ops.layers.conv1d.GainConv1D; not built by itself.
    """

    delta: nn.Parameter
    in_features: int
    out_features: int
    side: str
    save: str
    backend: str
    _original: tuple[nn.Module, ...] = ()
    mixed: Mixed | None = None  # the gains of several sets, see gain_ops.mix_gains
    _hooked = False  # whether accelerate has put a hook on it

    @property
    def gain(self) -> Tensor:
        """``1 + delta``: [out_features] on the output side, [in_features] on the input side."""
        return 1 + self.delta

    @property
    def features(self) -> int:
        """The length of delta, from the layer's sizes and not from the parameter, which ZeRO-3 holds partitioned."""
        return self.out_features if self.side == "output" else self.in_features

    @property
    def gain_shape(self) -> tuple[int, ...]:
        """The shape of delta, likewise."""
        return (self.features,)

    @property
    def gained_dim(self) -> int:
        """The dimension of the stored weight that the gain scales: 0, or 1 if that holds the gain's features."""
        return 0 if self.side == "output" else 1

    def site_name(self, name: str) -> str:
        """What a gain is called whose layer has this name in the model."""
        return name

    @property
    def placed(self) -> bool:
        """Whether gain_ops.apply or load_gains put the layer in its place, so that remove() knows what it replaced."""
        return bool(self._original)

    def plain(self) -> nn.Module:
        """The layer without its gain, with the present parameters and mode: the replaced module object, if there was one."""
        raise NotImplementedError(f"{type(self).__name__} has no plain layer")

    def stand_in_for(self, original: nn.Module) -> None:
        """Remember the replaced module for plain(), without its parameters.

        The parameters belong to this layer meanwhile: a second reference would hold a weight that a device move, fully_shard
        or load_state_dict(assign=True) has replaced.
        """
        self._original = (original,)  # in a tuple, or nn.Module would register it as a child
        for name in self._parameters.keys() & original._parameters.keys():
            original._parameters[name] = None

    def _new_delta(self, device: torch.device | None, dtype: torch.dtype) -> nn.Parameter:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return nn.Parameter(torch.zeros(self.gain_shape, dtype=wide, device=device))

    def _take_over(self, linear: nn.Module) -> None:
        """Share linear's weight and bias, now frozen, its hooks and its training mode."""
        refuse_sharded(linear)
        linear.requires_grad_(False)
        weight = cast(nn.Parameter, linear.weight)
        self._parameters.update(weight=weight, bias=linear._parameters["bias"])
        self.delta = self._new_delta(weight.device, weight.dtype)
        self.training = linear.training
        share_hooks(linear, self)

    def _give_back(self, linear: _Linear) -> _Linear:
        """Hand the present parameters and the training mode to linear."""
        for name in linear._parameters:
            linear._parameters[name] = self._parameters[name]
        linear.training = self.training
        return linear

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script before it compiles a model."""
        raise UsageError(
            f"torch.jit.script cannot compile a {type(self).__name__}: fold the gains in (gain_ops.absorb) or take them off "
            "(gain_ops.remove) first, or use torch.jit.trace, torch.compile or torch.export, which take gains as they are"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor) and is_packed(value):
            raise UsageError(
                f"the weight of a {type(self).__name__} cannot become a {type(value).__name__}: quantise the model first, and "
                "put the gains on after it (gain_ops.remove(), then torchao.quantize_(), then gain_ops.apply())"
            )
        if name == "_hf_hook":
            self._hooked = True
        super().__setattr__(name, value)

    def refuse_offloaded(self) -> None:
        """Raise ValueError if accelerate has offloaded the gain and it would be trained, or is read without its hook.

        Each forward then has a new delta, which is dropped with its gradient.
        """
        if self.delta.is_meta or (torch.is_grad_enabled() and self.delta.requires_grad and offloads(self)):
            what = (
                "and fused layers read what the hooks do not bring: apply() without fuse_mlp and fuse_residual"
                if self.delta.is_meta
                else "and a delta that is brought for one forward gets no gradient: train before offloading, or let the model "
                "run under torch.no_grad()"
            )
            raise UsageError(f"accelerate has offloaded the gains (cpu_offload, disk_offload or a device_map), {what}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        loaded = next((tensor for tensor in self.parameters() if tensor is not self.delta and not tensor.is_meta), None)
        if self.delta.is_meta and loaded is not None:
            # the weights came one by one, as accelerate's load_checkpoint_and_dispatch brings them: the gain is still 1
            self.delta = self._new_delta(loaded.device, self.delta.dtype)
        own = (self.delta, self.delta.grad)

        def keep_wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor is self.delta and tensor.is_meta and not result.is_meta:
                return result.zero_()  # to_empty() of a model that was built on meta: no memory holds a gain of chance
            if result.dtype in (torch.bfloat16, torch.float16) and any(tensor is mine for mine in own):
                return tensor.detach().to(result.device)
            return result

        super()._apply(keep_wide, recurse)
        return self


def frozen(tensor: Tensor) -> Tensor:
    """A frozen weight, without the gradient that FSDP1 gives it.

    With use_orig_params FSDP1 shows the parameters as views of one flat parameter, which is trained as soon as a delta is in
    it. The flat gradient is then that of the deltas, and zero elsewhere.
    """
    return tensor.detach() if tensor.requires_grad and hasattr(tensor._base, "_fsdp_flattened") else tensor


def frozen_weight(linear: nn.Module) -> Tensor:
    """A linear map's frozen weight as [out, in]; transformers' Conv1D stores the transpose."""
    weight = frozen(cast(Tensor, linear.weight))
    return weight.T if hasattr(linear, "nf") else weight


def frozen_bias(linear: nn.Module) -> Tensor | None:
    """A linear map's frozen bias, or None."""
    bias = cast("Tensor | None", linear.bias)
    return None if bias is None else frozen(bias)


def check_options(side: str, save: str, backend: str) -> None:
    """Raise ValueError for a side, save or backend that does not exist, or for two that do not go together."""
    check_side_and_save(side, save)
    check_name(backend)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Target runs source's hooks; the dictionaries are shared, so a handle removes its hook from both."""
    for name in _HOOKS:
        setattr(target, name, getattr(source, name))
