"""Opt-in tuning of the GEMM kernels: time candidates once, keep the winner in a JSON table that later runs read.

Nothing is timed unless ``tune`` is called (or ``python -m gain_ops.kernels.tuning --tokens 8192 --out-features 4096
--in-features 4096``). The table is GAIN_OPS_TUNED, or gain_ops/<device>.json in the user's cache folder. An entry is keyed by
kernel, dtype, precision, layout, n, k and the power of two that m falls under, and the table by device and versions: a table
of another device or version is not read.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from gain_ops.files import replace_file
from gain_ops.kernels import config as heuristics
from gain_ops.kernels._common import input_precision, multiprocessors
from gain_ops.kernels.config import GemmConfig

FORMAT = 1

_log = logging.getLogger("gain_ops")


def gemm_config(kernel: str, a: Tensor, weight: Tensor, aligned: bool) -> GemmConfig:
    """The configuration for a [M, K] and weight [N, K]: the tuned table's entry, else the heuristic's pick.

    ``aligned`` says whether every operand has unit-stride, 16-byte aligned rows; an entry is for one or the other.
    """
    return _pick(kernel, a.device.index, a.dtype, input_precision(a.dtype), aligned, a.shape[0], *weight.shape)


@functools.lru_cache(maxsize=4096)
def _pick(
    kernel: str, index: int | None, dtype: torch.dtype, precision: str, aligned: bool, m: int, n: int, k: int
) -> GemmConfig:
    if index is not None:
        tuned = _table(table_path(index), index).get(_key(kernel, dtype, precision, aligned, m, n, k))
        if tuned is not None:
            return tuned
    arch = heuristics.architecture(index)
    return heuristics.gemm_config(arch, dtype, precision, m, n, aligned, multiprocessors(index))


def tune(
    kernel: str,
    run: Callable[[GemmConfig], Tensor],
    a: Tensor,
    weight: Tensor,
    *,
    aligned: bool,
    timer: Callable[[Callable[[], Any]], float],
    path: Path | None = None,
) -> GemmConfig:
    """Time every candidate for one problem and keep the fastest in the table.

    Args:
        kernel: "linear", or "matmul_reduce" with what it writes: "matmul_reduce c", "matmul_reduce acc".
        run: launches the kernel with a configuration and returns its result.
        a, weight: [M, K] and [N, K], the problem.
        aligned: whether every operand has unit-stride, 16-byte aligned rows.
        timer: seconds (or any unit) of one call, ``triton.testing.do_bench`` on a GPU.
        path: the table; by default the one that ``gemm_config`` reads.

    Returns:
        The winner. A candidate that does not compile, does not fit the device, or does not agree with the heuristic's pick
        to the dtype's rounding is left out.

    """
    index = a.device.index
    path = table_path(index) if path is None else path
    arch, precision = heuristics.architecture(index), input_precision(a.dtype)
    m, (n, k) = a.shape[0], weight.shape
    first = heuristics.gemm_config(arch, a.dtype, precision, m, n, aligned, multiprocessors(index))
    truth = run(first).clone()
    tolerance = 4 * torch.finfo(a.dtype).eps
    timings: dict[GemmConfig, float] = {}
    for candidate in candidates(first):
        try:
            result = run(candidate)
        except Exception as error:  # a compiler's refusal has no common type across Triton's versions
            _log.info("tuning %s: %s left out: %s", kernel, candidate, str(error).splitlines()[:1])
            continue
        if _relative_error(result, truth) <= tolerance:
            timings[candidate] = timer(functools.partial(run, candidate))
    winner = min(timings, key=timings.__getitem__)
    entries = _table(path, index)
    _write(path, index, entries | {_key(kernel, a.dtype, precision, aligned, m, n, k): winner})
    return winner


def candidates(first: GemmConfig) -> list[GemmConfig]:
    """What tuning tries: the heuristic's pick, its neighbours in tile, stages, order and subtiles."""
    tiles = {(first.block_m, first.block_n), (128, 256), (128, 128), (256, 128), (64, 256), (64, 128)}
    found = [
        replace(first, block_m=m, block_n=n, num_stages=stages, subtiles=subtiles, group_m=group)
        for m, n in sorted(tiles)
        for stages in sorted({first.num_stages, 3, 4})
        for subtiles in (1, 2)
        for group in sorted({first.group_m, 8, 16})
    ]
    return list(dict.fromkeys([first, *found]))


