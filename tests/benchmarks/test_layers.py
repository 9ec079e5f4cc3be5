import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.contestants.contestants import FROZEN, Contestant, contestants
from benchmarks.contestants.scaled import Scaled
from benchmarks.contestants.sites import Site
from benchmarks.harness import results, roofline
from benchmarks.suites import ceilings, layers, ops
from gain_ops.backends.interface import OPS

CPU = torch.device("cpu")
SITE = Site("tiny", 16, 32)
CEILINGS = roofline.Ceilings({torch.float32: 1e10}, 1e10, "made up")


@pytest.fixture(scope="module")
def found() -> list[results.Row]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # seconds of C++ otherwise
        return list(layers.rows([SITE], 8, torch.float32, CPU, 0.01, ceilings=CEILINGS))


def test_every_contestant_appears_with_figures_or_a_reason(found: list[results.Row]) -> None:
    seen = {(row.contestant, row.backend): [] for row in found}
    for row in found:
        seen[row.contestant, row.backend].append(row)
    assert set(seen) == {(c.name, c.backend) for c in contestants()}
    for contestant in contestants():
        of = seen[contestant.name, contestant.backend]
        if contestant.obstacle(torch.empty(0)) is not None:
            assert [(row.median, row.samples) for row in of] == [(None, 0)]
            assert of[0].note
            continue
        expected = (
            [*layers.METRICS]
            if contestant.name == FROZEN
            else [name for metric in layers.METRICS for name in (metric, f"{metric} / frozen")]
        )
        assert [row.metric for row in of] == expected, of


def test_rows_are_in_order(found: list[results.Row]) -> None:
    for row in found:
        assert (row.group, row.site, row.dtype, row.tokens) == ("layer", "tiny", "float32", 8)
        assert (row.in_features, row.out_features, row.torch) == (16, 32, torch.__version__)
        assert row.unit == ("x" if row.metric.endswith("/ frozen") else "us")
        if row.median is not None:
            assert 0 < row.q20 <= row.median <= row.q80
            assert row.samples >= 5


def test_floors_are_of_ours_and_the_frozen_linear(found: list[results.Row]) -> None:
    for row in found:
        ours = row.contestant == FROZEN or row.contestant.startswith("gain,")
        assert (row.floor is not None) == (ours and row.unit == "us" and row.median is not None), row
    (forward,) = (row for row in found if (row.contestant, row.metric) == (FROZEN, "forward"))
    # 2 * 8 * 16 * 32 flops, 4 (8 * 16 + 16 * 32 + 8 * 32) bytes
    assert forward.floor == pytest.approx(max(8192, 3584) / 1e10 * 1e6)


def test_rows_survive_the_file(found: list[results.Row], tmp_path: Path) -> None:
    results.append(tmp_path / "rows.csv", found)
    assert results.read([tmp_path / "rows.csv"]) == found


def test_who_is_wrong_gets_no_figure() -> None:
    class Off(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return 1.01 * super().forward(x)

    def absent(linear: nn.Linear) -> nn.Module:
        raise ImportError("no such package")

    class Detached(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    who = [contestants()[0], *(Contestant(f.__name__, "-", f) for f in (Off, absent, Detached))]
    found = list(layers.rows([SITE], 8, torch.float32, CPU, 0, who=who))
    of = {name: list(rows) for name, rows in itertools.groupby(found, lambda row: row.contestant)}
    for name, reason in {"Off": "not right, so not measured: y: relative error", "absent": "no such package"}.items():
        assert [row.median for row in of[name]] == [None]
        assert reason in of[name][0].note
    assert [(row.metric, row.median is None) for row in of["Detached"]] == [
        ("forward", False),
        ("forward / frozen", False),
        ("backward", True),
        ("forward+backward", True),
    ]


def test_rows_of_another_group() -> None:
    rows = list(layers.rows([SITE], 8, torch.float32, CPU, 0, who=contestants()[:1], group="variant"))
    assert {row.group for row in rows} == {"variant"}


def test_what_a_kernel_more_takes() -> None:
    row = ceilings._launch(CPU, 0.0, {"device": "a device"})
    assert (row.group, row.metric, row.unit, row.device) == ("ceiling", "launch", "us", "a device")
    assert 0 < row.median < 1000


def test_rows_come_as_they_are_measured() -> None:
    rows = layers.rows([SITE, Site("never", 10**9, 10**9)], 8, torch.float32, CPU, 0, who=contestants()[:1])
    assert [row.site for row in itertools.islice(rows, 3)] == ["tiny"] * 3


def test_ops() -> None:
    # every op by the backends that cost little here; under Triton's interpreter two stand for all
    rows = functools.partial(ops.rows, [SITE], [8], torch.float32, CPU, 0, ceilings=CEILINGS)
    quick = ("eager", "cuda")
    found = list(rows(backends=quick))
    products = {(name, "eager") for name in ops.PRODUCTS}
    everyone = set(itertools.product(OPS, quick)) | products
    assert {(row.contestant, row.backend) for row in found} == everyone
    over = [row for row in found if row.metric == ops.OVER_PRODUCT]
    assert {row.contestant for row in over} == set(ops.BASES) < set(OPS)
    assert all(row.median > 0 and row.unit == "x" for row in over)
    for row in found:
        assert row.group == "op"
        if row.metric == ops.OVER_PRODUCT:
            continue
        if row.backend == "cuda":
            assert row.median is None
            assert "GPU" in row.note
        elif row.unit == "us":
            assert 0 < row.floor < row.median
        else:
            assert (row.metric, row.unit) == ("achieved share of the floor", "share")
            assert 0 < row.q20 <= row.median <= row.q80 < 1
    eager = [row for row in found if row.backend == "eager"]
    assert len(eager) == 2 * len(OPS) + 2 * len(products) + len(ops.BASES)
    two = {row.contestant: row for row in rows(names=["linear", "scale"], backends=("triton",)) if row.unit == "us"}
    assert [(row.backend, 0 < row.floor < row.median) for row in two.values()] == [
        ("triton", True),
        ("triton", True),
        ("eager", True),
        ("eager", True),
    ]


def test_an_op_is_compared_with_the_product_of_its_own_operands() -> None:
    given = ops.tensors(8, SITE.in_features, SITE.out_features, torch.float32)
    assert ops.product("x @ W.T", given)().shape == (8, 32)
    assert ops.product("dy @ W", given)().shape == (8, 16)
    assert [name for name, base in ops.BASES.items() if base == "dy @ W"] == ["backward_input"]


def test_an_op_that_is_wrong_gets_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gain_ops.ops.raw.scale", lambda x, delta, backend: x)
    rows = list(ops.rows([SITE], [8], torch.float32, CPU, 0, names=["scale"], backends=["eager"]))
    (row,) = (row for row in rows if row.contestant == "scale")
    assert row.median is None
    assert "scale[0]: relative error" in row.note
