"""The roofline: the least time of a computation, from its flops and bytes and from two ceilings of the device.

Bytes and flops are those of kernels/README.md and csrc/README.md, with e bytes an element: each operand is read once and each
result written once. A computation is a tuple of kernels that run one after the other; its floor is the sum of theirs.

    gemm(T, in, out)  =  2 T in out flops,  e (T in + in out + T out) bytes
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import torch

from benchmarks.harness.results import Row
from gain_ops.backends.interface import FAKES
from gain_ops.testing import ARGUMENTS, tensors

CHUNK = 128  # rows of a partial sum of ddelta: a tile of the GEMMs, a chunk of the one-pass kernels


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Flop/s of a large matrix product by dtype, and bytes/s of a device copy, read and written.

    caveat: what a reader of a floor must know, empty for what was measured on the same device.
    """

    flops: Mapping[torch.dtype, float]
    bytes: float
    caveat: str = ""


ASSUMED_H100 = Ceilings(
    {torch.bfloat16: 790e12, torch.float16: 790e12, torch.float32: 60e12},
    3.0e12,
    "floor of an H100 by assumption: 790e12 flop/s in 16 bits, 60e12 in fp32, 3.0e12 B/s",
)


def assumed(device: torch.device) -> Ceilings | None:
    """What is assumed of a device as long as nothing was measured: an H100's ceilings of a GPU, nothing of a CPU."""
    return ASSUMED_H100 if device.type == "cuda" else None


def measured(rows: Iterable[Row]) -> Ceilings | None:
    """The ceilings that benchmarks/suites/ceilings.py measured, from its rows; None where there is no ``copy`` among them."""
    found = [(row, row.median) for row in rows if row.group == "ceiling" and row.median is not None]
    copies = [rate for row, rate in found if row.metric == "copy"]
    flops = {getattr(torch, row.dtype): rate for row, rate in found if row.metric == "matmul"}
    return Ceilings(flops, copies[-1]) if copies else None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kernel does; products: by the matrix units, otherwise at fp32's rate."""

    flops: float
    bytes: float
    products: bool = True


Kernels = tuple[Kernel, ...]


def floor_us(kernels: Kernels, dtype: torch.dtype, ceilings: Ceilings | None) -> float | None:
    """``sum over kernels of max(flops / ceiling, bytes / ceiling)`` in microseconds; None where a ceiling is not known."""
    if ceilings is None or any(d not in ceilings.flops for d in (dtype, torch.float32)):
        return None
    rates = {True: ceilings.flops[dtype], False: ceilings.flops[torch.float32]}
    return 1e6 * sum(max(k.flops / rates[k.products], k.bytes / ceilings.bytes) for k in kernels)


def gemm(t: int, i: int, o: int, e: int, *, extra: float = 0) -> Kernel:
    """``2 T in out`` flops, ``e (T in + in out + T out) + extra`` bytes."""
    return Kernel(2 * t * i * o, e * (t * i + i * o + t * o) + extra)


def frozen_forward(t: int, i: int, o: int, e: int) -> Kernels:
    """``y = x W^T``: one GEMM."""
    return (gemm(t, i, o, e),)


def frozen_backward(t: int, i: int, o: int, e: int) -> Kernels:
    """``dx = dy W``: one GEMM; W is frozen, there is no dW."""
    return (gemm(t, o, i, e),)


def gained_forward(t: int, i: int, o: int, e: int, *, keep_z: bool) -> Kernels:
    """``y = gain * (x W^T)``: one GEMM, and e T out more bytes where z is stored."""
    return (gemm(t, i, o, e, extra=e * t * o * keep_z),)


def one_pass_backward(t: int, o: int, e: int) -> Kernels:
    """``dz = gain * dy, ddelta = sum_t dy z``: 3 T out flops, 3 e T out + 4 ceil(T / 128) out bytes, and the partials' sum."""
    return (Kernel(3 * t * o, 3 * e * t * o + _partials(t, o), False), _second_stage(t, o))


