"""The equations of a gained linear map in plain torch: the eager backend, and the reference for testing the kernels.

Every function works on flat activations: ``x`` [T, in], ``dy`` and ``z`` [T, out], ``weight`` [out, in] of any strides,
``delta`` [out] on the output side or [in] on the input side, ``gain = 1 + delta``; ``gate``, ``up`` and ``dh`` [T, n].
Results are contiguous.

Products with the gain and all sums run in fp32 (fp64 for fp64). An activation is rounded once to its dtype. A ``ddelta`` stays
in the accumulation dtype, and its caller rounds it to delta's. The op that computes an activation writes it rounded, without an
fp32 copy between, so these functions are not differentiable; ``composite*``, ``ddelta``, ``ddelta_recompute``,
``rms_norm_backward``, ``add_rms_norm_backward``, ``add_layer_norm_backward``,
``rms_norm_add_backward``, ``grouped_ddelta`` and ``combine`` are.

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

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
"""The activations of an FFN; gelu_tanh is GPT-2's and Gemma's, relu2 is the square of relu."""

# how many elements a sum over tokens widens at once: 32 MiB of fp32 stay in a cache, and a GPU's launches cost little beside it
_WIDENED = 2**22


SIDES = ("output", "input")
"""Which features of a linear map a gain scales."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products with the gain and of sums: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale(x: Tensor, delta: Tensor) -> Tensor:
    """``x * gain``, line (2) without a bias: x [T, n], delta [n] -> [T, n], rounded once."""
    return _scale_into(_empty(x, *x.shape), x, delta)


def linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Lines (1), (2): ``gain * (x @ W.T) + b`` -> [T, out], in z's memory. z is rounded first, as plain torch does."""
    z = F.linear(x, weight)
    return _scale_into(z, z, delta, bias)


