"""Blocks on a CPU: who is measured, on which layers, and what the gate refuses."""

import importlib.util

import pytest
import torch
from torch import nn

from benchmarks.contestants import models
from benchmarks.contestants.sites import Architecture
from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.suites import blocks
from benchmarks.suites.blocks import LINEARS, WHOLE, Method, Place

CPU = torch.device("cpu")
TINY = Architecture("Tiny", "llama", 32, 64, 2, 2, 1, 64)
TINY_GPT2 = Architecture("Tiny GPT-2", "gpt2", 32, 64, 2, 2, 2, 64)
PLACES = [Place(TINY, False, (1, 1)), Place(TINY, True, (1, 1)), Place(TINY_GPT2, True, (1, 1))]
FROZEN = blocks.METHODS[0]
EAGER = next(method for method in blocks.METHODS if method.backend == "eager")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft and transformers")


def measure(*methods: Method, place: Place = PLACES[1], dtype: torch.dtype = torch.float32) -> list[Row]:
    return list(blocks.rows([place], 16, dtype, CPU, 0.0, methods=methods))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.site)
def test_every_method_is_right_and_has_both_times(place: Place, dtype: torch.dtype) -> None:
    able = [m for m in blocks.METHODS if m.backend in ("-", "eager") and m.name != blocks.COMPILED]
    rows = measure(*able, place=place, dtype=dtype)
    found = {(row.contestant, row.metric): row for row in rows}
    for method in able:
        for metric in (WHOLE, LINEARS):
            row = found[method.name, metric]
            assert row.median is not None, row.note
            assert (row.group, row.site, row.unit, row.tokens) == ("block", place.site, "us", 16)
            assert (row.in_features, row.out_features, row.samples >= 5) == (32, 64, True)
            ratio = found.get((method.name, f"{metric} / frozen"))
            assert (ratio is None) == (method is FROZEN)
            assert ratio is None or (ratio.unit, ratio.samples) == ("x", row.samples)
    assert found[blocks.GAIN, WHOLE].backend == "eager"


def test_the_layers_of_a_place() -> None:
    model = models.build(TINY, layers=1)
    names = [[name.rpartition(".")[2] for name in place.names(model)] for place in PLACES[:2]]
    assert names == [
        ["o_proj", "down_proj"],
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ]
    gpt2 = models.build(TINY_GPT2, layers=1)
    assert [name.rpartition("h.0.")[2] for name in PLACES[2].names(gpt2)] == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]


def test_the_linears_are_those_of_the_place_alone() -> None:
    judge = blocks.Judge(PLACES[0], 16, torch.float32, CPU)
    model, wrong = judge.adapted(EAGER)
    assert wrong == []
    called = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: called.append(name.rpartition(".")[2]))
    cases = blocks._cases(model, judge.names, *judge.inputs(16))
    cases[LINEARS].run(None)
    assert called == ["o_proj", "down_proj"]
    called.clear()
    cases[WHOLE].run(None)
    assert called == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda layer: layer.delta.requires_grad_(False), "One of the differentiated Tensors does not require grad"),
        (lambda layer: layer.register_forward_hook(lambda m, x, y: 1.01 * y), "y: relative error"),
        (lambda layer: layer.delta.register_hook(lambda g: 1.01 * g), "gradient of model.layers.0.self_attn.v_proj"),
        (lambda layer: layer.register_full_backward_hook(lambda m, dx, dy: (1.01 * dx[0],)), "dx: relative error"),
    ],
)
def test_who_is_wrong_gets_no_figure_and_the_others_go_on(wrong, says: str) -> None:
    def put(model: nn.Module, names: list[str]) -> None:
        EAGER.put(model, names)
        wrong(models.blocks(model)[0].self_attn.v_proj)

    rows = measure(FROZEN, Method("wrong", "-", put), EAGER)
    (row,) = (row for row in rows if row.contestant == "wrong")
    assert row.median is None
    assert row.note.startswith("not right, so not measured: ")
    assert says in row.note
    assert any(row.contestant == blocks.GAIN and row.median for row in rows)


def test_a_gain_that_is_left_out_is_seen() -> None:
    def forgets(model: nn.Module, names: list[str]) -> None:
        EAGER.put(model, names[:-1])

    rows = measure(FROZEN, Method("forgets", "-", forgets))
    (row,) = (row for row in rows if row.contestant == "forgets")
    assert "expected y, dx" in row.note


def test_a_backend_or_a_package_that_is_missing_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    by_cuda = next(method for method in blocks.METHODS if method.backend == "cuda")
    find = importlib.util.find_spec
    monkeypatch.setattr(blocks.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    rows = measure(FROZEN, by_cuda, next(method for method in blocks.METHODS if method.name == blocks.IA3))
    notes = {row.contestant: row.note for row in rows if row.median is None}
    assert "need a GPU" in notes[blocks.GAIN]
    assert notes[blocks.IA3] == "peft is not installed"


@pytest.mark.slow
def test_the_compiled_scale_is_compiled_for_every_shape_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """More layers than torch would compile one forward for, before it silently stops."""
    graphs = []
    compiler = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda layer, **options: compiler(layer, backend=lambda g, _: graphs.append(g) or g, **options),
    )
    compiled = next(method for method in blocks.METHODS if method.name == blocks.COMPILED)
    rows = measure(FROZEN, compiled)
    assert all(row.median is not None for row in rows), [row.note for row in rows]
    assert len(graphs) >= 7


def test_rows_survive_the_file(tmp_path) -> None:
    rows = measure(FROZEN, EAGER)
    results.append(tmp_path / "rows.csv", rows)
    assert results.read([tmp_path / "rows.csv"]) == rows


def test_wall_time_is_of_the_whole_block_and_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    through = blocks.Given.through
    monkeypatch.setattr(blocks.Given, "through", lambda *of: calls.append(of[0].x.shape) or through(*of))
    measured = []
    together = blocks.timing.measure_together

    def noted(cases, device, **options):
        calls.clear()
        found = together(cases, device, **options)
        measured.append((len(calls), options["wall"], found))
        return found

    monkeypatch.setattr(blocks.timing, "measure_together", noted)
    rows = list(blocks.rows(PLACES[:1], 16, torch.float32, CPU, 0.0, methods=(FROZEN, EAGER), wall=True))
    assert {row.metric for row in rows} == {blocks.WALL, f"{blocks.WALL} / frozen"}
    ((count, wall, found),) = measured
    assert wall
    assert count % blocks.IN_A_ROW == 0
    (row,) = (row for row in rows if row.contestant == blocks.FROZEN)
    ((_, time),) = (item for item in found.items() if item[0][0] is FROZEN)
    assert row.median == pytest.approx(time.median / blocks.IN_A_ROW)
