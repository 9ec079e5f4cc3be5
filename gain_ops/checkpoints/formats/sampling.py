"""The fingerprint of tensors that lie in files: the sampled values are read, the rest is not."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gain_ops.checkpoints.edits import CheckpointError, Stored
from gain_ops.gainfiles.fingerprints import digest, step

_NEAR = 4096  # bytes: values closer than a page are read with everything between them


def fingerprint(tensors: Mapping[str, Stored]) -> str:
    """The result of gain_ops.models.files.fingerprint() for a module with these tensors, in this order."""
    return digest((name, tensor.shape, sample(tensor)) for name, tensor in tensors.items())


def sample(tensor: Stored) -> Tensor:
    """The values of a tensor that its fingerprint is taken of."""
    count, size = torch.Size(tensor.shape).numel(), tensor.dtype.itemsize
    every = step(count)
    if every * size <= _NEAR:
        return tensor.read().reshape(-1)[::every]
    with tensor.region.file.open("rb", buffering=0) as file:
        picked = bytearray()
        for place in range(0, count, every):
            file.seek(tensor.region.offset + place * size)
            picked += file.read(size)
    if len(picked) != -(-count // every) * size:
        raise CheckpointError(f"{tensor.region.file} ends within {tensor.name}: it is cut")
    return torch.frombuffer(picked, dtype=tensor.dtype)
