"""The fingerprint of frozen weights, by which a gain file knows its base: from a module or from a file.

::

    blake2b(text + bytes, digest_size=16) in hex, over every tensor in turn
    text  = "<name>:<shape>;"                 as in "weight:576,1536;"
    bytes = every k-th value in row-major order, k = ceil(n / 4096), as little-endian bfloat16

Values that are not floating are hashed as they are stored.

A float16 copy of a weight has another hash than the weight or its bfloat16 copy: no rounding to fewer digits is the same for
both, since where it has a border one copy may lie on it and the other beside it. So a file also holds 32 of the sampled values
(spots()), and is_copy() asks whether the differences are those of rounding alone.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from gain_ops.utils.dtensors import is_sharded

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


SAMPLES = 4096
_SPOTS = 32
_FORM = re.compile(r"(?:bfloat16|float16):(?:[0-9a-f]{4}){1,32}")


def step(count: int) -> int:
    """The step of the sample of ``count`` values: ``ceil(count / 4096)``, at least 1."""
    return max(1, -(-count // SAMPLES))


def sample(tensor: Tensor) -> Tensor:
    """Every ``step(n)``-th value in row-major order, 1-D: of n values at most 4096.

    Of a DTensor only these values are gathered, 8 KB of a floating one, so every rank of its mesh must call it. Its floating
    values are rounded to bfloat16 here, as digest() does for all.
    """
    if is_sharded(tensor):
        return _gathered_sample(cast("DTensor", tensor))
    return tensor.detach().reshape(-1)[:: step(tensor.numel())]


def digest(tensors: Iterable[tuple[str, Sequence[int], Tensor]]) -> str:
    """32 hexadecimal digits of (name, shape, sample); the sample is every ``step(n)``-th value, 1-D, on any device."""
    found = hashlib.blake2b(digest_size=16)
    for name, shape, sample in tensors:
        found.update(f"{name}:{','.join(map(str, shape))};".encode())
        values = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
        found.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def spots(sample: Tensor) -> str:
    """32 values of a floating sample, ``"<dtype>:<little-endian bytes in hex>"``: float16 as it is, all else as bfloat16."""
    values = sample[:: max(1, -(-sample.numel() // _SPOTS))].cpu()
    values = values if values.dtype == torch.float16 else values.to(torch.bfloat16)
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    return f"{str(values.dtype).removeprefix('torch.')}:{raw.hex()}"


def is_copy(one: str, other: str) -> bool:
    """Whether two spots() may be of one weight, one of them in float16: each value within the two dtypes' roundings.

    ``|a - b| <= ulp(a) / 2 + ulp(b) / 2``: some number exists that rounds to both.
    """
    (a, rounding_a), (b, rounding_b) = (_values(text) for text in (one, other))
    halves = one.startswith("float16:") != other.startswith("float16:")
    return halves and a.shape == b.shape and bool(((a - b).abs() <= rounding_a + rounding_b).all())


def is_spots(text: object) -> bool:
    """Whether something from a file is what spots() returns."""
    return isinstance(text, str) and _FORM.fullmatch(text) is not None


def _values(text: str) -> tuple[Tensor, Tensor]:
    """The values of spots() in float64, and the largest error of each by rounding."""
    name, _, digits = text.partition(":")
    dtype: torch.dtype = getattr(torch, name)
    values = torch.frombuffer(bytearray.fromhex(digits), dtype=dtype).double()
    info = torch.finfo(dtype)
    power = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 1)  # the largest of two below the value
    return values, torch.where(values == 0, 0, power).clamp_min(info.smallest_normal) * (info.eps / 2)


def _gathered_sample(tensor: "DTensor") -> Tensor:
    """Each rank writes the values that it has into zeros; the sum of the bytes over the ranks is the sample."""
    import torch.distributed as dist

    positions = torch.arange(0, tensor.numel(), step(tensor.numel()))
    indices = []
    for dim, index in enumerate(torch.unravel_index(positions, tensor.shape)):
        own = _own_indices(tensor, dim)
        place = torch.full((tensor.shape[dim],), -1)  # where the local tensor has an index, if it has it
        place[own] = torch.arange(own.numel())
        indices.append(place[index])
    here = torch.stack(indices).ge(0).all(0)
    found = tensor.to_local().detach()[tuple(index[here] for index in indices)].cpu()
    dtype = torch.bfloat16 if found.is_floating_point() else found.dtype
    values = torch.zeros(positions.numel(), dtype=dtype)
    values[here] = found.to(dtype)
    mesh = tensor.device_mesh
    raw = values.view(torch.uint8).to(mesh.device_type)
    for mesh_dim, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            dist.all_reduce(raw, group=mesh.get_group(mesh_dim))
    return raw.view(dtype)


def _own_indices(tensor: "DTensor", dim: int) -> Tensor:
    """The indices of one dimension that the local tensor has, in its order: its part of a sharded range."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole = torch.arange(tensor.shape[dim]).view([-1 if d == dim else 1 for d in range(tensor.dim())])
    placements = [p if getattr(p, "dim", None) == dim else Replicate() for p in tensor.placements]
    own = distribute_tensor(whole, tensor.device_mesh, placements, src_data_rank=None)  # None: nothing is sent
    return own.to_local().flatten().cpu()
