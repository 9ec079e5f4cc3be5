"""Counts what a forward pass saves for its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["SavedBytes", "SavedTensor", "saved_bytes"]


@dataclass(frozen=True)
class SavedTensor:
    """One storage that autograd saves: shape and dtype of the tensor first saved with it, and the storage's full size."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    is_input: bool


@dataclass(frozen=True)
class SavedBytes:
    """What one forward pass saves for backward, each storage once.

    ``new`` is the storages that the pass itself made, in bytes. ``inputs`` is the storages of the given inputs that it
    holds: they cost nothing where the caller holds them already.
    """

    tensors: tuple[SavedTensor, ...]

    @property
    def new(self) -> int:
        """Bytes of the storages made by the pass."""
        return sum(saved.nbytes for saved in self.tensors if not saved.is_input)

    @property
    def inputs(self) -> int:
        """Bytes of the input storages that the pass holds."""
        return sum(saved.nbytes for saved in self.tensors if saved.is_input)

    @property
    def total(self) -> int:
        """``new + inputs``, in bytes."""
        return self.new + self.inputs


def saved_bytes(
    forward: Callable[[], object], *, exclude: nn.Module | Iterable[Tensor] = (), inputs: Iterable[Tensor] = ()
) -> SavedBytes:
    """Run ``forward()`` and count the storages that autograd saves for its backward.

    Only what the result holds counts: a part of the graph that is dropped on the way (before a detach(), for instance) has no
    backward. A tensor counts by its storage: two views of one storage count once, and a view costs its full storage. Tensors
    that a custom ``autograd.Function`` stores as attributes of ``ctx``, and not by ``save_for_backward``, are not seen.

    Args:
        forward: called once, with gradients on; its result is held during the count, and then dropped.
        exclude: a module (its parameters and buffers) or tensors whose storages do not count, since the weights exist
            with or without a backward.
        inputs: tensors whose storages are counted separately, as ``SavedBytes.inputs``.

    Returns:
        The storages in the order in which they were first saved.
    """
    tensors = [*exclude.parameters(), *exclude.buffers()] if isinstance(exclude, nn.Module) else list(exclude)
    excluded = {_key(tensor) for tensor in tensors}
    given = {_key(tensor) for tensor in inputs}
    packed: list[weakref.ref[_Packed]] = []

    def pack(tensor: Tensor) -> _Packed:
        kept = _Packed(tensor.detach())  # detached, since an output that held its own graph would never free it
        packed.append(weakref.ref(kept))
        return kept

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = forward()
        found: dict[int, SavedTensor] = {}
        for tensor in (kept.tensor for reference in packed if (kept := reference()) is not None):
            key = _key(tensor)
            if key not in excluded:
                nbytes = tensor.untyped_storage().nbytes()
                found.setdefault(key, SavedTensor(tuple(tensor.shape), tensor.dtype, nbytes, key in given))
        del result
    return SavedBytes(tuple(found.values()))


class _Packed:
    """What a graph holds for a tensor that it saves: freed with that part of the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _key(tensor: Tensor) -> int:
    # The address of the storage object, not of its data: every meta tensor's data is at address 0.
    return int(tensor.untyped_storage()._cdata)
