"""From a public function's checked arguments to flat plain tensors: DTensors, transforms, autocast and ranks, before autograd.

A public function checks its arguments and calls an inner function, decorated by ``@entry(sharding, composite)``, with ``x``,
the other operands, then the options, all by position. A call that the decorator sends nowhere else reaches the inner function's
body, with x [T, n].
"""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar, TypeVarTuple, cast

import torch
from torch import Tensor

from gain_ops.ops.arguments import any_sharded, flatten, transformed, unflatten
from gain_ops.ops.autograd import autocast_enabled

Ts = TypeVarTuple("Ts")
Y = TypeVar("Y", bound=Tensor | tuple[Tensor, Tensor])


def entry(
    sharding: Callable[[Tensor, *Ts], tuple[str, int]], composite: Callable[[Tensor, *Ts], Y]
) -> Callable[[Callable[[Tensor, *Ts], Y]], Callable[[Tensor, *Ts], Y]]:
    """Let a function of x [T, n] -> y [T, m], or two such, take x [..., n] and everything else that a public function takes.

    DTensors go to sharding.on_shards, whose shards come back here and are not checked again. A torch.func transform or
    forward-mode goes to ``composite``. All else goes to the function, with x flat; the function flattens any other activation.

    Args:
        sharding: the rule's name in the table of sharding.py, and the last size of the result; asked only for DTensors.
        composite: the same function for x of any rank, out of differentiable torch calls alone.

    """

    def decorate(function: Callable[[Tensor, *Ts], Y]) -> Callable[[Tensor, *Ts], Y]:
        @wraps(function)
        def enter(x: Tensor, *rest: *Ts) -> Y:
            if any_sharded(x, *rest):
                from gain_ops.ops.sharding import on_shards

                rule, features = sharding(x, *rest)
                return on_shards(rule, features, enter, x, *rest)
            if transformed():
                return composite(x, *rest)
            y = function(flatten(x), *rest)
            return cast(Y, unflatten(y, x) if isinstance(y, Tensor) else (unflatten(y[0], x), unflatten(y[1], x)))

        return enter

    return decorate


def gemm(
    said: str,
) -> Callable[[Callable[[Tensor, Tensor, *Ts], Tensor]], Callable[[Tensor, Tensor, *Ts], Tensor]]:
    """Apply autocast's rule for a GEMM to a function of x, a weight and more: it gets x in the dtype to compute in.

    Under autocast this is autocast's dtype, except for float64, and autocast is off inside. The weight is not cast: the
    function casts it to x's dtype, so that no cast copy is saved for backward. Outside autocast the two dtypes must agree.

    Args:
        said: how the TypeError begins on the weight, "weight is".

    """

    def decorate(function: Callable[[Tensor, Tensor, *Ts], Tensor]) -> Callable[[Tensor, Tensor, *Ts], Tensor]:
        @wraps(function)
        def compute(x: Tensor, weight: Tensor, *rest: *Ts) -> Tensor:
            device_type = x.device.type
            if autocast_enabled(device_type) and x.dtype != torch.float64:
                with torch.autocast(device_type, enabled=False):
                    return function(x.to(torch.get_autocast_dtype(device_type)), weight, *rest)
            if weight.dtype != x.dtype:
                raise TypeError(
                    f"x is {x.dtype} and {said} {weight.dtype}: they must agree outside autocast. Cast one, or use "
                    "torch.autocast."
                )
            return function(x, weight, *rest)

        return compute

    return decorate
