"""What a backend offers: each op's signature, with its result, not computed, as the body."""

from typing import Protocol

import torch
from torch import Tensor

from gain_ops.reference import accumulation_dtype


def _empty(like: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _sums(like: Tensor, *shape: int | torch.SymInt) -> Tensor:
    return torch.empty(shape, dtype=accumulation_dtype(like.dtype), device=like.device)


class Gemms(Protocol):
    """The ops that are a GEMM with a gain in its epilogue, which may be composed of the vendor's GEMM and a pass as well."""

    def linear(self, x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        """y [T, out]."""
        return _empty(x, x.shape[0], weight.shape[0])

    def linear_z(self, x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and z, [T, out] each."""
        return self.linear(x, weight, delta, bias), self.linear(x, weight, delta, bias)

    def backward_recompute(self, dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """dz [T, out], ddelta [out]."""
        return _empty(dy, *dy.shape), _sums(dy, dy.shape[1])

    def ddelta_recompute(self, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """ddelta [out]."""
        return _sums(dy, dy.shape[1])

    def backward_input(self, dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """dx [T, in], ddelta [in]."""
        return _empty(x, *x.shape), _sums(x, x.shape[1])


class Backend(Gemms, Protocol):
    """The functions of reference.py by the same names, with the same results: what mypy holds every backend to.

    The body of each is its fake: empty results of the right shapes, dtypes and device, contiguous.
    """

    def scale(self, x: Tensor, delta: Tensor) -> Tensor:
        """[T, n]."""
        return _empty(x, *x.shape)

    def linear_input(self, x: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        """y [T, out]."""
        return self.linear(x, weight, delta, bias)

    def backward(self, dy: Tensor, z: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """dz [T, out], ddelta [out]."""
        return _empty(dy, *dy.shape), _sums(dy, dy.shape[1])

    def ddelta(self, dy: Tensor, z: Tensor) -> Tensor:
        """ddelta [out]."""
        return _sums(dy, dy.shape[1])

    def glu(self, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str) -> Tensor:
        """[T, n]."""
        return _empty(gate, *gate.shape)

    def glu_backward(
        self, dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, activation: str
    ) -> tuple[Tensor, Tensor]:
        """[T, 2n] (without up [T, n]), ddelta [n]."""
        t, n = gate.shape
        return _empty(gate, t, n if up is None else 2 * n), _sums(gate, n)

    def glu_ddelta(self, dh: Tensor, gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
        """ddelta [n]."""
        return _sums(gate, gate.shape[1])

    def rms_norm(self, x: Tensor, weight: Tensor, delta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """[T, n], r [T]."""
        return _empty(x, *x.shape), _sums(x, x.shape[0])

    def rms_norm_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, delta: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[T, n], ddelta [n]."""
        return _empty(x, *x.shape), _sums(x, x.shape[1])

    def add(self, residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        """[T, n]."""
        return _empty(z, *z.shape)

    def add_rms_norm(
        self, residual: Tensor, z: Tensor, delta: Tensor, bias: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h and y, [T, n] each, r [T]."""
        return _empty(z, *z.shape), _empty(z, *z.shape), _sums(z, z.shape[0])

    def add_rms_norm_backward(
        self, dy: Tensor, dh: Tensor | None, h: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx and dz, [T, n] each, ddelta [n]."""
        return _empty(h, *h.shape), _empty(h, *h.shape), _sums(h, h.shape[1])

    def add_layer_norm(
        self,
        residual: Tensor,
        z: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        shift: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """h and y, [T, n] each, mean and r, [T] each."""
        t = z.shape[0]
        return _empty(z, *z.shape), _empty(z, *z.shape), _sums(z, t), _sums(z, t)

    def add_layer_norm_backward(
        self,
        dy: Tensor,
        dh: Tensor | None,
        h: Tensor,
        z: Tensor,
        delta: Tensor,
        weight: Tensor,
        mean: Tensor,
        r: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx and dz, [T, n] each, ddelta [n]."""
        return _empty(h, *h.shape), _empty(h, *h.shape), _sums(h, h.shape[1])

    def rms_norm_add(
        self, residual: Tensor, z: Tensor, delta: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """h [T, n], r [T]."""
        return _empty(z, *z.shape), _sums(z, z.shape[0])

    def rms_norm_add_backward(
        self, dh: Tensor, z: Tensor, delta: Tensor, weight: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dz [T, n], ddelta [n]."""
        return _empty(z, *z.shape), _sums(z, z.shape[1])

    def grouped_mm(self, x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
        """[S, out]."""
        return _empty(x, x.shape[0], weight.shape[1])

    def grouped_scale(self, x: Tensor, delta: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
        """[S, n]."""
        return _empty(x, *x.shape)

    def grouped_backward(self, dy: Tensor, z: Tensor, delta: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """dz [S, n], ddelta [E, n]."""
        return _empty(dy, *dy.shape), _sums(dy, *delta.shape)

    def grouped_ddelta(self, dy: Tensor, z: Tensor, offsets: Tensor) -> Tensor:
        """ddelta [E, n]."""
        return _sums(dy, offsets.shape[0], dy.shape[1])

    def grouped_glu(self, gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str) -> Tensor:
        """[S, n]."""
        return _empty(gate, *gate.shape)

    def grouped_glu_backward(
        self, dh: Tensor, gate: Tensor, up: Tensor | None, delta: Tensor, offsets: Tensor, activation: str
    ) -> tuple[Tensor, Tensor]:
        """[S, 2n] (without up [S, n]), ddelta [E, n]."""
        s, n = gate.shape
        return _empty(gate, s, n if up is None else 2 * n), _sums(gate, *delta.shape)

    def grouped_glu_ddelta(
        self, dh: Tensor, gate: Tensor, up: Tensor | None, offsets: Tensor, activation: str
    ) -> Tensor:
        """ddelta [E, n]."""
        return _sums(gate, offsets.shape[0], gate.shape[1])

    def combine(
        self, z: Tensor, delta: Tensor, bias: Tensor | None, weights: Tensor, order: Tensor, offsets: Tensor
    ) -> Tensor:
        """y [T, n]."""
        return _empty(z, weights.shape[0], z.shape[1])

    def combine_backward(
        self,
        dy: Tensor,
        z: Tensor,
        delta: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        order: Tensor,
        offsets: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dz [S, n], ddelta [E, n], dw [T, k]."""
        return _empty(z, *z.shape), _sums(z, *delta.shape), _sums(z, *weights.shape)


class _Fakes(Backend):
    pass


FAKES = _Fakes()
GEMMS = tuple(name for name in vars(Gemms) if not name.startswith("_"))
OPS = (*GEMMS, *(name for name in vars(Backend) if not name.startswith("_")))