def recompute(t: int, i: int, o: int, e: int) -> Kernels:
    """``z = x W^T, dz = gain * dy, ddelta = sum_t dy z``: a GEMM that also reads dy, e T out + 4 ceil(T / 128) out bytes."""
    return (gemm(t, i, o, e, extra=e * t * o + _partials(t, o)), _second_stage(t, o))


def input_forward(t: int, i: int, o: int, e: int) -> Kernels:
    """``y = (x * gain) W^T``: a pass over the smaller of x and W, 2 e min(T in, in out) bytes, then one GEMM."""
    smaller = i * min(t, o)
    return (Kernel(smaller, 2 * e * smaller, False), gemm(t, i, o, e))


def input_backward(t: int, i: int, o: int, e: int) -> Kernels:
    """``dx = gain * (dy W), ddelta = sum_t (dy W) x``: a GEMM that also reads x, e T in + 4 ceil(T / 128) in bytes."""
    return (gemm(t, o, i, e, extra=e * t * i + _partials(t, i)), _second_stage(t, i))


def frozen_layer(t: int, i: int, o: int, e: int) -> dict[str, Kernels]:
    """Forward and backward of the frozen linear."""
    return _with_both(frozen_forward(t, i, o, e), frozen_backward(t, i, o, e))


def gained_layer(side: str, save: str, t: int, i: int, o: int, e: int) -> dict[str, Kernels]:
    """Forward and backward of a layer with a gain, by GainLinear's ``side`` and ``save``."""
    if side == "input":
        return _with_both(input_forward(t, i, o, e), input_backward(t, i, o, e))
    keep_z = save != "input"
    ddelta_and_dz = one_pass_backward(t, o, e) if keep_z else recompute(t, i, o, e)
    return _with_both(gained_forward(t, i, o, e, keep_z=keep_z), ddelta_and_dz + frozen_backward(t, i, o, e))


def op(name: str, t: int, i: int, o: int, dtype: torch.dtype) -> Kernels:
    """The kernels of a raw op of gain_ops.ops.raw, or of a plain product, by its name.

    The bytes are those of its arguments and results, and 4 ceil(T / 128) n of partial sums; an op with a weight is a product.

    Raises:
        KeyError: no such op.

    """
    e = dtype.itemsize
    if name in _BY_NAME:
        return _BY_NAME[name](t, i, o, e)
    given = tensors(t, i, o, dtype, "meta", torch.empty)
    arguments = [given[argument] for argument in ARGUMENTS[name]]
    results = getattr(FAKES, name)(*arguments)
    moved = [*arguments, *(results if isinstance(results, tuple) else (results,))]
    bytes_ = sum(tensor.nbytes for tensor in moved if isinstance(tensor, torch.Tensor))
    product = "weight" in ARGUMENTS[name]
    flops = 2 * t * i * o if product else 0
    if "backward" not in name and "ddelta" not in name:
        return (Kernel(flops, bytes_, product),)
    n = i if "delta_in" in ARGUMENTS[name] else o
    return (Kernel(flops, bytes_ + _partials(t, n), product), _second_stage(t, n))


_BY_NAME: dict[str, Callable[[int, int, int, int], Kernels]] = {
    "linear_input": input_forward,
    "x @ W.T": frozen_forward,
    "dy @ W": frozen_backward,
}


def _with_both(forward: Kernels, backward: Kernels) -> dict[str, Kernels]:
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}


def _partials(t: int, n: int) -> int:
    """Bytes of the partial sums: ``4 ceil(T / 128) n``, written once."""
    return 4 * math.ceil(t / CHUNK) * n


def _second_stage(t: int, n: int) -> Kernel:
    """The partials' sum: ``ceil(T / 128) n`` flops, ``4 ceil(T / 128) n`` bytes read."""
    return Kernel(math.ceil(t / CHUNK) * n, _partials(t, n), False)
