"""The second round on a CPU, under Triton's interpreter: every way is held to the gate, and W' follows its delta."""

import dataclasses

import pytest
import torch

from benchmarks.contestants.composed import KeptWeight
from benchmarks.contestants.contestants import COMPOSED, FROZEN, KEPT_WEIGHT, Contestant, contestants
from benchmarks.contestants.sites import Site
from benchmarks.experiments import flattened
from benchmarks.harness import gate
from benchmarks.report import predict
from benchmarks.suites import ops, variants

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SITE = Site("small", 48, 64)
VARIED = [contestant for contestant in variants.varied() if contestant.name in variants.GRADIENTS]
RIVALS = [contestant for contestant in contestants() if contestant.name in (COMPOSED, KEPT_WEIGHT)]
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contestant", [*VARIED, *RIVALS], ids=lambda contestant: contestant.name)
def test_every_way_is_right(contestant: Contestant, dtype: torch.dtype) -> None:
    assert contestant.obstacle(torch.empty(0, dtype=dtype, device=DEVICE)) is None
    assert gate.failures(contestant, SITE, 40, dtype, DEVICE) == []


@pytest.mark.parametrize("contestant", VARIED, ids=lambda contestant: contestant.name)
def test_the_gate_sees_a_wrong_gradient(contestant: Contestant, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = contestant.build.__self__

    def wrong(layer: variants.Varied, dy: torch.Tensor, z: torch.Tensor) -> variants.Gradients:
        dx, ddelta = variants.GRADIENTS[contestant.name](layer, dy, z)
        return dx, 1.01 * ddelta

    broken = type("Broken", (kept,), {"gradients": wrong})
    (found,) = gate.failures(dataclasses.replace(contestant, build=broken.from_linear), SITE, 40, torch.float32, DEVICE)
    assert found.startswith("gradient of the gain")


@pytest.mark.parametrize("kind", [variants.Varied, KeptWeight])
def test_a_kept_weight_is_made_once_for_each_delta(kind: type[variants.Varied] | type[KeptWeight]) -> None:
    layer = kind.from_linear(gate.frozen_linear(torch.randn(8, 16, device=DEVICE)))
    first = layer.scaled_weight()
    assert layer.scaled_weight() is first
    with torch.no_grad():
        layer.delta.fill_(1.0)
    assert torch.equal(layer.scaled_weight(), 2 * layer.weight)


def test_who_is_compared_and_what_is_predicted() -> None:
    names = [contestant.name for contestant in variants.varied()]
    assert names == [FROZEN, variants.SHIPPED, variants.SHIPPED, COMPOSED, KEPT_WEIGHT, *variants.GRADIENTS]
    assert {variants.SHIPPED, *variants.GRADIENTS} <= set(predict.WAYS)


@pytest.mark.slow
def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "varied", lambda: [*variants.contestants()[:1], VARIED[0]])
    rows = list(variants.rows([SITE], 40, torch.float16, DEVICE, 0.0))
    assert {row.group for row in rows} == {"variant"}
    figures = {(row.contestant, row.metric): row for row in rows if row.median is not None}
    assert figures[variants.IN_REGISTERS, "forward+backward / frozen"].unit == "x"
    for name in (variants.IN_REGISTERS, variants.KEPT):
        assert figures[name, ops.OVER_PRODUCT].median > 0
    (shipped,) = {name for name, _ in figures if name.endswith(", ships") and name.startswith("y by")}
    assert figures[shipped, "time"].backend == "triton"
    passes = [name for name, metric in figures if name.startswith("dz and ddelta in one pass") and metric == "time"]
    assert len(passes) == len(variants.CHUNKS)
    flat = [name for name, metric in figures if "flattened" in name and metric == "time"]
    assert len(flat) == 2 * len(flattened.STAGES)
    assert {name for name, metric in figures if metric == "time"} >= {*ops.PRODUCTS}
    assert all(figures[name, "time"].backend == "eager" for name in ops.PRODUCTS)


def test_a_kernel_that_is_wrong_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.experiments import fused_backward

    right = fused_backward.backward_dx
    monkeypatch.setattr(fused_backward, "backward_dx", lambda *of: (1.01 * right(*of)[0], right(*of)[1]))
    rows = list(variants.kernel_rows([SITE], 40, torch.float32, DEVICE, 0.0))
    refused = {row.contestant: row.note for row in rows if row.median is None}
    assert set(refused) == {variants.IN_REGISTERS, variants.KEPT}
    assert all("dx, ddelta[0]: relative error" in note for note in refused.values())
