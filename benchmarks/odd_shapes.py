"""Every op of every fused backend once, on shapes with partial tiles and rows of every alignment: what sanitizers watch."""

import itertools

import torch

from gain_ops import dispatch, ops

SHAPES = [(1, 8, 8), (5, 1, 1), (33, 29, 17), (129, 72, 264), (300, 520, 136), (2049, 64, 48)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main() -> None:
    """Call them; a backend that cannot run here is named and left out."""
    for backend, dtype in itertools.product(("triton", "cuda"), DTYPES):
        try:
            dispatch.implementation(backend, torch.empty(0, dtype=dtype, device="cuda"))
        except dispatch.BackendUnavailable as reason:
            print(f"left out: {reason}")
            continue
        for (t, i, o), transposed in itertools.product(SHAPES, (False, True)):
            _call(backend, dtype, t, i, o, transposed)
    torch.cuda.synchronize()


def _call(backend: str, dtype: torch.dtype, t: int, i: int, o: int, transposed: bool) -> None:
    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    x, dy, z, bias = make(t, i), make(t, o), make(t, o), make(o)
    weight = make(i, o).t() if transposed else make(o, i)
    delta_in, delta_out = torch.randn(i, device="cuda"), torch.randn(o, device="cuda")
    ops.scale(x, delta_in, backend)
    ops.linear(x, weight, delta_out, None, backend)
    ops.linear_z(x, weight, delta_out, bias, backend)
    ops.linear_input(x, weight, delta_in, bias, backend)
    ops.backward(dy, z, delta_out, backend)
    ops.ddelta(dy, z, backend)
    ops.backward_recompute(dy, x, weight, delta_out, backend)
    ops.ddelta_recompute(dy, x, weight, backend)
    ops.backward_input(dy, x, weight, delta_in, backend)
    if backend == "triton":
        from gain_ops.kernels.fused_backward import backward_dx

        backward_dx(dy, z, weight, delta_out)
        backward_dx(dy, z, weight, None)


if __name__ == "__main__":
    main()
