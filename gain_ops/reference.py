"""The equations of a gained linear map in plain torch: the eager backend, and the truth that the kernels are tested against.

Every function works on flat activations: ``x`` [T, in], ``dy`` and ``z`` [T, out], ``weight`` [out, in] of any strides,
``delta`` [out] on the output side or [in] on the input side, ``gain = 1 + delta``. Results are contiguous. Products with
the gain and all sums run in fp32 (fp64 for fp64); what is an activation is rounded once to the activation's dtype, a
``ddelta`` stays in the accumulation dtype and its caller rounds it to delta's.

Line by line (the kernels name these):

    (1)  z      = x @ W.T
    (2)  y      = gain * z + b                        output side
    (3)  dz     = gain * dy,   dx = dz @ W
    (4)  ddelta = sum_t dy[t] * z[t]
    (5)  y      = (x * gain) @ W.T + b                input side
    (6)  dx     = gain * (dy @ W)
    (7)  ddelta = sum_t (dy @ W)[t] * x[t]

No line divides by a gain or by z, so a zero gain and an all-zero row of W have exact, finite gradients. dW is never formed.

Source: GAIN, arXiv 2604.04516 (W_new = S W); the gradients follow by the chain rule.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products with the gain and of sums: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale(x: Tensor, delta: Tensor) -> Tensor:
    """``x * gain``, line (2) without a bias: x [T, n], delta [n] -> [T, n], rounded once."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.mul(x, _gain(delta, x), out=out)


def linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Lines (1), (2): ``gain * (x @ W.T) + b`` -> [T, out]. z is rounded first, as plain torch does."""
    return _scale_and_shift(F.linear(x, weight), delta, bias)


def linear_z(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lines (1), (2), and z as well: -> y [T, out], z [T, out]."""
    z = F.linear(x, weight)
    return _scale_and_shift(z, delta, bias), z


def linear_input(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Line (5): ``(x * gain) @ W.T + b`` -> [T, out]; x * gain is rounded to x's dtype for the GEMM."""
    return F.linear(scale(x, delta), weight, None if bias is None else bias.to(x.dtype))


def backward(dy: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (3), (4) from a kept z: -> dz [T, out], ddelta [out]."""
    return scale(dy, delta), ddelta(dy, z)


def ddelta(dy: Tensor, z: Tensor) -> Tensor:
    """Line (4) alone: ``sum_t dy * z`` -> [out]."""
    return (dy.to(accumulation_dtype(dy.dtype)) * z).sum(0)


def backward_recompute(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (1), (3), (4) from a kept x: -> dz [T, out], ddelta [out]."""
    return scale(dy, delta), ddelta_recompute(dy, x, weight)


def ddelta_recompute(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Lines (1), (4): ``sum_t dy * (x @ W.T)`` -> [out]. Line (7) is this with (x, dy, W.T) in place of (dy, x, W)."""
    return ddelta(dy, F.linear(x, weight))


def backward_input(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (6), (7): -> dx [T, in], ddelta [in]."""
    dxs = torch.mm(dy, weight)
    return scale(dxs, delta), ddelta(dxs, x)


def composite(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, side: str) -> Tensor:
    """Lines (1), (2) or (5) for x of any rank, out of differentiable torch calls alone.

    What torch.func transforms, forward-mode and double backward run: all of autograd applies to it, and nothing is fused.
    """
    if side == "output":
        return _scale_and_shift(F.linear(x, weight), delta, bias)
    return F.linear(composite_scale(x, delta), weight, None if bias is None else bias.to(x.dtype))


def composite_scale(x: Tensor, delta: Tensor) -> Tensor:
    """``scale`` for x of any rank, differentiable."""
    return (x * _gain(delta, x)).to(x.dtype)


def _gain(delta: Tensor, like: Tensor) -> Tensor:
    return 1 + delta.to(accumulation_dtype(like.dtype))


def _scale_and_shift(z: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    y = z * _gain(delta, z)
    return (y if bias is None else y + bias).to(z.dtype)