def table_path(index: int | None) -> Path:
    """Where the tuned table of a device lies."""
    named = os.environ.get("GAIN_OPS_TUNED")
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "gain_ops" / f"{re.sub(r'[^A-Za-z0-9]+', '-', _device_name(index))}.json"


def _key(kernel: str, dtype: torch.dtype, precision: str, aligned: bool, m: int, n: int, k: int) -> str:
    m_bin = 1 << max(m - 1, 0).bit_length()
    layout = "aligned" if aligned else "unaligned"
    return f"{kernel} {str(dtype).removeprefix('torch.')} {precision} {layout} m<={m_bin} n={n} k={k}"


def _header(index: int | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "device": _device_name(index),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


@functools.cache
def _device_name(index: int | None) -> str:
    return "interpreter" if index is None else torch.cuda.get_device_name(index)


@functools.cache
def _table(path: Path, index: int | None) -> dict[str, GemmConfig]:
    """The entries of a table; none, and a line in the log, where it is absent, broken or another device's."""
    try:
        stored = json.loads(path.read_text())
        header = {key: stored.get(key) for key in _header(index)}
        if header != _header(index):
            _log.warning("tuned table %s is of %s, this is %s: not read", path, header, _header(index))
            return {}
        names = {field.name for field in fields(GemmConfig)}
        return {key: GemmConfig(**{n: entry[n] for n in names}) for key, entry in stored["configs"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("tuned table %s cannot be read (%s): delete it and tune again", path, error)
        return {}


def _write(path: Path, index: int | None, entries: dict[str, GemmConfig]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_header(index) | {"configs": {key: asdict(c) for key, c in sorted(entries.items())}}, indent=1)
    replace_file(path, lambda beside: beside.write_text(text))
    _table.cache_clear()
    _pick.cache_clear()


def _relative_error(result: Tensor, truth: Tensor) -> float:
    truth = truth.double()
    return float((result.double() - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune both GEMM kernels for one layer on the current GPU and print the winners."""
    from gain_ops.kernels import linear_forward, matmul_reduce
    from gain_ops.operands import aligned

    parser = argparse.ArgumentParser(prog="python -m gain_ops.kernels.tuning", description=main.__doc__)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--out-features", type=int, required=True)
    parser.add_argument("--in-features", type=int, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("tuning times kernels on a GPU, and torch sees none here")
    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, options.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, dy = random(options.tokens, options.in_features), random(options.tokens, options.out_features)
    weight = random(options.out_features, options.in_features) / options.in_features**0.5
    y, dz, dx = torch.empty_like(dy), torch.empty_like(dy), torch.empty_like(x)
    gain_out, gain_in = torch.zeros(dy.shape[1], device=device), torch.zeros(x.shape[1], device=device)

    def forward(config: GemmConfig) -> Tensor:
        linear_forward.launch(x, weight, gain_out, None, y, None, config)
        return y

    def recompute(config: GemmConfig) -> Tensor:
        return matmul_reduce.launch(x, weight, dy, gain_out, dz, "c", config)

    def input_side(config: GemmConfig) -> Tensor:
        return matmul_reduce.launch(dy, weight.t(), x, gain_in, dx, "acc", config)

    problems = (
        ("linear", forward, x, weight, (y,)),
        ("matmul_reduce c", recompute, x, weight, (dy, dz)),
        ("matmul_reduce acc", input_side, dy, weight.t(), (x, dx)),
    )
    for kernel, run, a, w, tiles in problems:
        winner = tune(kernel, run, a, w, aligned=aligned(a, w, *tiles), timer=triton.testing.do_bench)
        print(f"{kernel} n={w.shape[0]} k={w.shape[1]}: {winner}")
    print(f"written to {table_path(device.index)}")


if __name__ == "__main__":
    main()
