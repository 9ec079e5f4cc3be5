"""Variants: other forwards and backwards of the output side, measured beside the shipped ones. No user reaches them.

predict.py counts what each should cost, and NOTES.md had the prediction before it ran. W' is ``gain[:, None] * W``, a copy of W
that is made again in every backward, or reused over the micro-batches of one optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from benchmarks.contestants.contestants import (
    COMPOSED,
    FROZEN,
    KEPT_WEIGHT,
    Contestant,
    backend_obstacle,
    contestants,
)
from benchmarks.contestants.sites import Site
from benchmarks.harness import gate, timing
from benchmarks.harness.results import Row, environment, site_row
from benchmarks.suites import layers, ops
from gain_ops import GainLinear, reference
from gain_ops.ops import raw as raw_ops
from gain_ops.testing import tensors

if TYPE_CHECKING:
    from gain_ops.kernels.config import GemmConfig


SHIPPED = "gain, output side, keeps z"
IN_REGISTERS = "dx and ddelta in one GEMM, dy scaled in registers"
MADE = "dx and ddelta in one GEMM, W' made in the backward"
KEPT = "dx and ddelta in one GEMM, W' kept"
AFTER = "ddelta after the GEMM, W' kept"
CHUNKS = (32, 64, 128)  # rows that make one row of partials
BESIDE = "ddelta on a second stream, W' kept"

Gradients = tuple[Tensor, Tensor]


class Varied(GainLinear):
    """The layer that ships and keeps z, on the Triton backend, with another way from dy and z to dx and ddelta."""

    gradients: Callable[[Varied, Tensor, Tensor], Gradients]

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = _Varied.apply(input, self.delta, self)
        return y

    def scaled_weight(self) -> Tensor:
        """W' for the present delta, kept."""
        version = self.delta._version
        if getattr(self, "_made_for", None) != version:
            self._kept, self._made_for = self.make_scaled_weight(), version
        return self._kept

    def make_scaled_weight(self) -> Tensor:
        """``gain[:, None] * W``, in one pass."""
        from gain_ops.kernels.rows import scale_rows

        return scale_rows(self.weight, self.delta)


class _Varied(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, layer: Varied) -> Tensor:
        y, z = raw_ops.linear_z(x, layer.weight, delta, None, "triton")
        ctx.layer = layer
        ctx.save_for_backward(z)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (z,) = ctx.saved_tensors
        dx, ddelta = ctx.layer.gradients(dy, z)
        return dx, ddelta.to(ctx.layer.delta.dtype), None


def _in_registers(layer: Varied, dy: Tensor, z: Tensor) -> Gradients:
    from benchmarks.experiments.fused_backward import backward_dx

    return backward_dx(dy, z, layer.weight, layer.delta)


def _made(layer: Varied, dy: Tensor, z: Tensor) -> Gradients:
    from benchmarks.experiments.fused_backward import backward_dx

    return backward_dx(dy, z, layer.make_scaled_weight(), None)


def _kept(layer: Varied, dy: Tensor, z: Tensor) -> Gradients:
    from benchmarks.experiments.fused_backward import backward_dx

    return backward_dx(dy, z, layer.scaled_weight(), None)


def _after(layer: Varied, dy: Tensor, z: Tensor) -> Gradients:
    return dy @ layer.scaled_weight(), raw_ops.ddelta(dy, z, "triton")


def _beside(layer: Varied, dy: Tensor, z: Tensor) -> Gradients:
    """As _after; the pass fills what the GEMM's last wave leaves idle, if the device runs them at once."""
    weight = layer.scaled_weight()
    if not dy.is_cuda:
        return _after(layer, dy, z)
    here, side = torch.cuda.current_stream(dy.device), torch.cuda.Stream(dy.device)
    side.wait_stream(here)
    dx = dy @ weight
    with torch.cuda.stream(side):
        ddelta = raw_ops.ddelta(dy, z, "triton")
    here.wait_stream(side)
    return dx, ddelta


GRADIENTS: dict[str, Callable[[Varied, Tensor, Tensor], Gradients]] = {
    IN_REGISTERS: _in_registers,
    MADE: _made,
    KEPT: _kept,
    AFTER: _after,
    BESIDE: _beside,
}


def varied() -> list[Contestant]:
    """The frozen linear, the layers that ship and keep z, what needs no GEMM of ours, and every other backward."""
    rivals = (FROZEN, COMPOSED, KEPT_WEIGHT)
    known = [c for c in contestants() if c.name in rivals or (c.name == SHIPPED and c.backend != "eager")]
    obstacle = partial(backend_obstacle, "triton")
    return [*known, *(Contestant(name, "triton", _with(way).from_linear, obstacle) for name, way in GRADIENTS.items())]


def _with(way: Callable[[Varied, Tensor, Tensor], Gradients]) -> type[Varied]:
    return type("Varied", (Varied,), {"gradients": way})


def rows(
    sites: Sequence[Site], tokens: int, dtype: torch.dtype, device: torch.device, budget_s: float
) -> Iterator[Row]:
    """Rows of group ``variant``: layers.rows() of varied(), then those of kernel_rows(), each in a part of the time."""
    yield from layers.rows(sites, tokens, dtype, device, 0.7 * budget_s, who=varied(), group="variant")
    yield from kernel_rows(sites, tokens, dtype, device, 0.3 * budget_s)


