"""Host cost of a call on tiny CPU tensors, in microseconds of thread CPU time: Python and the dispatcher beside the arithmetic.

python -m benchmarks.suites.host_cost

Triton's kernels are launched by its own launcher over a driver that does nothing (harness/stand_in.py). The cases take turns
within a round, so drift and a loaded machine meet all alike; a ratio is the median over the rounds of the ratios within one.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import stand_in
from gain_ops import GainLinear
from gain_ops.backends import eager
from gain_ops.ops import raw

ROUNDS, CALLS = 25, 100
BASE = "F.linear * gain"
"""What all others are compared with."""

Cases = dict[str, Callable[[], object]]


@torch.library.custom_op("host_cost::linear_z", mutates_args=())
def _custom(x: Tensor, weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    return eager.linear_z(x, weight, delta, None)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[1], inputs[2])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None, Tensor]:
    z, weight, delta = ctx.saved_tensors
    dz, ddelta = eager.backward(dy, z, delta)
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


def eager_cases() -> Cases:
    """A layer's forward and backward in fp32 in plain torch, with the base."""
    x, dy, weight = torch.randn(2, 8, requires_grad=True), torch.ones(2, 8), torch.randn(8, 8)
    gain, delta = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    layer = _layer(torch.float32, "eager")
    grad = torch.autograd.grad
    return {
        BASE: lambda: grad(F.linear(x, weight) * gain, (x, gain), dy),
        "frozen F.linear": lambda: grad(F.linear(x, weight), (x,), dy),
        "GainLinear, eager": lambda: grad(layer(x), (x, layer.delta), dy),
        "bare Function over raw ops, eager": lambda: grad(Bare.apply(x, weight, delta), (x, delta), dy),
        "custom_op, register_autograd, eager": lambda: grad(_custom(x, weight, delta)[0], (x, delta), dy),
    }


def triton_cases() -> Cases:
    """The same by Triton in bf16, and its launches one by one: all operands of the GEMM go by TMA, as on an H100."""
    from gain_ops.kernels import linear_forward, rows

    x, dy = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(2, 8, dtype=torch.bfloat16)
    layer, keeps_input = _layer(torch.bfloat16, "triton"), _layer(torch.bfloat16, "triton", save="input")
    flat, weight, delta, y, z = x.detach(), layer.weight.detach(), layer.delta.detach(), dy.clone(), dy.clone()
    grad = torch.autograd.grad
    return {
        "GainLinear, triton": lambda: grad(layer(x), (x, layer.delta), dy),
        "GainLinear, triton, save='input'": lambda: grad(keeps_input(x), (x, keeps_input.delta), dy),
        "one launch: the GEMM that stores z": lambda: linear_forward.launch(flat, weight, delta, None, y, z),
        "two launches: the backward's pass": lambda: rows.backward(dy, z, delta),
    }


def _layer(dtype: torch.dtype, backend: str, **options: str) -> GainLinear:
    return GainLinear.from_linear(nn.Linear(8, 8, bias=False, dtype=dtype), backend=backend, **options)


def measure(cases: Cases, rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, tuple[float, float]]:
    """Microseconds a call and the ratio to BASE, which must be one of the cases: medians over the rounds."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, call in cases.items():
            start = time.thread_time()
            for _ in range(calls):
                call()
            if number:  # the first round compiles and warms up
                times[name].append((time.thread_time() - start) / calls * 1e6)
    ratios = {name: [one / base for one, base in zip(times[name], times[BASE], strict=True)] for name in cases}
    return {name: (statistics.median(times[name]), statistics.median(ratios[name])) for name in cases}


def measure_all(folder: Path) -> dict[str, tuple[float, float]]:
    """All cases, those of Triton where the driver can stand in; it is compiled in the folder."""
    torch.set_num_threads(1)
    if stand_in.obstacle():
        return measure(eager_cases())
    with stand_in.driver(folder):
        return measure(eager_cases() | triton_cases())


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        found = measure_all(Path(folder))
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"torch {torch.__version__}, one thread; forward and backward, microseconds of thread CPU time, and over the first"
    )
    for name, (microseconds, ratio) in found.items():
        print(f"{name:40s} {microseconds:7.1f} {ratio:6.2f}")
    if reason := stand_in.obstacle():
        print(f"no kernels of Triton: {reason}")


if __name__ == "__main__":
    main()
