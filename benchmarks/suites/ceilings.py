"""The ceilings of the device, measured: the copy of a large buffer, the vendor's matrix product, the smallest kernel."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import results, timing
from benchmarks.harness.results import Row

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = 32  # in a row, of which one more is timed


def rows(device: torch.device, budget_s: float) -> Iterator[Row]:
    """``copy`` in B/s, bytes read plus bytes written, and ``matmul`` in flop/s by dtype, on random data; on CUDA ``launch``.

    ``launch`` is what one more kernel takes in a full stream, in us.
    """
    large = device.type == "cuda"
    about = results.environment(device)
    spent = timing.measure(_copy(1 << 30 if large else 1 << 24, device), device, budget_s=budget_s / 5)
    yield _row("copy", "B/s", "float32", 2 * (1 << 30 if large else 1 << 24), spent, about)
    n = 8192 if large else 512
    for dtype in DTYPES:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        spent = timing.measure(partial(torch.matmul, a, b), device, budget_s=budget_s / 5)
        yield _row("matmul", "flop/s", str(dtype).removeprefix("torch."), 2 * n**3, spent, about)
    if large:
        yield _launch(device, budget_s / 5, about)


def _launch(device: torch.device, budget_s: float, about: results.Environment) -> Row:
    tiny = torch.zeros(128, device=device)
    cases = {count: partial(_add, tiny, count) for count in (1, 1 + KERNELS)}
    one, many = timing.measure_together(cases, device, budget_s=budget_s).values()
    spent = timing.quantiles([(b - a) / KERNELS for a, b in zip(one.rounds, many.rounds, strict=True)], one.note)
    who = ("ceiling", "launch", "-", "-", "launch", "us", "float32", 0, 0, 0)
    return Row(*who, **spent.columns(), note=spent.note, **about)


def _add(tiny: Tensor, count: int) -> None:
    for _ in range(count):
        tiny.add_(1)


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    """A copy of ``size`` bytes."""
    source, target = torch.randn(size // 4, device=device), torch.empty(size // 4, device=device)
    return lambda: target.copy_(source)


def _row(metric: str, unit: str, dtype: str, work: float, spent: timing.Quantiles, about: results.Environment) -> Row:
    rate = [work / (us * 1e-6) for us in (spent.median, spent.q80, spent.q20)]
    return Row(
        "ceiling", metric, "-", "-", metric, unit, dtype, 0, 0, 0, rate[0], rate[1], rate[2], spent.samples, **about
    )
