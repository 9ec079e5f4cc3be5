"""Which gains a dtype cannot hold."""

import torch
from torch import Tensor


def lost_gains(delta: Tensor, dtype: torch.dtype) -> int:
    """How many gains change no normal number of a dtype: ``delta != 0`` and ``|delta| < eps / 4``.

    Of the product with such a gain the nearest number is the one it began with. That is ``2^-9`` of bfloat16, ``2^-12`` of
    float16. Up to twice that it depends on the number.
    """
    return int(((delta != 0) & (delta.abs() < torch.finfo(dtype).eps / 4)).sum())
