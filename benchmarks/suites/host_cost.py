"""Host cost of a call on tiny CPU tensors, in microseconds: the time of Python and the dispatcher beside the arithmetic.

python benchmarks/suites/host_cost.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gain_ops import gain_linear, reference
from gain_ops.ops import raw

ROUNDS, CALLS = 21, 300


@torch.library.custom_op("host_cost::linear_z", mutates_args=())
def _custom(x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return reference.linear_z(x, weight, delta, None)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[1], inputs[2])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None, Tensor]:
    z, weight, delta = ctx.saved_tensors
    dz, ddelta = reference.backward(dy, z, delta)
    return dz @ weight, None, ddelta


torch.library.register_autograd("host_cost::linear_z", _backward, setup_context=_setup)


class Bare(torch.autograd.Function):
    """The minimum that saves z: the raw ops, no checks, no autocast, no choice of what is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
        """y of the output side."""
        y, z = raw.linear_z(x, weight, delta, None, "eager")
        ctx.save_for_backward(z, weight, delta)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor]:
        """dx and ddelta."""
        z, weight, delta = ctx.saved_tensors
        dz, ddelta = raw.backward(dy, z, delta, "eager")
        return dz @ weight, None, ddelta


def main() -> None:
    """Print the median and the least of each case; the cases take turns, so that drift meets all alike."""
    torch.set_num_threads(1)
    x, weight, dy = torch.randn(2, 8), torch.randn(8, 8), torch.ones(2, 8)
    delta = torch.zeros(8)
    xg, dg, gain = x.clone().requires_grad_(), delta.clone().requires_grad_(), torch.ones(8, requires_grad=True)
    cases: dict[str, Callable[[], object]] = {
        "inference: F.linear": lambda: F.linear(x, weight),
        "inference: reference.linear": lambda: reference.linear(x, weight, delta, None),
        "inference: raw op": lambda: raw.linear(x, weight, delta, None, "auto"),
        "inference: gain_linear": lambda: gain_linear(x, weight, delta),
        "fwd+bwd: F.linear * gain": lambda: torch.autograd.grad(F.linear(xg, weight) * gain, (xg, gain), dy),
        "fwd+bwd: bare Function over raw ops": lambda: torch.autograd.grad(Bare.apply(xg, weight, dg), (xg, dg), dy),
        "fwd+bwd: custom_op + register_autograd": lambda: torch.autograd.grad(_custom(xg, weight, dg)[0], (xg, dg), dy),
        "fwd+bwd: gain_linear": lambda: torch.autograd.grad(gain_linear(xg, weight, dg), (xg, dg), dy),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for call in cases.values():
        for _ in range(CALLS):
            call()
    for _ in range(ROUNDS):
        for name, call in cases.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    print(f"torch {torch.__version__}, one thread; microseconds a call")
    for name, values in times.items():
        print(f"{name:40s} median {statistics.median(values):6.1f}   least {min(values):6.1f}")


if __name__ == "__main__":
    main()
