"""The eager backend: the functions of reference.py in plain torch, on every device and in little memory.

A pass walks its rows in chunks: a chunk of every tensor, widened to the accumulation dtype where it is narrower, stays in a
CPU's cache from the first call on it to the last. So a pass reads each operand from memory once, writes each result once,
straight into its place, and beside its results needs some chunks. Chunks follow from the sizes alone, and their sums over rows
are added in a fixed order. benchmarks/NOTES.md has the counts.

These functions write into what they have made, so they are not differentiable; reference.py's are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gain_ops import reference
from gain_ops.backends.operands import grouped_product
from gain_ops.reference import accumulation_dtype, expert_rows, gain_of, rows_of

# gathers, which no chunk of rows helps
from gain_ops.reference import combine as combine
from gain_ops.reference import combine_backward as combine_backward

# how many elements of each tensor make a chunk: on a CPU 1 MiB in fp32, a share for eight threads; elsewhere fewer launches
_CACHED, _LAUNCHED = 2**18, 2**22


def scale(x: Tensor, delta: Tensor) -> Tensor:
    """``x * gain``, line (2) without a bias: x [T, n], delta [n] -> [T, n], rounded once."""
    return _scaled(x, delta, None, _empty(x))


def linear(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Lines (1), (2): ``gain * (x @ W.T) + b`` -> [T, out], in z's memory. z is rounded first, as plain torch does."""
    z = F.linear(x, weight)
    return _scaled(z, delta, bias, z)


