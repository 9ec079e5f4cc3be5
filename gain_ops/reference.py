"""The equations of a gained linear map in differentiable plain torch: the truth for every backend, the eager one included.

Activations are flat: ``x`` [T, in], ``dy`` and ``z`` [T, out], ``weight`` [out, in] of any strides, ``delta`` [out] on the
output side or [in] on the input side, ``gain = 1 + delta``; ``gate``, ``up`` and ``dh`` [T, n]. ``scale``, ``linear``,
``linear_input``, ``glu``, ``rms_norm`` and the ``add`` functions take any rank, [..., n].

Products with the gain and all sums run in fp32 (fp64 for fp64). An activation is rounded once to its dtype. A ``ddelta`` stays
in the accumulation dtype, and its caller rounds it to delta's. torch.func transforms, forward-mode and double backward run
these functions: all of autograd applies to them, and nothing is fused. backends/eager.py computes the same in little memory.

Rows that are sorted by expert have ``offsets`` [E], the end of each expert's rows: row s belongs to expert e if
``offsets[e - 1] <= s < offsets[e]``. delta and a bias have a row an expert, and the weight is [E, out, in]. Rows past the last
end belong to nobody (expert parallelism leaves them uninitialised): they are never read, and are zero in every result.

The kernels name these lines:

    (1)  z      = x @ W.T
    (2)  y      = gain * z + b                        output side
    (3)  dz     = gain * dy,   dx = dz @ W
    (4)  ddelta = sum_t dy[t] * z[t]
    (5)  y      = (x * gain) @ W.T + b                input side
    (6)  dx     = gain * (dy @ W)
    (7)  ddelta = sum_t (dy @ W)[t] * x[t]
    (8)  h      = act(g) * u * gain                   the gain in the FFN's activation; without u: act(g) * gain
    (9)  dg     = dh * gain * u * act'(g),   du = dh * gain * act(g)
    (10) ddelta = sum_t dh[t] * act(g)[t] * u[t]
    (11) y      = r * x * w * gain,   r = 1 / sqrt(mean(x^2) + eps)       the gain in an RMSNorm of weight w
    (12) dx     = r * (v - n * mean(v * n)),   v = dy * w * gain,   n = r * x
    (13) ddelta = sum_t dy[t] * n[t] * w
    (14) h      = x + gain * z + b                 the gain on the way into a residual stream x
    (15) y      = r * h * w,   r = 1 / sqrt(mean(h^2) + eps)               and the RMSNorm that reads the stream next
    (16) dx     = dh + r * (v - n * mean(v * n)),   v = dy * w,   n = r * h;   dz = gain * dx,   ddelta = sum_t dx[t] * z[t]
    (17) h      = x + r * s * w,   s = gain * z,   r = 1 / sqrt(mean(s^2) + eps)      an RMSNorm between the gain and the add
    (18) ds     = r * (v - n * mean(v * n)),   v = dh * w,   n = r * s;   dz = gain * ds,   ddelta = sum_t ds[t] * z[t]
    (19) y      = n * w + c,   n = r * (h - mean(h)),   r = 1 / sqrt(mean((h - mean(h))^2) + eps)    line (15) of a LayerNorm
    (20) dx     = dh + r * (v - mean(v) - n * mean(v * n)),   v = dy * w;   dz and ddelta as in (16)
    (21) z      = x @ W[e].T + b[e]                row s of expert e, as in all of (21) to (25)
    (22) y      = gain[e] * z + b[e]
    (23) dz     = gain[e] * dy,   ddelta[e] = sum over the rows of e of dy[s] * z[s];   (8) to (10) likewise
    (24) y[t]   = sum_j w[t, j] * (gain[e] * z[s] + b[e])           row s is for slot order[s] = k * t + j, token t's j-th of k
    (25) dz     = w[t, j] * gain[e] * dy[t],   dw[t, j] = sum_n dy[t] * (gain[e] * z[s] + b[e]),
         ddelta[e] = sum over the rows of e of w[t, j] * dy[t] * z[s]

No line divides by a gain or by z, so a zero gain and an all-zero row of W have exact, finite gradients. dW is never formed.

Source: GAIN, arXiv 2604.04516 (W_new = S W); the gradients follow by the chain rule.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
"""The activations of an FFN; gelu_tanh is GPT-2's and Gemma's, relu2 is the square of relu."""

SIDES = ("output", "input")
"""Which features of a linear map a gain scales."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products with the gain and of sums: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gain_of(delta: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 + delta`` for activations of a dtype, in its accumulation dtype."""
    wide = accumulation_dtype(dtype)
    return 1 + (delta if delta.dtype == wide else delta.to(wide))


