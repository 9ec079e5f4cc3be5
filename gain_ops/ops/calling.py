"""Calls of the raw ops: past torch's dispatcher where it would do nothing but call the function back.

The dispatcher takes 5 to 11 us to come back to Python, and GainLinear crosses it twice in a forward and backward. It is needed
where something listens: a compiler, a mode, a torch.func transform, a profiler, a subclass such as a DTensor, a tensor of
another kind of device.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.nn import Parameter

from gain_ops.ops import raw

P = ParamSpec("P")
R = TypeVar("R")


def _bits(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= DispatchKeySet(getattr(DispatchKey, name)).raw_repr()
    return bits


_OTHER = ~_bits("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView")
"""All keys of a tensor but those of a plain one; autograd's and autocast's have nothing registered for a raw op."""


def call(op: Callable[P, R], *arguments: P.args, **none: P.kwargs) -> R:
    """``op(*arguments)`` of an op in raw.py, outside autograd: the same result, the shorter way where there is one."""
    if is_heard(*arguments):
        return op(*arguments, **none)
    function: Callable[P, R] = raw.FUNCTIONS.get(op, op)
    return function(*arguments, **none)


def is_heard(*arguments: object) -> bool:
    """Whether the dispatcher would do more with a raw op than call its function."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    ):
        return True
    met = False
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            # all lie on one device, and a public function has checked their dtypes: a negative view is left to be seen
            tensor: Any = argument
            if tensor.is_neg() if met else torch._C._dispatch_keys(tensor).raw_repr() & _OTHER:
                return True
            met = True
        elif isinstance(argument, Tensor):
            return True
    return False