def linear_z(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lines (1), (2), and z as well: -> y [T, out], z [T, out]."""
    z = F.linear(x, weight)
    return _scale_into(_empty(z, *z.shape), z, delta, bias), z


def linear_input(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Line (5): ``(x * gain) @ W.T + b`` -> [T, out]; x * gain is rounded to x's dtype for the GEMM."""
    return F.linear(scale(x, delta), weight, None if bias is None else bias.to(x.dtype))


def backward(dy: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (3), (4) from a saved z: -> dz [T, out], ddelta [out]."""
    return scale(dy, delta), ddelta(dy, z)


def ddelta(dy: Tensor, z: Tensor) -> Tensor:
    """Line (4) alone: ``sum_t dy * z`` -> [out]. Many tokens are summed block by block, differentiable."""
    wide = accumulation_dtype(dy.dtype)
    if dy.numel() <= _WIDENED:
        return (dy.to(wide) * z).sum(0)
    rows = max(1, _WIDENED // dy.shape[1])
    blocks = zip(dy.split(rows), z.split(rows), strict=True)
    total: Tensor = functools.reduce(torch.add, ((some_dy.to(wide) * some_z).sum(0) for some_dy, some_z in blocks))
    return total


def backward_recompute(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (1), (3), (4) from a saved x: -> dz [T, out], ddelta [out]."""
    return scale(dy, delta), ddelta_recompute(dy, x, weight)


def ddelta_recompute(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Lines (1), (4): ``sum_t dy * (x @ W.T)`` -> [out]. Line (7) is this with (x, dy, W.T) in place of (dy, x, W)."""
    return ddelta(dy, F.linear(x, weight))


def backward_input(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (6), (7): -> dx [T, in], ddelta [in]."""
    dxs = torch.mm(dy, weight)
    return scale(dxs, delta), ddelta(dxs, x)


def glu(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> Tensor:
    """Line (8): -> h [T, n], rounded once."""
    h = activate(gate.to(accumulation_dtype(gate.dtype)), activation)
    if up is not None:
        h.mul_(up)
    return torch.mul(h, _gain(delta, gate), out=_empty(gate, *gate.shape))


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Lines (9), (10): -> dg and du side by side [T, 2n] (without up: dg [T, n]), ddelta [n]."""
    wide = gate.to(accumulation_dtype(gate.dtype))
    scaled = dh * _gain(delta, gate)
    a = activate(wide, activation)
    tokens, n = gate.shape
    out = _empty(gate, tokens, n if up is None else 2 * n)
    if up is not None:
        torch.mul(scaled, a, out=out[:, n:])
        scaled.mul_(up)
    sums = _sum_of_product(a, dh, up)
    del a
    out[:, :n].copy_(activate_backward(scaled, wide, activation))
    return out, sums


def glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Line (10) alone: -> [n]."""
    return _sum_of_product(activate(gate.to(accumulation_dtype(gate.dtype)), activation), dh, up)


def rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Line (11): -> y [T, n], rounded once, and r [T] in the accumulation dtype."""
    wide = x.to(accumulation_dtype(x.dtype))
    r = torch.rsqrt(wide.square().sum(1) / max(x.shape[1], 1) + eps)
    wide = wide * r[:, None]
    return torch.mul(wide, weight * _gain(delta, x), out=_empty(x, *x.shape)), r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (12), (13): -> dx [T, n], ddelta [n]."""
    n = x * r[:, None]
    v = dy * (weight * _gain(delta, x))
    dx = r[:, None] * (v - n * (v * n).mean(1, keepdim=True))
    return dx.to(x.dtype).contiguous(), (dy * n).sum(0) * weight.to(r.dtype)


def add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Line (14): -> h [T, n], rounded once."""
    base = residual if bias is None else residual.to(accumulation_dtype(z.dtype)) + bias
    return torch.addcmul(base, z, _gain(delta, z), out=_empty(z, *z.shape))


def add_rms_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines (14), (15): -> h [T, n], y [T, n] from the rounded h, and r [T] in the accumulation dtype."""
    h = add(residual, z, delta, bias)
    return h, *rms_norm(h, weight, torch.zeros_like(weight), eps)


def add_rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Line (16): -> dx [T, n], dz [T, n], ddelta [n]; without dh only the norm reads h."""
    n = h * r[:, None]
    v = dy * weight.to(r.dtype)
    return _through_add(r[:, None] * (v - n * (v * n).mean(1, keepdim=True)), dh, h, z, delta)


def add_layer_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lines (14), (19): -> h [T, n], y [T, n] from the rounded h, mean and r [T] in the accumulation dtype."""
    h = add(residual, z, delta, bias)
    wide = h.to(accumulation_dtype(h.dtype))
    n = max(h.shape[1], 1)
    mean = wide.sum(1) / n
    wide = wide - mean[:, None]
    r = torch.rsqrt(wide.square().sum(1) / n + eps)
    wide *= r[:, None]
    y = _empty(h, *h.shape)
    weight = weight.to(wide.dtype)
    return h, torch.mul(wide, weight, out=y) if shift is None else torch.addcmul(shift, wide, weight, out=y), mean, r


def add_layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Line (20): -> dx [T, n], dz [T, n], ddelta [n]; without dh only the norm reads h."""
    n = (h - mean[:, None]) * r[:, None]
    v = dy * weight.to(r.dtype)
    dx = r[:, None] * (v - n * (v * n).mean(1, keepdim=True) - v.mean(1, keepdim=True))
    return _through_add(dx, dh, h, z, delta)


def _through_add(dx: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The end of lines (16), (20), from the gradient of h through the norm."""
    if dh is not None:
        dx = dx + dh
    return dx.to(h.dtype).contiguous(), (dx * _gain(delta, h)).to(h.dtype).contiguous(), (dx * z).sum(0)


def rms_norm_add(residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Line (17): -> h [T, n], rounded once, and r [T] in the accumulation dtype."""
    s = z * _gain(delta, z)
    r = torch.rsqrt(s.square().sum(1) / max(z.shape[1], 1) + eps)
    s *= r[:, None]
    return torch.addcmul(residual, s, weight.to(s.dtype), out=_empty(z, *z.shape)), r


def rms_norm_add_backward(dh: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Line (18): -> dz [T, n], ddelta [n]."""
    gain = _gain(delta, z)
    n = z * gain * r[:, None]
    v = dh * weight.to(r.dtype)
    ds = r[:, None] * (v - n * (v * n).mean(1, keepdim=True))
    return (ds * gain).to(z.dtype).contiguous(), (ds * z).sum(0)


def grouped_mm(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Line (21): x [S, in], weight [E, out, in] -> [S, out]."""
    z = grouped_product(x, weight, offsets)
    of_nobody = torch.arange(x.shape[0], device=x.device) >= offsets[-1]
    z.masked_fill_(of_nobody[:, None], 0)
    if bias is not None:
        for e, rows in expert_rows(offsets):
            z[rows] += bias[e]
    return z


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Line (21) without a bias, by torch's grouped_mm where it serves the operands; rows of nobody hold anything."""
    if _has_grouped_mm(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    z = x.new_zeros(x.shape[0], weight.shape[1])
    for e, rows in expert_rows(offsets):
        torch.mm(x[rows], weight[e].t(), out=z[rows])
    return z


def grouped_scale(x: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Line (22): x [S, n], delta and bias [E, n] -> [S, n], rounded once."""
    y = x.new_zeros(x.shape)
    for e, rows in expert_rows(offsets):
        _scale_into(y[rows], x[rows], delta[e], None if bias is None else bias[e])
    return y


def grouped_backward(dy: Tensor, z: Tensor, delta: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Line (23): -> dz [S, n], ddelta [E, n]."""
    return grouped_scale(dy, delta, None, offsets), grouped_ddelta(dy, z, offsets)


def grouped_ddelta(dy: Tensor, z: Tensor, offsets: Tensor) -> Tensor:
    """Line (23)'s sums alone: -> [E, n], differentiable."""
    sums = dy.new_zeros(len(offsets), dy.shape[1], dtype=accumulation_dtype(dy.dtype))
    for e, rows in expert_rows(offsets):
        sums[e] = ddelta(dy[rows], z[rows])
    return sums


def grouped_glu(gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str) -> Tensor:
    """Line (8), delta [E, n]: -> h [S, n], rounded once."""
    h = gate.new_zeros(gate.shape)
    for e, rows in expert_rows(offsets):
        h[rows] = glu(gate[rows], _rows_of(up, rows), delta[e], activation)
    return h


def grouped_glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Lines (9), (10), delta [E, n]: -> dg and du side by side [S, 2n] (without up: dg [S, n]), ddelta [E, n]."""
    n = gate.shape[1]
    dgate_up = gate.new_zeros(gate.shape[0], n if up is None else 2 * n)
    sums = gate.new_zeros(delta.shape, dtype=accumulation_dtype(gate.dtype))
    for e, rows in expert_rows(offsets):
        dgate_up[rows], sums[e] = glu_backward(dh[rows], gate[rows], _rows_of(up, rows), delta[e], activation)
    return dgate_up, sums


def grouped_glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, offsets: Tensor, activation: str) -> Tensor:
    """Line (10) alone: -> [E, n]."""
    sums = gate.new_zeros(len(offsets), gate.shape[1], dtype=accumulation_dtype(gate.dtype))
    for e, rows in expert_rows(offsets):
        sums[e] = glu_ddelta(dh[rows], gate[rows], _rows_of(up, rows), activation)
    return sums


def combine(z: Tensor, delta: Tensor, bias: Tensor | None, weights: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Line (24): z [S, n], delta and bias [E, n], weights [T, k], order [S] -> y [T, n], rounded once."""
    gain = _gain(delta, z)
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
    gain = _gain(delta, z)
    dz, sums = z.new_zeros(z.shape), gain.new_zeros(gain.shape)
    dw = gain.new_zeros(len(order))
    for e, rows in expert_rows(offsets):
        slots, row = order[rows], z[rows]
        gradient = dy[slots // weights.shape[1]].to(gain.dtype)
        weighted = gradient * weights.flatten()[slots, None]
        torch.mul(weighted, gain[e], out=dz[rows])
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


def activate(x: Tensor, activation: str) -> Tensor:
    """``act(x)``: one of ACTIVATIONS, differentiable."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """``dy * act'(x)``, differentiable."""
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return dy * sigmoid * (1 + x * (1 - sigmoid))
    if activation == "relu2":
        return 2 * dy * F.relu(x)
    dx: Tensor = torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return dx


def composite_glu(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> Tensor:
    """``glu`` for gate and up of any rank, differentiable."""
    h = activate(gate.to(accumulation_dtype(gate.dtype)), activation)
    return ((h if up is None else h * up) * _gain(delta, gate)).to(gate.dtype)


def composite_glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """``glu_backward``, differentiable: -> (dg, du) or (dg,), ddelta."""
    wide = gate.to(accumulation_dtype(gate.dtype))
    scaled = dh * _gain(delta, gate)
    a = activate(wide, activation)
    if up is None:
        return (activate_backward(scaled, wide, activation).to(gate.dtype),), (dh * a).sum(0)
    dg = activate_backward(scaled * up, wide, activation).to(gate.dtype)
    return (dg, (scaled * a).to(gate.dtype)), (dh * a * up).sum(0)


def composite_rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float) -> Tensor:
    """``rms_norm`` for x of any rank, differentiable."""
    wide = x.to(accumulation_dtype(x.dtype))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r * (weight * _gain(delta, x))).to(x.dtype)


def composite_add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """``add`` for activations of any rank, differentiable; z may be narrower than the residual."""
    gained = z * _gain(delta, residual)
    return (residual + gained if bias is None else residual + gained + bias).to(residual.dtype)


def composite_add_rms_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` for activations of any rank, differentiable: -> h, y."""
    h = composite_add(residual, z, delta, bias)
    return h, composite_rms_norm(h, weight, torch.zeros_like(weight), eps)


def composite_add_layer_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``add_layer_norm`` for activations of any rank, differentiable: -> h, y."""
    h = composite_add(residual, z, delta, bias)
    wide = h.to(accumulation_dtype(h.dtype))
    away = wide - wide.mean(-1, keepdim=True)
    y = away * torch.rsqrt(away.square().mean(-1, keepdim=True) + eps) * weight
    return h, (y if shift is None else y + shift).to(h.dtype)


def composite_rms_norm_add(residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm_add`` for activations of any rank, differentiable; z may be narrower than the residual."""
    s = z * _gain(delta, residual)
    return (residual + s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps) * weight).to(residual.dtype)


def composite(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, side: str) -> Tensor:
    """Lines (1), (2) or (5) for x of any rank, by differentiable torch calls alone.

    torch.func transforms, forward-mode and double backward run this: all of autograd applies to it, and nothing is fused.
    """
    if side == "output":
        z = F.linear(x, weight)
        gain = _gain(delta, z)
        return (z * gain if bias is None else torch.addcmul(bias, z, gain)).to(z.dtype)
    return F.linear(composite_scale(x, delta), weight, None if bias is None else bias.to(x.dtype))


def composite_scale(x: Tensor, delta: Tensor) -> Tensor:
    """``scale`` for x of any rank, differentiable."""
    return (x * _gain(delta, x)).to(x.dtype)


def composite_grouped_scale(x: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """``grouped_scale``, differentiable."""
    gain = _gain(delta, x)

    def scaled(e: int, rows: slice) -> Tensor:
        return (x[rows] * gain[e] if bias is None else torch.addcmul(bias[e], x[rows], gain[e])).to(x.dtype)

    return _by_expert(scaled, x, x.shape[1], offsets)


def composite_grouped_glu(gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str) -> Tensor:
    """``grouped_glu``, differentiable."""

    def activated(e: int, rows: slice) -> Tensor:
        return composite_glu(gate[rows], _rows_of(up, rows), delta[e], activation)

    return _by_expert(activated, gate, gate.shape[1], offsets)


def composite_grouped(
    x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor, side: str
) -> Tensor:
    """Lines (21), (22) by differentiable torch calls alone: the output or the input side of the experts' linear maps."""
    if side == "output":
        return composite_grouped_scale(_grouped_product(x, weight, None, offsets), delta, bias, offsets)
    return _grouped_product(composite_grouped_scale(x, delta, None, offsets), weight, bias, offsets)


def _grouped_product(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """``grouped_mm``, differentiable."""

    def product(e: int, rows: slice) -> Tensor:
        z = x[rows] @ weight[e].t()
        return z if bias is None else (z + bias[e]).to(z.dtype)

    return _by_expert(product, x, weight.shape[1], offsets)


def _by_expert(part: Callable[[int, slice], Tensor], like: Tensor, n: int, offsets: Tensor) -> Tensor:
    """[S, n]: what ``part`` makes of each expert's rows, one below the other, then zeros; S and the dtype are those of like."""
    found = expert_rows(offsets)
    end = found[-1][1].stop if found else 0
    return torch.cat([*(part(e, rows) for e, rows in found), like.new_zeros(like.shape[0] - end, n)])


def _rows_of(t: Tensor | None, rows: slice) -> Tensor | None:
    return None if t is None else t[rows]


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm serves the operands: its devices, its dtypes, rows of 16 bytes."""

    def by_rows(t: Tensor) -> bool:
        step = t.stride(-2) * t.itemsize
        return t.stride(-1) == 1 and t.stride(-2) >= t.shape[-1] and (step | t.data_ptr()) % 16 == 0

    return (
        x.device.type in ("cpu", "cuda")
        and x.dtype != torch.float64
        and x.numel() * weight.numel() > 0
        and weight.shape[1] * x.itemsize % 16 == 0
        and by_rows(x)
        and (by_rows(weight) or by_rows(weight.transpose(1, 2)))
    )


def _gain(delta: Tensor, like: Tensor) -> Tensor:
    return 1 + delta.to(accumulation_dtype(like.dtype))


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _scale_into(out: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gain * z + b``, rounded once into out, which may be z."""
    gain = _gain(delta, z)
    return torch.mul(z, gain, out=out) if bias is None else torch.addcmul(bias, z, gain, out=out)


def _sum_of_product(a: Tensor, dh: Tensor, up: Tensor | None) -> Tensor:
    """``sum_t dh * a * u``; a, in the accumulation dtype, is overwritten."""
    a.mul_(dh)
    return (a if up is None else a.mul_(up)).sum(0)
