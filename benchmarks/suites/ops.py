"""Raw ops: each of gain_ops.ops.raw by each backend, as times, as shares of the roofline, and over the plain product."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.sites import Site
from benchmarks.harness import gate, roofline, timing
from benchmarks.harness.results import Row, environment, site_row
from benchmarks.suites.layers import free_memory
from gain_ops import BackendUnavailable
from gain_ops.backends.interface import OPS
from gain_ops.ops import dispatch, raw
from gain_ops.testing import ARGUMENTS, tensors

BACKENDS = ("eager", "triton", "cuda")
# the vendor's matrix products, and which of them an op with a GEMM is a multiple of
PRODUCTS = {"x @ W.T": ("x", "weight"), "dy @ W": ("dy", "weight")}
BASES = {
    "linear": "x @ W.T",
    "linear_z": "x @ W.T",
    "linear_input": "x @ W.T",
    "backward_recompute": "x @ W.T",
    "ddelta_recompute": "x @ W.T",
    "backward_input": "dy @ W",
}
OVER_PRODUCT = "time / product"


def rows(
    sites: Sequence[Site],
    tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    *,
    ceilings: roofline.Ceilings | None = None,
    names: Sequence[str] = OPS,
    backends: Sequence[str] = BACKENDS,
    graph: bool = True,
) -> Iterator[Row]:
    """Rows ``time`` in us with its floor, ``achieved share of the floor`` (floor / time) where there are ceilings, and
    ``time / product`` of an op with a GEMM: over torch's plain product of the same operands, which has its own row ``time``.

    A backend that cannot run, or an op that does not pass the gate, gets one row without a figure and the reason in its note.
    budget_s: seconds for all sites and numbers of tokens; what is in it, and the rest, is as in layers.rows().
    """
    ceilings = ceilings or roofline.assumed(device)
    about = environment(device)
    for (site, count), left in timing.shared_out([(site, count) for site in sites for count in tokens], budget_s):
        sizes = (count, site.in_features, site.out_features)
        row = site_row("op", site, count, dtype, about)
        given = tensors(*sizes, dtype, device) | {"bias": None}
        cases, reasons = _cases(names, backends, given)
        cases |= {(name, "eager"): product(name, given) for name in PRODUCTS}
        for (name, backend), reason in reasons.items():
            yield row(contestant=name, backend=backend, metric="time", unit="us", note=reason, **timing.NO_FIGURE)
        free_memory(device)
        measured = timing.measure_together(cases, device, budget_s=left(), graph=graph)
        for (name, backend), time in measured.items():
            floor = roofline.floor_us(roofline.op(name, *sizes, dtype), dtype, ceilings)
            caveat = ceilings.caveat if ceilings else ""
            figure = partial(row, contestant=name, backend=backend, note="; ".join(filter(None, (time.note, caveat))))
            yield figure(metric="time", unit="us", floor=floor, **time.columns())
            if floor is not None:
                share = timing.quantiles([floor / one for one in time.rounds])
                yield figure(metric="achieved share of the floor", unit="share", **share.columns())
            if name in BASES:
                over = timing.ratio(time, measured[BASES[name], "eager"])
                yield figure(metric=OVER_PRODUCT, unit="x", **over.columns())
        del cases, given
        free_memory(device)


def _cases(
    names: Sequence[str], backends: Sequence[str], given: dict[str, Any]
) -> tuple[dict[tuple[str, str], Callable[[], object]], dict[tuple[str, str], str]]:
    """The calls to be timed, and why the others are not, by op and backend."""
    cases: dict[tuple[str, str], Callable[[], object]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for name in names:
        arguments = [given[argument] for argument in ARGUMENTS[name]]
        for backend, reason in obstacles(name, arguments, backends).items():
            if reason is None:
                cases[name, backend] = partial(getattr(raw, name), *arguments, backend)
            else:
                reasons[name, backend] = reason
    return cases, reasons


def product(name: str, given: dict[str, Any]) -> Callable[[], Tensor]:
    """One of PRODUCTS on these tensors."""
    a, weight = (given[argument] for argument in PRODUCTS[name])
    assert a is not None
    assert weight is not None
    b = weight.t() if name == "x @ W.T" else weight
    return lambda: a @ b


def obstacles(name: str, arguments: Sequence[Any], backends: Sequence[str]) -> dict[str, str | None]:
    """By backend, why an op gets no figure: it cannot run here, or it is not right; None where nothing is in the way."""
    found: dict[str, str | None] = {}
    for backend in backends:
        found[backend] = None
        try:
            dispatch.implementation(backend, next(a for a in arguments if isinstance(a, Tensor)))
        except BackendUnavailable as reason:
            found[backend] = str(reason)
    wrong = gate.op_failures(name, arguments, [backend for backend in backends if found[backend] is None])
    return found | {b: f"not right, so not measured: {'; '.join(words)}" for b, words in wrong.items() if words}
