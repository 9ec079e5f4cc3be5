"""DTensors: recognised, gathered and filled, without importing torch.distributed where there is none."""

from typing import TYPE_CHECKING, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(argument: object) -> bool:
    """Whether it is a DTensor; asks without importing torch.distributed."""
    return type(argument).__name__ == "DTensor"


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, or the tensor itself."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def copy_delta(delta: Tensor, into: Tensor) -> None:
    """Copy values, the same on every rank, into a layer's delta, in delta's own sharding; nothing is sent."""
    if is_sharded(into):
        from torch.distributed.tensor import distribute_tensor

        sharded = cast("DTensor", into)
        delta = distribute_tensor(delta.to(into.device), sharded.device_mesh, sharded.placements, src_data_rank=None)
    into.copy_(delta)
