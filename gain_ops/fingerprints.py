"""The fingerprint of frozen weights: what a gain file knows its base by, from a module or from a file.

::

    blake2b(text + bytes, digest_size=16) in hex, over every tensor in turn
    text  = "<name>:<shape>;"                 as in "weight:576,1536;"
    bytes = every k-th value in row-major order, k = ceil(n / 4096), as little-endian bfloat16

Values that are not floating are taken as they are stored.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

SAMPLES = 4096


def step(count: int) -> int:
    """Every how manieth of ``count`` values is in the sample: ``ceil(count / 4096)``, at least 1."""
    return max(1, -(-count // SAMPLES))


def digest(tensors: Iterable[tuple[str, Sequence[int], Tensor]]) -> str:
    """32 hexadecimal digits of (name, shape, sample); the sample is every ``step(n)``-th value, 1-D, on any device."""
    found = hashlib.blake2b(digest_size=16)
    for name, shape, sample in tensors:
        found.update(f"{name}:{','.join(map(str, shape))};".encode())
        values = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
        found.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
