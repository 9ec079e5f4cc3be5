"""Layers: every contestant on one weight and one x, forward and backward, as times and as ratios to the frozen linear."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.contestants.contestants import FROZEN, Contestant, contestants
from benchmarks.contestants.sites import Site
from benchmarks.harness import gate, roofline, timing
from benchmarks.harness.results import Row, environment, site_row
from gain_ops import GainLinear

METRICS = ("forward", "backward", "forward+backward")
FROZEN_KEY = (FROZEN, "-")


def rows(
    sites: Sequence[Site],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    *,
    ceilings: roofline.Ceilings | None = None,
    who: Sequence[Contestant] | None = None,
    group: str = "layer",
    graph: bool = True,
) -> Iterator[Row]:
    """Rows ``forward``, ``backward`` and ``forward+backward`` in us, and each ``/ frozen`` as a ratio, in unit ``x``.

    A site's rows come when it is done. Who cannot run, or does not pass the gate, gets one row without a figure and the
    reason in its note.

    Args:
        sites: which maps.
        tokens: rows of x.
        dtype: of x and the weight.
        device: where.
        budget_s: seconds for all sites. It is passed where the gate and timing.LEAST_ROUNDS take longer.
        ceilings: for the floors of ours and the frozen linear; if not given, what is assumed of a GPU, and none on a CPU.
        who: the contestants; all of them, if not given.
        group: of the rows.
        graph: on CUDA, time replays of CUDA graphs.

    """
    ceilings = ceilings or roofline.assumed(device)
    who = contestants() if who is None else who
    about = environment(device)
    for site, left in timing.shared_out(sites, budget_s):
        torch.compiler.reset()  # or a compiled contestant would be measured with shapes made dynamic
        row = site_row(group, site, tokens, dtype, about)
        judge = gate.Judge(site, tokens, dtype, device)
        obstacles = [obstacle(contestant, judge) for contestant in who]
        for contestant, reason in zip(who, obstacles, strict=True):
            if reason is not None:
                yield row(**_who(contestant), metric=METRICS[-1], unit="us", note=reason, **timing.NO_FIGURE)
        fit = [contestant for contestant, reason in zip(who, obstacles, strict=True) if reason is None]
        x, weight, dy = judge.x, judge.weight, judge.dy
        del judge
        free_memory(device)
        layers = {_key(contestant): contestant.build(gate.frozen_linear(weight)) for contestant in fit}
        cases = {(key, metric): case for key, layer in layers.items() for metric, case in _cases(layer, x, dy).items()}
        measured = timing.measure_together(cases, device, budget_s=left(), graph=graph)
        for contestant in fit:
            sizes = (tokens, site.in_features, site.out_features, dtype.itemsize)
            kernels = _kernels(contestant, layers[_key(contestant)], sizes)
            floors = {metric: roofline.floor_us(parts, dtype, ceilings) for metric, parts in kernels.items()}
            caveat = ceilings.caveat if ceilings and floors else ""
            yield from _figures(partial(row, **_who(contestant)), _key(contestant), measured, floors, caveat)
        del layers, cases, x, weight, dy
        free_memory(device)


def _figures(
    row: Callable[..., Row],
    key: tuple[str, str],
    measured: Mapping[tuple[tuple[str, str], str], timing.Quantiles],
    floors: Mapping[str, float | None],
    caveat: str,
) -> Iterator[Row]:
    """One contestant's rows."""
    for metric in METRICS:
        time, base = measured.get((key, metric)), measured.get((FROZEN_KEY, metric))
        if time is None:
            note = "forward alone: its output carries no gradient"
            yield row(metric=metric, unit="us", note=note, **timing.NO_FIGURE)
            continue
        note = "; ".join(filter(None, (time.note, caveat)))
        yield row(metric=metric, unit="us", floor=floors.get(metric), note=note, **time.columns())
        if base is not None and key != FROZEN_KEY:
            to_frozen = timing.ratio(time, base)
            yield row(metric=f"{metric} / frozen", unit="x", note=to_frozen.note, **to_frozen.columns())


def free_memory(device: torch.device) -> None:
    """Give back what is no longer referred to, before the next size comes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def obstacle(contestant: Contestant, judge: gate.Judge) -> str | None:
    """Why a contestant gets no figure: it cannot run here, or it is not right."""
    reason = contestant.obstacle(judge.x)
    if reason is None and (found := judge.failures(contestant)):
        reason = f"not right, so not measured: {'; '.join(found)}"
    return reason


def _who(contestant: Contestant) -> dict[str, str]:
    return {"contestant": contestant.name, "backend": contestant.backend}


def _key(contestant: Contestant) -> tuple[str, str]:
    return contestant.name, contestant.backend


def _cases(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, timing.Case]:
    """What is timed of a layer in training. Each has its own leaf of x: autograd ties a leaf to the stream of its first use."""
    x = x.detach().requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def forward(_: object = None) -> Tensor:
        y: Tensor = layer(x)
        return y

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, wanted, dy)

    if not forward().requires_grad:
        return {"forward": timing.Case(forward)}
    return {
        "forward": timing.Case(forward),
        "backward": timing.Case(backward, forward),
        "forward+backward": timing.Case(lambda _: backward(forward())),
    }


def _kernels(contestant: Contestant, layer: nn.Module, sizes: tuple[int, int, int, int]) -> dict[str, roofline.Kernels]:
    """What each metric cannot do without, for ours and the frozen linear; empty for the others."""
    if contestant.name == FROZEN:
        return roofline.frozen_layer(*sizes)
    return roofline.gained_layer(layer.side, layer.save, *sizes) if type(layer) is GainLinear else {}