def linear_z(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lines (1), (2), and z as well: -> y [T, out], z [T, out]."""
    z = F.linear(x, weight)
    return _scaled(z, delta, bias, None), z


def linear_input(x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Line (5): ``(x * gain) @ W.T + b`` -> [T, out]; x * gain is rounded to x's dtype for the GEMM."""
    return F.linear(scale(x, delta), weight, None if bias is None else bias.to(x.dtype))


def backward(dy: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (3), (4) from a saved z: -> dz [T, out], ddelta [out]."""
    gain = gain_of(delta, dy.dtype)
    if dy.numel() <= _CACHED and dy.dtype == gain.dtype and dy.is_contiguous():
        return dy * gain, (dy * z).sum(0)  # one chunk: the same lines, and two fifths of the host's time
    dz, sums = _empty(dy), _Sums()
    for _, (dy_, z_, dz_, product) in _walk([dy, z], [dz], 1):
        torch.mul(dy_, z_, out=product)
        sums.add(product.sum(0))
        torch.mul(dy_, gain, out=dz_)
    return dz, sums.total()


def ddelta(dy: Tensor, z: Tensor) -> Tensor:
    """Line (4) alone: ``sum_t dy * z`` -> [out]."""
    sums = _Sums()
    for _, (dy_, z_, product) in _walk([dy, z], [], 1):
        torch.mul(dy_, z_, out=product)
        sums.add(product.sum(0))
    return sums.total()


def backward_recompute(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (1), (3), (4) from a saved x: -> dz [T, out], ddelta [out]."""
    return backward(dy, F.linear(x, weight), delta)


def ddelta_recompute(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Lines (1), (4): ``sum_t dy * (x @ W.T)`` -> [out]. Line (7) is this with (x, dy, W.T) in place of (dy, x, W)."""
    return ddelta(dy, F.linear(x, weight))


def backward_input(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (6), (7): -> dx [T, in], ddelta [in]."""
    return backward(torch.mm(dy, weight), x, delta)


def glu(gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> Tensor:
    """Line (8): -> h [T, n], rounded once."""
    gain, h = gain_of(delta, gate.dtype), _empty(gate)
    for _, (gate_, up_, h_) in _walk([gate, up], [h]):
        _activate(gate_, activation, h_)
        if up is not None:
            h_.mul_(up_)
        h_.mul_(gain)
    return h


def glu_backward(dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Lines (9), (10): -> dg and du side by side [T, 2n] (without up: dg [T, n]), ddelta [n]."""
    gain, sums = gain_of(delta, gate.dtype), _Sums()
    tokens, n = gate.shape
    out = torch.empty((tokens, n if up is None else 2 * n), dtype=gate.dtype, device=gate.device)
    du = None if up is None else out[:, n:]
    for _, (dh_, gate_, up_, dg_, du_, a, inner) in _walk([dh, gate, up], [out[:, :n], du], 2):
        _activate(gate_, activation, a, inner)
        torch.mul(dh_, gain, out=dg_)
        if up is not None:
            torch.mul(dg_, a, out=du_)
            dg_.mul_(up_)
        _times_slope(dg_, gate_, activation, a, inner)
        a.mul_(dh_)
        sums.add((a if up is None else a.mul_(up_)).sum(0))
    return out, sums.total()


def glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """Line (10) alone: -> [n]."""
    sums = _Sums()
    for _, (dh_, gate_, up_, a, inner) in _walk([dh, gate, up], [], 2):
        _activate(gate_, activation, a, inner)  # as glu_backward does: the same bits, whoever asks
        a.mul_(dh_)
        sums.add((a if up is None else a.mul_(up_)).sum(0))
    return sums.total()


def rms_norm(x: Tensor, weight: Tensor, delta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Line (11): -> y [T, n], rounded once, and r [T] in the accumulation dtype."""
    scale, y, r = weight * gain_of(delta, x.dtype), _empty(x), _per_row(x)
    for rows, (x_, y_) in _walk([x], [y]):
        _normalise_into(y_, x_, scale, r[rows], eps)
    return y, r


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Lines (12), (13): -> dx [T, n], ddelta [n]."""
    scale, dx = weight * gain_of(delta, x.dtype), _empty(x)
    sums, shares = _Sums(), _shares(r, x)
    for rows, (dy_, x_, dx_) in _walk([dy, x], [dx]):
        torch.mul(dy_, x_, out=dx_)
        sums.add(torch.mv(dx_.t(), r[rows]))
        along = _along(dx_, scale, r[rows], shares[rows])
        torch.mul(dy_, scale, out=dx_).addcmul_(x_, along).mul_(r[rows, None])
    return dx, sums.total().mul_(weight)


def add(residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
    """Line (14): -> h [T, n], rounded once."""
    gain, h = gain_of(delta, z.dtype), _empty(z)
    for _, (residual_, z_, h_) in _walk([residual, z], [h]):
        _add_into(h_, residual_, z_, gain, bias)
    return h


def add_rms_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Lines (14), (15): -> h [T, n], y [T, n] from the rounded h, and r [T] in the accumulation dtype."""
    gain, h, y, r = gain_of(delta, z.dtype), _empty(z), _empty(z), _per_row(z)
    weight = weight.to(r.dtype)
    for rows, (residual_, z_, h_, y_) in _walk([residual, z], [h, y]):
        _round(_add_into(h_, residual_, z_, gain, bias), h.dtype)
        _normalise_into(y_, h_, weight, r[rows], eps)
    return h, y, r


def add_rms_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Line (16): -> dx [T, n], dz [T, n], ddelta [n]; without dh only the norm reads h."""
    gain, dx, dz, sums, weight = gain_of(delta, h.dtype), _empty(h), _empty(h), _Sums(), weight.to(r.dtype)
    shares = _shares(r, h)
    for rows, (dy_, dh_, h_, z_, dx_, dz_) in _walk([dy, dh, h, z], [dx, dz]):
        torch.mul(dy_, h_, out=dz_)
        along = _along(dz_, weight, r[rows], shares[rows])
        torch.mul(dy_, weight, out=dx_).addcmul_(h_, along)
        _through_add(dx_, dh_, r[rows, None])
        sums.add(torch.mul(dx_, z_, out=dz_).sum(0))
        torch.mul(dx_, gain, out=dz_)
    return dx, dz, sums.total()


def add_layer_norm(
    residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lines (14), (19): -> h [T, n], y [T, n] from the rounded h, mean and r [T] in the accumulation dtype."""
    if not z.numel():
        return reference.add_layer_norm(
            residual, z, delta, bias, weight, shift, eps
        )  # to torch no features have no mean
    gain, h, y, mean, r = gain_of(delta, z.dtype), _empty(z), _empty(z), _per_row(z), _per_row(z)
    weight, shift = weight.to(r.dtype), None if shift is None else shift.to(r.dtype)
    for rows, (residual_, z_, h_, y_) in _walk([residual, z], [h, y]):
        _round(_add_into(h_, residual_, z_, gain, bias), h.dtype)
        torch.ops.aten.native_layer_norm.out(
            h_, h.shape[1:], weight, shift, eps, out0=y_, out1=mean[rows, None], out2=r[rows, None]
        )
    return h, y, mean, r


def add_layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Line (20): -> dx [T, n], dz [T, n], ddelta [n]; without dh only the norm reads h."""
    gain, dx, dz, sums, weight = gain_of(delta, h.dtype), _empty(h), _empty(h), _Sums(), weight.to(r.dtype)
    shares = _shares(r, h)
    for rows, (dy_, dh_, h_, z_, dx_, dz_) in _walk([dy, dh, h, z], [dx, dz]):
        torch.sub(h_, mean[rows, None], out=dx_)
        torch.mul(dy_, dx_, out=dz_)
        along = _along(dz_, weight, r[rows], shares[rows])
        torch.addcmul(torch.mul(dy_, weight, out=dz_), dx_, along, out=dx_)
        dx_.sub_(dz_.mean(1, keepdim=True))
        _through_add(dx_, dh_, r[rows, None])
        sums.add(torch.mul(dx_, z_, out=dz_).sum(0))
        torch.mul(dx_, gain, out=dz_)
    return dx, dz, sums.total()


def rms_norm_add(residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Line (17): -> h [T, n], rounded once, and r [T] in the accumulation dtype."""
    gain, h, r = gain_of(delta, z.dtype), _empty(z), _per_row(z)
    weight = weight.to(r.dtype)
    for rows, (residual_, z_, h_, square) in _walk([residual, z], [h], 1):
        torch.mul(z_, gain, out=h_)
        _inverse_rms(torch.mul(h_, h_, out=square), r[rows], eps)
        torch.addcmul(residual_, h_.mul_(r[rows, None]), weight, out=h_)
    return h, r


def rms_norm_add_backward(dh: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Line (18): -> dz [T, n], ddelta [n]."""
    gain, dz, sums = gain_of(delta, z.dtype), _empty(z), _Sums()
    weight, shares = weight.to(r.dtype), _shares(r, z)
    scale = weight * gain
    for rows, (dh_, z_, dz_, s) in _walk([dh, z], [dz], 1):
        along = _along(torch.mul(dh_, z_, out=dz_), scale, r[rows], shares[rows])
        torch.mul(z_, gain, out=s)
        torch.mul(dh_, weight, out=dz_).addcmul_(s, along).mul_(r[rows, None])
        sums.add(torch.mul(dz_, z_, out=s).sum(0))
        dz_.mul_(gain)
    return dz, sums.total()


def grouped_mm(x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Line (21): x [S, in], weight [E, out, in] -> [S, out]."""
    z = grouped_product(x, weight, offsets)
    of_nobody = torch.arange(x.shape[0], device=x.device) >= offsets[-1]
    z.masked_fill_(of_nobody[:, None], 0)
    if bias is not None:
        for e, rows in expert_rows(offsets):
            z[rows] += bias[e]
    return z


def grouped_scale(x: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Line (22): x [S, n], delta and bias [E, n] -> [S, n], rounded once."""
    y = x.new_zeros(x.shape)
    for e, rows in expert_rows(offsets):
        _scaled(x[rows], delta[e], None if bias is None else bias[e], y[rows])
    return y


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
    h = gate.new_zeros(gate.shape)
    for e, rows in expert_rows(offsets):
        h[rows] = glu(gate[rows], rows_of(up, rows), delta[e], activation)
    return h


def grouped_glu_backward(
    dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Lines (9), (10), delta [E, n]: -> dg and du side by side [S, 2n] (without up: dg [S, n]), ddelta [E, n]."""
    n = gate.shape[1]
    dgate_up = gate.new_zeros(gate.shape[0], n if up is None else 2 * n)
    sums = gate.new_zeros(delta.shape, dtype=accumulation_dtype(gate.dtype))
    for e, rows in expert_rows(offsets):
        dgate_up[rows], sums[e] = glu_backward(dh[rows], gate[rows], rows_of(up, rows), delta[e], activation)
    return dgate_up, sums


def grouped_glu_ddelta(dh: Tensor, gate: Tensor, up: Tensor | None, offsets: Tensor, activation: str) -> Tensor:
    """Line (10) alone: -> [E, n]."""
    sums = gate.new_zeros(len(offsets), gate.shape[1], dtype=accumulation_dtype(gate.dtype))
    for e, rows in expert_rows(offsets):
        sums[e] = glu_ddelta(dh[rows], gate[rows], rows_of(up, rows), activation)
    return sums


def _walk(
    reads: Sequence[Tensor | None], writes: Sequence[Tensor | None], spare: int = 0
) -> Iterator[tuple[slice, list[Any]]]:
    """Chunks of rows, as a slice, and of every tensor [T, n] in the accumulation dtype, with some to write on.

    What is narrower is widened into a workspace before, and rounded into its place after. None stays None.
    """
    like = reads[0]
    assert like is not None
    tokens, n = like.shape
    wide = accumulation_dtype(like.dtype)
    narrow = like.dtype != wide
    size = _CACHED if like.device.type in ("cpu", "meta") else _LAUNCHED
    given = (*reads, *writes)
    if not narrow and tokens * n <= size:  # the loop below would do the same, and costs the host more
        yield slice(None), [*given, *(_empty(like) for _ in range(spare))]
        return
    step = max(1, min(tokens, size // max(n, 1)))
    own = [
        None if whole is None else torch.empty((step, n), dtype=wide, device=like.device)
        for whole in (*(given if narrow else ()), *(like,) * spare)
    ]
    for start in range(0, max(tokens, 1), step):
        rows = slice(start, start + step)
        parts = [None if whole is None else whole[rows] for whole in given]
        work = own if start + step <= tokens else [None if space is None else space[: tokens - start] for space in own]
        if not narrow:
            yield rows, [*parts, *work]
            continue
        for part, space in zip(parts[: len(reads)], work, strict=False):
            if part is not None and space is not None:
                space.copy_(part)
        yield rows, work
        for part, space in zip(parts[len(reads) :], work[len(reads) :], strict=False):
            if part is not None and space is not None:
                part.copy_(space)


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _per_row(like: Tensor) -> Tensor:
    return torch.empty(like.shape[:1], dtype=accumulation_dtype(like.dtype), device=like.device)


class _Sums:
    """The sum of the chunks' sums, added in pairs as a counter carries: rounding grows with the logarithm of their number."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._count = 0

    def add(self, part: Tensor) -> None:
        """Add one chunk's, which is overwritten."""
        self._count += 1
        carried = self._count
        while carried % 2 == 0:
            part = self._parts.pop().add_(part)
            carried //= 2
        self._parts.append(part)

    def total(self) -> Tensor:
        """Of all chunks, one at least."""
        total = self._parts.pop()
        while self._parts:
            total = self._parts.pop().add_(total)
        return total


def _scaled(z: Tensor, delta: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``gain * z + b``, rounded once into out, which may be z, or like a contiguous z."""
    gain = gain_of(delta, z.dtype)
    if out is None:
        if bias is None and z.dtype == gain.dtype:
            return z * gain
        out = _empty(z)
    if z.dtype == gain.dtype or z.device.type not in ("cpu", "meta"):
        return torch.mul(z, gain, out=out) if bias is None else torch.addcmul(bias, z, gain, out=out)
    # on a CPU a product of two dtypes makes wide copies of all that it is given
    rows = max(1, _CACHED // max(z.shape[1], 1))
    for z_, out_ in zip(z.split(rows), out.split(rows), strict=True):
        if bias is None:
            torch.mul(z_, gain, out=out_)
        else:
            torch.addcmul(bias, z_, gain, out=out_)
    return out


def _add_into(h: Tensor, residual: Tensor, z: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    torch.addcmul(residual, z, gain, out=h)
    return h if bias is None else h.add_(bias)


def _round(wide: Tensor, dtype: torch.dtype) -> None:
    """To the values of a narrower dtype, in place."""
    if wide.dtype != dtype:
        wide.copy_(wide.to(dtype))


def _inverse_rms(square: Tensor, r: Tensor, eps: float) -> None:
    """``1 / sqrt(mean(square) + eps)`` of each row, into r."""
    torch.sum(square, 1, out=r).div_(max(square.shape[1], 1)).add_(eps).rsqrt_()


def _normalise_into(y: Tensor, x: Tensor, scale: Tensor, r: Tensor, eps: float) -> None:
    """``y = r * x * scale``, with r written too."""
    _inverse_rms(torch.mul(x, x, out=y), r, eps)
    torch.mul(x, r[:, None], out=y).mul_(scale)


def _shares(r: Tensor, x: Tensor) -> Tensor:
    """``-r / n``: what _along multiplies by."""
    return r / -max(x.shape[1], 1)


def _along(product: Tensor, scale: Tensor, r: Tensor, share: Tensor) -> Tensor:
    """``-r^2 mean(v x)`` of rows, as [T, 1], from dy * x and v = dy * scale: what a norm's backward adds of x, times r."""
    return torch.mv(product, scale).mul_(r).mul_(share)[:, None]


def _through_add(dx: Tensor, dh: Tensor | None, r: Tensor) -> None:
    """``dh + r * dx``, in place: the start of lines (16), (20) after the norm's part."""
    if dh is None:
        dx.mul_(r)
    else:
        torch.addcmul(dh, dx, r, out=dx)


def _activate(x: Tensor, activation: str, out: Tensor, inner: Tensor | None = None) -> None:
    """``act(x)`` into out; into inner, if given, what _times_slope needs beside it."""
    if activation == "silu" and inner is None:
        torch.ops.aten.silu.out(x, out=out)
    elif activation == "silu":
        torch.mul(x, torch.sigmoid(x, out=inner), out=out)
    elif activation == "relu2":
        inner = torch.clamp_min(x, 0, out=out if inner is None else inner)
        torch.mul(inner, inner, out=out)
    else:
        torch.ops.aten.gelu.out(x, approximate=_approximate(activation), out=out)


def _times_slope(dy: Tensor, x: Tensor, activation: str, a: Tensor, inner: Tensor) -> None:
    """``dy * act'(x)`` in place; a and inner are as _activate leaves them, and inner is overwritten."""
    if activation == "silu":
        # sigmoid * (1 + x * (1 - sigmoid)) = a + sigmoid * (1 - a)
        dy.mul_(torch.lerp(a, torch.ones((), dtype=a.dtype, device=a.device), inner, out=inner))
    elif activation == "relu2":
        dy.mul_(inner).mul_(2)
    else:
        torch.ops.aten.gelu_backward.grad_input(dy, x, approximate=_approximate(activation), grad_input=dy)


def _approximate(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"
