"""Every op of every fused backend once, on shapes with partial tiles and rows of every alignment, for the sanitizers."""

import itertools

import torch

from gain_ops.backends.interface import OPS
from gain_ops.ops import dispatch, raw
from gain_ops.testing import ARGUMENTS, tensors

# the last two reach the shipped large tiles, with an odd number of tile rows and a last tile of 8 columns
SHAPES = [(1, 8, 8), (5, 1, 1), (33, 29, 17), (129, 72, 264), (300, 520, 136), (2049, 64, 48)]
SHAPES += [(4097, 72, 2312), (769, 2312, 2312)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main(device: torch.device) -> None:
    """Call all ops; a backend that cannot run here is named and skipped."""
    for backend, dtype in itertools.product(("triton", "cuda"), DTYPES):
        try:
            dispatch.implementation(backend, torch.empty(0, dtype=dtype, device=device))
        except dispatch.BackendUnavailable as reason:
            print(f"left out: {reason}")
            continue
        for (t, i, o), transposed in itertools.product(SHAPES, (False, True)):
            call(backend, dtype, device, t, i, o, transposed)
    if device.type == "cuda":
        torch.cuda.synchronize()


def call(backend: str, dtype: torch.dtype, device: torch.device, t: int, i: int, o: int, transposed: bool) -> None:
    """Every op at one shape; with W transposed also with a bias."""
    given = tensors(t, i, o, dtype, device)
    if transposed:
        given["weight"] = given["weight"].t().contiguous().t()
    else:
        given["bias"] = None
    for name in OPS:
        getattr(raw, name)(*(given[argument] for argument in ARGUMENTS[name]), backend)
    if backend == "triton":
        from benchmarks.experiments.fused_backward import backward_dx

        for delta in (given["delta_out"], None):
            backward_dx(given["dy"], given["z"], given["weight"], delta)


if __name__ == "__main__":
    main(torch.device("cuda"))
