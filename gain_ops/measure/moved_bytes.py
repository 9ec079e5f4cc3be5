"""Counts the bytes that a pass moves through memory: what its kernels read and write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["MovedBytes", "moved_bytes"]

_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "_grouped_mm", "mv", "addmv", "dot"}
_ATTENTION = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
# they give memory, or nothing, and touch none
_FREE = {
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
}
_WRITE_ONLY = {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "arange"}
# what a product of gain_ops moves beside its GEMM, where the vendor's GEMM and a pass serve it: how often [T, out] and [T, in]
_BESIDE = {
    "linear": (2, 0),  # z is scaled in place
    "linear_z": (2, 0),
    "backward_recompute": (3, 0),  # dy and z are read, dz is written
    "ddelta_recompute": (2, 0),
    "backward_input": (0, 3),  # dx is scaled in place, and x is read
}


@dataclass(frozen=True)
class MovedBytes:
    """What one pass moves, in bytes.

    Attributes:
        passes: by all kernels that are neither products nor attention.
        products: by matrix products.
        attention: by attention kernels.
        n_products: how many matrix products there are.
        by_op: ``passes`` by the name of the op.

    """

    passes: int
    products: int
    attention: int
    n_products: int
    by_op: Mapping[str, int] = field(repr=False)


def moved_bytes(step: Callable[[], object]) -> MovedBytes:
    """Run ``step()`` and count the bytes that its ops read and write.

    ::

        bytes = sum over ops of (the distinct elements of each tensor that it reads + those of each that it writes) * itemsize

    Every op of torch is one kernel, as in eager mode: views are free, an expanded dimension is read once, and an op that
    works in place reads and writes. An op of gain_ops is one kernel too, but for its products: these are the vendor's GEMM
    and a pass over its result, or for the input side over the smaller operand, in place where nothing else reads it.
    Partial sums of reductions, and what a cache saves, are left out.

    Args:
        step: called once; for instance a forward and a backward. On the meta device it costs neither memory nor time.

    Returns:
        The bytes by kind.

    """
    counter = _Counter()
    with counter:
        step()
    by_op = counter.passes
    return MovedBytes(sum(by_op.values()), counter.products, counter.attention, counter.n_products, dict(by_op))


class _Counter(TorchDispatchMode):
    """Counts the bytes of each op by its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: Counter[str] = Counter()
        self.products = self.attention = self.n_products = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in _FREE:
            return result
        read, written = _operands(func, name, args, kwargs, result)
        count = sum(map(_nbytes, [*read, *written]))
        if name.startswith(_ATTENTION):
            self.attention += count
        elif func.namespace == "aten" and name in _PRODUCTS:
            self.products += count
            self.n_products += 1
        elif func.namespace == "gain_ops" and (name in _BESIDE or name == "linear_input"):
            self._product(name, args)
        else:
            self.passes[name] += count
        return result

    def _product(self, name: str, args: tuple[Any, ...]) -> None:
        """A product of gain_ops: (x, weight), or (dy, x, weight)."""
        x, weight = (args[0], args[1]) if name.startswith("linear") else (args[1], args[2])
        t, (n_out, n_in) = x.shape[0], weight.shape
        e = x.element_size()
        self.products += e * (t * n_in + n_in * n_out + t * n_out)
        self.n_products += 1
        if name == "linear_input":
            self.passes[name] += 2 * e * n_in * min(t, n_out)
        else:
            outs, ins = _BESIDE[name]
            self.passes[name] += e * t * (outs * n_out + ins * n_in)


def _operands(
    func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an op reads, and those that it writes."""
    read, written = [], [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | dict(kwargs)
    for argument in arguments:
        tensors = [leaf for leaf in tree_leaves(given.get(argument.name)) if isinstance(leaf, Tensor)]
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        if not (mutated and (argument.kwarg_only or name in ("copy_", "fill_", "zero_"))):  # by keyword: out=
            read += tensors
        if mutated:
            # the op's result is the argument itself, and is written once
            same = {id(tensor) for tensor in tensors}
            written = [tensor for tensor in written if id(tensor) not in same] + tensors
    return ([] if name in _WRITE_ONLY else read), written


def _nbytes(tensor: Tensor) -> int:
    """Of its distinct elements: an expanded dimension counts once."""
    if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
        return 0
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
