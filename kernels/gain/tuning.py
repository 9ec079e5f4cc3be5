"""Opt-in tuning of the GEMM kernels: time candidates once, and write the winner to a JSON table that later runs read.

Nothing is timed unless ``tune`` is called (or ``python -m gain_ops.kernels.tuning --tokens 8192 --out-features 4096
--in-features 4096``). tables.py has the path of the table and its use.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

from gain_ops.kernels.config import GemmConfig
from gain_ops.kernels.tables import Device, entry_key, heuristic, read_table, table_path, write_table

_log = logging.getLogger("gain_ops")

LEADERS = 3  # how many of the fastest are tried in other orders of tiles
SHARED_MEMORY = 232_448  # the most bytes of a block on chips with TMA


def tune(
    kernel: str,
    run: Callable[[GemmConfig], Tensor],
    a: Tensor,
    weight: Tensor,
    *,
    timer: Callable[[Callable[[], Any]], float] | None = None,
    path: Path | None = None,
) -> GemmConfig:
    """Time the candidates for one problem, the fastest also in other orders of tiles, and write the winner to the table.

    Args:
        kernel: "linear", or "linear_backward" with its output: "linear_backward c", "linear_backward acc".
        run: launches the kernel with a configuration and returns its result.
        a, weight: [M, K] and [N, K], the problem.
        timer: seconds (or any unit) of one call; by default ``triton.testing.do_bench``.
        path: the table; by default the one that ``gemm_config`` reads.

    Returns:
        The winner. A candidate is left out if it does not compile, does not fit the device, or differs from the heuristic's
        pick by more than the dtype's rounding.

    """
    timer = timer or functools.partial(triton.testing.do_bench, warmup=5, rep=25, return_mode="median")
    device = Device.of(a)
    path = table_path(device) if path is None else path
    first = heuristic(device, a.shape[0], weight.shape[0])
    truth = run(first).clone()
    tolerance = 4 * torch.finfo(a.dtype).eps
    timings: dict[GemmConfig, float] = {}

    def race(configs: Sequence[GemmConfig]) -> None:
        for config in configs:
            try:
                result = run(config)
            except Exception as error:  # a compiler's refusal has no common type across Triton's versions
                _log.info("tuning %s: %s left out: %s", kernel, config, str(error).splitlines()[:1])
                continue
            if _relative_error(result, truth) <= tolerance:
                timings[config] = timer(functools.partial(run, config))

    found = candidates(first)
    _compile_at_once(run, found)
    race(found)
    leaders = sorted(timings, key=timings.__getitem__)[:LEADERS]
    race([replace(config, group_m=group) for config in leaders for group in (1, 4, 8, 16) if group != first.group_m])
    winner = min(timings, key=timings.__getitem__)
    key = entry_key(kernel, a.dtype, a.shape[0], *weight.shape)
    write_table(path, device, read_table(path, device, logging.WARNING) | {key: winner})
    return winner


def candidates(first: GemmConfig) -> list[GemmConfig]:
    """The candidates: the heuristic's pick and its neighbours in tile, stages and subtiles, if they can run.

    A tile of 128 x 256 elements in one piece spills, or does not fit (benchmarks/NOTES.md).
    """
    tiles = {(first.block_m, first.block_n), (128, 256), (128, 128), (256, 128), (64, 256), (64, 128)}
    found = [
        replace(first, block_m=m, block_n=n, num_stages=stages, subtiles=subtiles)
        for m, n in sorted(tiles)
        for stages in sorted({first.num_stages, 3, 4, 5})
        for subtiles in (1, 2)
        if m * n < 128 * 256 or subtiles == 2
    ]
    return list(dict.fromkeys([first, *(config for config in found if _shared_memory(config) <= SHARED_MEMORY)]))


def _shared_memory(config: GemmConfig) -> int:
    """Bytes of the stages and of the staged store in 16 bits; the kernels add less than a KiB of barriers."""
    stages = config.num_stages * (config.block_m + config.block_n) * config.block_k
    return 2 * (stages + config.block_m * config.block_n // config.subtiles) + 1024


def _compile_at_once(run: Callable[[GemmConfig], object], configs: Sequence[GemmConfig]) -> None:
    """Compile all of them in parallel: one by one they would take longer than their timing. Nothing is launched."""
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
        _launching_nothing(),
    ):
        for config in configs:
            with contextlib.suppress(Exception):  # the timing reports why
                run(config)


@contextlib.contextmanager
def _launching_nothing() -> Iterator[None]:
    run = JITFunction.run

    def warm(self: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **options)

    with mock.patch.object(JITFunction, "run", warm):
        yield


def _relative_error(result: Tensor, truth: Tensor) -> float:
    truth = truth.double()
    return float((result.double() - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))


def tune_layer(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype, path: Path | None = None
) -> Iterator[tuple[str, GemmConfig]]:
    """Tune every GEMM kernel at the sizes of one layer on the current GPU: yields its name and the winner.

    The forward is tuned as in training, with z stored.
    """
    from gain_ops.kernels import linear_backward, linear_forward

    device = torch.device("cuda", torch.cuda.current_device())

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, dy = random(tokens, in_features), random(tokens, out_features)
    weight = random(out_features, in_features) / in_features**0.5
    y, z, dz, dx = torch.empty_like(dy), random(tokens, out_features), torch.empty_like(dy), torch.empty_like(x)
    gain_out, gain_in = (torch.zeros(n, dtype=torch.float32, device=device) for n in (out_features, in_features))

    def forward(config: GemmConfig) -> Tensor:
        linear_forward.launch(x, weight, gain_out, None, y, z, config)
        return y

    def recompute(config: GemmConfig) -> Tensor:
        return linear_backward.launch(x, weight, dy, gain_out, dz, "c", config)

    def input_side(config: GemmConfig) -> Tensor:
        return linear_backward.launch(dy, weight.t(), x, gain_in, dx, "acc", config)

    problems = [
        ("linear", forward, x, weight),
        ("linear_backward c", recompute, x, weight),
        ("linear_backward acc", input_side, dy, weight.t()),
    ]
    for kernel, run, a, w in problems:
        yield kernel, tune(kernel, run, a, w, path=path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune the GEMM kernels for one layer on the current GPU and print the winners."""
    parser = argparse.ArgumentParser(prog="python -m gain_ops.kernels.tuning", description=main.__doc__)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--out-features", type=int, required=True)
    parser.add_argument("--in-features", type=int, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tuning times kernels on a GPU, and torch sees none here")
    sizes = (options.tokens, options.out_features, options.in_features)
    for kernel, winner in tune_layer(*sizes, getattr(torch, options.dtype)):
        print(f"{kernel}: {winner}")
    print(f"written to {table_path(Device.of(torch.empty(0, device='cuda')))}")


if __name__ == "__main__":
    main()
