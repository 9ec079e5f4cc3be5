"""Which gains a dtype cannot hold."""

import torch
from torch import Tensor


def lost_gains(delta: Tensor, dtype: torch.dtype) -> int:
    """How many gains change no normal number of a dtype: ``delta != 0`` and ``|delta| < eps / 4``.

    The product with such a gain rounds to the original number. The limit is ``2^-9`` for bfloat16 and ``2^-12`` for float16.
    Up to twice the limit it depends on the number.
    """
    return int(((delta != 0) & (delta.abs() < torch.finfo(dtype).eps / 4)).sum())