def kernel_rows(
    sites: Sequence[Site], tokens: int, dtype: torch.dtype, device: torch.device, budget_s: float
) -> Iterator[Row]:
    """The forward in several configurations and the fused backward: ``time``, and ``time / product`` as ops.rows()."""
    about = environment(device)
    for site, left in timing.shared_out(sites, budget_s):
        row = site_row("variant", site, tokens, dtype, about)
        given = tensors(tokens, site.in_features, site.out_features, dtype, device) | {"bias": None}
        cases: dict[tuple[str, str], Callable[[], object]] = {(n, "-"): ops.product(n, given) for n in ops.PRODUCTS}
        for label, base, equation, arguments, calls in _kernels(given):
            for name, wrong in gate.call_failures(label, equation, arguments, calls).items():
                if wrong:
                    note = f"not right, so not measured: {'; '.join(wrong)}"
                    yield row(
                        contestant=name, backend="triton", metric="time", unit="us", note=note, **timing.NO_FIGURE
                    )
                else:
                    cases[base, name] = calls[name]
        layers.free_memory(device)
        measured = timing.measure_together(cases, device, budget_s=left())
        for (base, name), time in measured.items():
            who = (base, "eager") if name == "-" else (name, "triton")
            figure = partial(row, contestant=who[0], backend=who[1], note=time.note)
            yield figure(metric="time", unit="us", **time.columns())
            if name != "-":
                yield figure(metric=ops.OVER_PRODUCT, unit="x", **timing.ratio(time, measured[base, "-"]).columns())
        del cases, given
        layers.free_memory(device)


def _kernels(given: dict[str, Any]) -> Iterator[tuple[str, str, Any, list[Any], dict[str, Any]]]:
    """What results are called, the product beside them, the equation, its arguments, and who computes it by name."""
    tensors: list[Tensor] = [given[name] for name in ("x", "weight", "dy", "z", "delta_out")]
    x, weight, dy, z, delta = tensors
    if backend_obstacle("triton", x) is not None:
        return
    from benchmarks.experiments import flattened, fused_backward
    from gain_ops.kernels import linear_forward

    def forward(config: GemmConfig) -> Tensor:
        y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
        linear_forward.launch(x, weight, delta, None, y, None, config)
        return y

    def flat(stages: int, keep_z: bool) -> Tensor | tuple[Tensor, Tensor | None]:
        results = flattened.linear(x, weight, delta, None, stages, keep_z)
        return results if keep_z else results[0]

    def gradients(dy: Tensor, z: Tensor, weight: Tensor, delta: Tensor) -> Gradients:
        dz, ddelta = reference.backward(dy, z, delta)
        return dz @ weight, ddelta

    configs: dict[str, Any] = {
        name: partial(forward, config) for name, config in forward_configurations(x, weight).items()
    }
    if flattened.serves(x, weight):
        configs |= {
            f"y by the loop flattened, {stages} stages": partial(flat, stages, False) for stages in flattened.STAGES
        }
        kept: dict[str, Any] = {
            f"y and z by the loop flattened, {stages} stages": partial(flat, stages, True)
            for stages in flattened.STAGES
        }
        kept["y and z, ships"] = partial(linear_forward.linear_z, x, weight, delta, None)
        yield "y, z", "x @ W.T", reference.linear_z, [x, weight, delta, None], kept
    yield "y", "x @ W.T", reference.linear, [x, weight, delta, None], configs
    fused = partial(fused_backward.backward_dx, dy, z)
    scaled = reference.scale(weight.t(), delta).t().contiguous()
    both = {IN_REGISTERS: partial(fused, weight, delta), KEPT: partial(fused, scaled, None)}
    yield "dx, ddelta", "dy @ W", gradients, [dy, z, weight, delta], both
    passes = {_chunk_label(chunk, dy): partial(_one_pass, dy, z, delta, chunk) for chunk in CHUNKS}
    yield "dz, ddelta", "dy @ W", reference.backward, [dy, z, delta], passes


def _one_pass(dy: Tensor, z: Tensor, delta: Tensor, chunk: int) -> Gradients:
    from gain_ops.kernels import rows

    dz = torch.empty_like(dy)
    return dz, rows.launch_backward(dy, z, delta, dz, chunk=chunk)


def _chunk_label(chunk: int, dy: Tensor) -> str:
    from gain_ops.kernels.config import ROWS, rows_chunk

    ships = ", ships" if chunk == rows_chunk(*dy.shape) else ""
    return f"dz and ddelta in one pass, chunks of {chunk}, {ROWS.num_stages} stages{ships}"


def forward_configurations(x: Tensor, weight: Tensor) -> dict[str, GemmConfig]:
    """What ships, and what may be better by stages or by the shape of the tile; on a CPU what the interpreter takes."""
    from gain_ops.kernels import tables
    from gain_ops.kernels.config import GemmConfig

    shipped = tables.gemm_config("linear", x, weight)
    others = (
        GemmConfig(128, 256, 64, num_warps=8, num_stages=4, subtiles=2),
        GemmConfig(128, 256, 64, num_warps=8, num_stages=3, subtiles=2),
        GemmConfig(256, 128, 64, num_warps=8, num_stages=4, subtiles=2),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=4),
        GemmConfig(128, 128, 64, num_warps=8, num_stages=5, subtiles=2),
    )
    named = {_label(config): config for config in (shipped, *(others if x.device.type != "cpu" else ()))}
    return {(f"{name}, ships" if config == shipped else name): config for name, config in named.items()}


def _label(config: GemmConfig) -> str:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    stores = "a store" if config.subtiles == 1 else f"{config.subtiles} stores"
    return f"y by {tile}, {config.num_stages} stages, {stores}"
