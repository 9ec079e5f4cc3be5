"""The peak of a pass counted on the meta device: what an allocator would have seen."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gain_ops.backends import eager as eager_backend

__all__ = ["peak_bytes"]


def peak_bytes(step: Callable[[], object], *, exclude: Iterable[Tensor] = (), eager: bool = False) -> int:
    """Run ``step()`` and count the most bytes that its storages held at once.

    ::

        peak = max over time of the sum of the live storages, except those of ``exclude``

    A storage counts from the op that makes it until nothing refers to it, as in an allocator that hands out exactly what is
    asked for: a CPU's does, to the byte, and a GPU's rounds each up to 512 bytes. Memory that an op takes and gives back
    within itself is not seen. Neither is memory that bypasses torch's dispatcher: the generator's state that checkpointing
    saves for each block.

    torch.distributed's MemTracker counts in the same way, and hooks each parameter's gradient; a frozen parameter has none.

    Args:
        step: called once, on tensors of any device; for instance a forward and a backward.
        exclude: tensors that exist before and after, for instance the parameters.
        eager: False counts the ops of gain_ops as kernels, which need no more than they return. True counts them as the
            eager backend runs them, in plain torch: what a CPU does.

    """
    storages = _Storages(eager)
    for tensor in exclude:
        storages.add(tensor, 0)
    with storages:
        step()
    return storages.peak


class _Storages(TorchDispatchMode):
    """Counts the storages that ops return, each from its making to its end."""

    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.peak = 0
        self._eager = eager
        self._alive = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor, nbytes: int | None = None) -> None:
        """Count a tensor's storage, if it is new, by its own bytes or by the given number."""
        storage = tensor.untyped_storage()
        key = int(storage._cdata)  # the address of the storage object: every meta tensor's data is at address 0
        if key not in self._known:
            nbytes = storage.nbytes() if nbytes is None else nbytes
            self._known.add(key)
            self._alive += nbytes
            weakref.finalize(storage, self._remove, key, nbytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._eager and func.namespace == "gain_ops":
            *given, _ = args  # the last is the backend's name
            with self:
                result = getattr(eager_backend, func.overloadpacket.__name__)(*given)
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        self.peak = max(self.peak, self._alive)
        return result

    def _remove(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._alive -= nbytes