def scale(x: Tensor, delta: Tensor) -> Tensor:
    """``x * gain``, line (2) without a bias: x [..., n], delta [n] -> [..., n], rounded once."""
    return (x * gain_of(delta, x.dtype)).to(x.dtype)


def linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Lines (1), (2): ``gain * (x @ W.T) + b`` -> [..., out]. z is rounded first, as plain torch does."""
    return linear_z(x, weight, delta, bias)[0]


def linear_z(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lines (1), (2), and z as well: -> y [..., out], z [..., out]."""
    z = F.linear(x, weight)
    gain = gain_of(delta, z.dtype)
    return (z * gain if bias is None else torch.addcmul(bias, z, gain)).to(z.dtype), z


def linear_input(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Line (5): ``(x * gain) @ W.T + b`` -> [..., out]; x * gain is rounded to x's dtype for the GEMM."""
    return F.linear(scale(x, delta), weight, None if bias is None else bias.to(x.dtype))


BY_SIDE = {"output": linear, "input": linear_input}
"""Lines (1), (2) or line (5), by the side of the gain."""


def backward(dy: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (3), (4) from a saved z: -> dz [T, out], ddelta [out]."""
    return scale(dy, delta), ddelta(dy, z)


def ddelta(dy: Tensor, z: Tensor) -> Tensor:
    """Line (4) alone: ``sum_t dy * z`` -> [out]."""
    return (_wide(dy) * z).sum(0)


def backward_recompute(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (1), (3), (4) from a saved x: -> dz [T, out], ddelta [out]."""
    return scale(dy, delta), ddelta_recompute(dy, x, weight)


def ddelta_recompute(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Lines (1), (4): ``sum_t dy * (x @ W.T)`` -> [out]. Line (7) is this with (x, dy, W.T) in place of (dy, x, W)."""
    return ddelta(dy, F.linear(x, weight))


def backward_input(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (6), (7): -> dx [T, in], ddelta [in]."""
    return backward(dy @ weight, x, delta)


def glu(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> Tensor:
    """Line (8): -> h [..., n]."""
    h = activate(_wide(gate), activation)
    return ((h if up is None else h * up) * gain_of(delta, gate.dtype)).to(gate.dtype)


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Lines (9), (10): -> dg and du side by side [T, 2n] (without up: dg [T, n]), ddelta [n]."""
    scaled = dh * gain_of(delta, gate.dtype)
    wide = _wide(gate)
    dg = activate_backward(scaled if up is None else scaled * up, wide, activation)
    sides = [dg] if up is None else [dg, scaled * activate(wide, activation)]
    return torch.cat(sides, 1).to(gate.dtype), glu_ddelta(dh, gate, up, activation)


def glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Line (10) alone: -> [n]."""
    product = dh * activate(_wide(gate), activation)
    return (product if up is None else product * up).sum(0)


def rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Line (11): -> y [..., n], and r [...] in the accumulation dtype."""
    wide = _wide(x)
    r = inverse_rms(wide, eps)
    return (wide * r[..., None] * (weight * gain_of(delta, x.dtype))).to(x.dtype), r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (12), (13): -> dx [T, n], ddelta [n]."""
    n = x * r[:, None]
    dx = _through_norm(dy * (weight * gain_of(delta, x.dtype)), n, r)
    return dx.to(x.dtype), (dy * n).sum(0) * weight.to(r.dtype)


def add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Line (14): -> h [..., n] in residual's dtype; z may be narrower."""
    gained = z * gain_of(delta, residual.dtype)
    return (residual + gained if bias is None else residual + gained + bias).to(residual.dtype)


def add_rms_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines (14), (15): -> h [..., n], y [..., n] from the rounded h, and r [...] in the accumulation dtype."""
    h = add(residual, z, delta, bias)
    return h, *rms_norm(h, weight, torch.zeros_like(weight), eps)


def add_rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Line (16): -> dx [T, n], dz [T, n], ddelta [n]; without dh only the norm reads h."""
    return _through_add(_through_norm(dy * weight.to(r.dtype), h * r[:, None], r), dh, h, z, delta)


def add_layer_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lines (14), (19): -> h [..., n], y [..., n] from the rounded h, mean and r [...] in the accumulation dtype."""
    h = add(residual, z, delta, bias)
    wide = _wide(h)
    mean = _mean(wide)
    away = wide - mean[..., None]
    r = inverse_rms(away, eps)
    y = away * r[..., None] * weight
    return h, (y if shift is None else y + shift).to(h.dtype), mean, r


def add_layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Line (20): -> dx [T, n], dz [T, n], ddelta [n]; without dh only the norm reads h."""
    v = dy * weight.to(r.dtype)
    dx = _through_norm(v, (h - mean[:, None]) * r[:, None], r) - r[:, None] * v.mean(1, keepdim=True)
    return _through_add(dx, dh, h, z, delta)


def rms_norm_add(residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Line (17): -> h [..., n] in residual's dtype, and r [...] in the accumulation dtype; z may be narrower."""
    s = z * gain_of(delta, residual.dtype)
    r = inverse_rms(s, eps)
    return (residual + s * r[..., None] * weight).to(residual.dtype), r


def rms_norm_add_backward(dh: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Line (18): -> dz [T, n], ddelta [n]."""
    gain = gain_of(delta, z.dtype)
    ds = _through_norm(dh * weight.to(r.dtype), z * gain * r[:, None], r)
    return (ds * gain).to(z.dtype), (ds * z).sum(0)


def grouped_mm(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Line (21): x [S, in], weight [E, out, in] -> [S, out]."""

    def product(e: int, rows: slice) -> Tensor:
        z = x[rows] @ weight[e].t()
        return z if bias is None else (z + bias[e]).to(z.dtype)

    return _by_expert(product, x, weight.shape[1], offsets)


def grouped_scale(x: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Line (22): x [S, n], delta and bias [E, n] -> [S, n], rounded once."""
    gain = gain_of(delta, x.dtype)

    def scaled(e: int, rows: slice) -> Tensor:
        return (x[rows] * gain[e] if bias is None else torch.addcmul(bias[e], x[rows], gain[e])).to(x.dtype)

    return _by_expert(scaled, x, x.shape[1], offsets)


def grouped(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor, side: str) -> Tensor:
    """Lines (21), (22): the output or the input side of the experts' linear maps."""
    if side == "output":
        return grouped_scale(grouped_mm(x, weight, None, offsets), delta, bias, offsets)
    return grouped_mm(grouped_scale(x, delta, None, offsets), weight, bias, offsets)


def grouped_backward(dy: Tensor, z: Tensor, delta: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Line (23): -> dz [S, n], ddelta [E, n]."""
    return grouped_scale(dy, delta, None, offsets), grouped_ddelta(dy, z, offsets)


def grouped_ddelta(dy: Tensor, z: Tensor, offsets: Tensor) -> Tensor:
    """Line (23)'s sums alone: -> [E, n]."""
    sums = dy.new_zeros(len(offsets), dy.shape[1], dtype=accumulation_dtype(dy.dtype))
    for e, rows in expert_rows(offsets):
        sums[e] = ddelta(dy[rows], z[rows])
    return sums


def grouped_glu(gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str) -> Tensor:
    """Line (8), delta [E, n]: -> h [S, n], rounded once."""

    def activated(e: int, rows: slice) -> Tensor:
        return glu(gate[rows], rows_of(up, rows), delta[e], activation)

    return _by_expert(activated, gate, gate.shape[1], offsets)


def grouped_glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Lines (9), (10), delta [E, n]: -> dg and du side by side [S, 2n] (without up: dg [S, n]), ddelta [E, n]."""

    def back(e: int, rows: slice) -> Tensor:
        return glu_backward(dh[rows], gate[rows], rows_of(up, rows), delta[e], activation)[0]

    dgate_up = _by_expert(back, gate, gate.shape[1] * (1 if up is None else 2), offsets)
    return dgate_up, grouped_glu_ddelta(dh, gate, up, offsets, activation)


def grouped_glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, offsets: Tensor, activation: str) -> Tensor:
    """Line (10) alone: -> [E, n]."""
    sums = gate.new_zeros(len(offsets), gate.shape[1], dtype=accumulation_dtype(gate.dtype))
    for e, rows in expert_rows(offsets):
        sums[e] = glu_ddelta(dh[rows], gate[rows], rows_of(up, rows), activation)
    return sums


def combine(z: Tensor, delta: Tensor, bias: Tensor | None, weights: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Line (24): z [S, n], delta and bias [E, n], weights [T, k], order [S] -> y [T, n], rounded once."""
    gain = gain_of(delta, z.dtype)
    place = places(order).view(weights.shape)
    expert = torch.searchsorted(offsets, place.to(offsets.dtype), right=True)
    live, expert = expert < len(offsets), expert.clamp(max=len(offsets) - 1)
    y = z.new_zeros(weights.shape[0], z.shape[1], dtype=gain.dtype)
    for j in range(weights.shape[1]):
        known = live[:, j, None]
        # rows of nobody may hold NaN, which a product with zero keeps, in a gradient too
        term = torch.where(known, z[place[:, j]], 0) * gain[expert[:, j]]
        if bias is not None:
            term = term + bias[expert[:, j]]
        y = y + torch.where(known, weights[:, j, None], 0) * term
    return y.to(z.dtype)


def combine_backward(
    dy: Tensor,
    z: Tensor,
    delta: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Line (25): dy [T, n] -> dz [S, n], ddelta [E, n], dw [T, k]."""
    gain = gain_of(delta, z.dtype)
    dz, sums = z.new_zeros(z.shape), gain.new_zeros(gain.shape)
    dw = gain.new_zeros(len(order))
    for e, rows in expert_rows(offsets):
        slots, row = order[rows], z[rows]
        gradient = dy[slots // weights.shape[1]].to(gain.dtype)
        weighted = gradient * weights.flatten()[slots, None]
        dz[rows] = (weighted * gain[e]).to(dz.dtype)
        sums[e] = ddelta(weighted, row)
        dw[slots] = (gradient * (row * gain[e] if bias is None else torch.addcmul(bias[e], row, gain[e]))).sum(1)
    return dz, sums, dw.view(weights.shape)


def places(order: Tensor) -> Tensor:
    """The row of each slot, from the slot of each row; an order that is no permutation gives rows that exist."""
    return torch.zeros_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def expert_rows(offsets: Tensor) -> list[tuple[int, slice]]:
    """(e, its rows) of each expert that has rows. Of offsets without values (meta), none is known."""
    ends = [] if offsets.is_meta else offsets.tolist()
    return [(e, slice(start, end)) for e, (start, end) in enumerate(itertools.pairwise([0, *ends])) if start < end]


def rows_of(t: Tensor | None, rows: slice) -> Tensor | None:
    """The rows of a tensor, if there is one."""
    return None if t is None else t[rows]


def _by_expert(part: Callable[[int, slice], Tensor], like: Tensor, n: int, offsets: Tensor) -> Tensor:
    """[S, n]: what ``part`` makes of each expert's rows, one below the other, then zeros; S and the dtype are those of like."""
    found = expert_rows(offsets)
    end = found[-1][1].stop if found else 0
    return torch.cat([*(part(e, rows) for e, rows in found), like.new_zeros(like.shape[0] - end, n)])


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """``r = 1 / sqrt(mean(x^2) + eps)``: x [..., n] in the accumulation dtype -> [...]."""
    return torch.rsqrt(_mean(x.square()) + eps)


def activate(x: Tensor, activation: str) -> Tensor:
    """``act(x)``: one of ACTIVATIONS."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """``dy * act'(x)``."""
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return dy * sigmoid * (1 + x * (1 - sigmoid))
    if activation == "relu2":
        return 2 * dy * F.relu(x)
    dx: Tensor = torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return dx


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _mean(x: Tensor) -> Tensor:
    """Over the features; 0 where there are none."""
    return x.sum(-1) / max(x.shape[-1], 1)


def _through_norm(v: Tensor, n: Tensor, r: Tensor) -> Tensor:
    """``r * (v - n * mean(v * n))`` of rows, in the accumulation dtype."""
    return r[:, None] * (v - n * (v * n).mean(1, keepdim=True))


def _through_add(dx: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The end of lines (16), (20), from the gradient of h through the norm."""
    if dh is not None:
        dx = dx + dh
    return dx.to(h.dtype), (dx * gain_of(delta, h.dtype)).to(h.dtype), (dx * z).sum(0)
