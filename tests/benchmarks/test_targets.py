"""What a results file says to the targets, and to the constants of the predictions, on figures that are made up."""

import dataclasses
import math
from pathlib import Path

import pytest

from benchmarks.contestants import sites
from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.report import predict, report, targets
from benchmarks.suites import blocks, ops, steps, variants

CARD = "NVIDIA H100 80GB HBM3 (compute capability 9.0)"
SITES = {site.name: site for site in sites.SHAPES}
O_PROJ, DOWN, SMALL = SITES["Llama-3-8B o_proj"], SITES["Llama-3-8B down_proj"], SITES["GPT-2 Large o_proj"]
BOTH = "forward+backward / frozen"
NAMES = [target.name for target in targets.TARGETS]


def row(group: str, site: sites.Site | str, contestant: str, metric: str, value: float | None, **other: object) -> Row:
    name, i, o = (site, 4096, 14336) if isinstance(site, str) else (site.name, site.in_features, site.out_features)
    unit = "share" if metric.startswith("achieved") else "B" if metric == "peak" else "us" if metric == "time" else "x"
    ends = (None, None) if value is None else (0.99 * value, 1.01 * value)
    made = Row(group, name, contestant, "triton", metric, unit, "bfloat16", 8192, i, o, value, *ends, 9, device=CARD)
    return dataclasses.replace(made, **other)


def over(site: sites.Site, op: str, value: float, **other: object) -> Row:
    return row("op", site, op, ops.OVER_PRODUCT, value, **other)


def verdicts(rows: list[Row]) -> dict[str, tuple[str, str, str]]:
    """By target: worst, where, verdict."""
    return {line[0]: (line[3], line[4], line[6]) for line in targets.lines(rows)}


def test_nothing_measured_no_table_and_one_figure_names_all_that_lack() -> None:
    assert targets.lines([]) == []
    assert targets.lines([over(O_PROJ, "linear", 1.2, backend="eager")]) == [], "our fused backends are what counts"
    found = verdicts([over(O_PROJ, "linear", 1.0)])
    assert list(found) == NAMES
    assert {name for name, (*_, verdict) in found.items() if verdict == "not measured"} == {*NAMES[1:]}


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.99, "goal"), (1.0, "goal"), (1.001, "met"), (1.06, "met"), (1.061, "missed")]
)
def test_the_bars_of_the_forward(value: float, verdict: str) -> None:
    worst, where, said = verdicts([over(O_PROJ, "linear", value)])[NAMES[0]]
    assert said == verdict
    assert worst == f"{value:.3f} ({0.99 * value:.3f}-{1.01 * value:.3f})"
    assert where == "Llama-3-8B o_proj, T=8192, triton"


def test_the_worst_shape_counts_and_only_those_that_are_asked_for() -> None:
    rows = [over(O_PROJ, "linear", 1.02), over(DOWN, "linear", 1.05), over(SMALL, "linear", 1.5)]
    rows += [over(O_PROJ, "linear", 1.4, tokens=512), over(O_PROJ, "linear", 1.3, dtype="float16")]
    (line, *_) = targets.lines(rows)
    assert line[3:] == ["1.050 (1.040-1.060)", "Llama-3-8B down_proj, T=8192, triton", "2", "met"]


def test_the_better_backend_counts_at_each_shape() -> None:
    rows = [over(O_PROJ, "linear", 1.2), over(O_PROJ, "linear", 1.03, backend="cuda"), over(DOWN, "linear", 1.04)]
    assert verdicts(rows)[NAMES[0]][1] == "Llama-3-8B down_proj, T=8192, triton"
    share = [
        row("op", O_PROJ, "backward", "achieved share of the floor", v, backend=b)
        for v, b in ((0.8, "cuda"), (0.9, "triton"))
    ]
    bandwidth = next(name for name in NAMES if "bandwidth" in name)
    assert verdicts(share)[bandwidth][1:] == ("Llama-3-8B o_proj, T=8192, triton", "met")
    assert verdicts(share[:1])[bandwidth][2] == "missed", "of a share more is better"


def test_the_square_layer_and_the_blocks() -> None:
    ours, gain = variants.SHIPPED, blocks.GAIN
    rows = [row("layer", O_PROJ, ours, BOTH, 1.05), row("layer", O_PROJ, ours, BOTH, 1.5, tokens=2048)]
    for place, value in zip(blocks.PLACES, (1.02, 1.04, 1.31), strict=True):
        rows.append(row("block", place.site, gain, f"{blocks.LINEARS} / frozen", value))
        rows.append(row("block", place.site, gain, f"{blocks.WHOLE} / frozen", value - 0.02))
    found = {name: verdict for name, (*_, verdict) in verdicts(rows).items() if verdict != "not measured"}
    assert found == {
        "4096 x 4096, T = 8192": "goal",
        "Llama-3-8B block, gains on o_proj and down_proj, its linears": "met",
        "Llama-3-8B block, gains on o_proj and down_proj, whole": "goal",
        "Llama-3-8B block, gains on every linear, its linears": "goal",
        "Llama-3-8B block, gains on every linear, whole": "goal",
        "GPT-2 Large block, gains on every linear, its linears": "missed",
        "GPT-2 Large block, gains on every linear, whole": "met",
    }


def test_peers_are_to_be_slower_in_every_layer_and_block() -> None:
    name = "times as fast as PEFT LoRA r=16, every shape"
    own = row("layer", O_PROJ, variants.SHIPPED, BOTH, 1.0)
    peer = row("layer", O_PROJ, "PEFT LoRA r=16", BOTH, 1.6, backend="-")
    assert verdicts([own, peer])[name] == ("1.600 (1.568-1.632)", "Llama-3-8B o_proj, T=8192, triton", "goal")
    equal = dataclasses.replace(peer, median=1.0)
    assert verdicts([own, equal])[name][2] == "missed", "as fast is not faster"
    place = blocks.PLACES[0]
    metric = f"{blocks.LINEARS} / frozen"
    block = [
        row("block", place.site, who, metric, v, backend=b)
        for who, v, b in ((blocks.GAIN, 1.3, "cuda"), (blocks.LORA, 1.2, "-"))
    ]
    assert verdicts([own, peer, *block])[name][1:] == (f"{place.site}, T=8192, cuda", "missed")
    assert verdicts([peer]) == {}, "without ours there is nothing to compare"


def test_the_lean_gains_take_less_than_lora_in_every_step() -> None:
    lora, in_dtype = steps.LORA_PEERS

    def peaks(site: str, own: float) -> list[Row]:
        return [
            row("step", site, who, "peak", v, backend="-")
            for who, v in ((steps.LEAN, own), (lora, 9e9), (in_dtype, 8e9))
        ]

    assert verdicts(peaks("a", 7e9))[NAMES[-1]] == ("0.875", f"a, T=8192, {in_dtype}", "goal")
    assert verdicts([*peaks("a", 7e9), *peaks("b", 8e9)])[NAMES[-1]][1:] == (f"b, T=8192, {in_dtype}", "missed")


def full(machine: predict.Machine) -> list[Row]:
    """Rows from which the constants of a machine can be read back."""
    rows = [
        row("ceiling", "matmul", "-", "matmul", machine.flops),
        row("ceiling", "copy", "-", "copy", machine.bytes, dtype="float32"),
        row("ceiling", "launch", "-", "launch", machine.launch, dtype="float32"),
    ]
    for site in (O_PROJ, DOWN):
        stored = 1e6 * machine.exposed * 2 * 8192 * site.out_features / machine.bytes
        rows += [over(site, "linear", 1 / machine.linear), over(site, "backward_recompute", 1 / machine.reduction)]
        rows += [row("op", site, "linear", "time", 400.0), row("op", site, "linear_z", "time", 400.0 + stored)]
        rows += [row("op", site, "backward", "achieved share of the floor", machine.one_pass)]
        for name, value in ((variants.IN_REGISTERS, machine.registers), (variants.KEPT, machine.summing)):
            rows.append(row("variant", site, name, ops.OVER_PRODUCT, 1 / value))
    return rows


def test_the_constants_are_read_from_what_was_measured() -> None:
    machine = predict.Machine(700e12, 2.8e12, 3.0, 0.96, 0.9, 0.8, 0.97, 0.85, 0.5)
    found = predict.measured([*full(machine), over(SMALL, "linear", 5.0)])
    assert found == pytest.approx(dataclasses.asdict(machine)), "a small GEMM says nothing of the epilogue"
    assert predict.measured([]) == {}


def test_predictions_by_hand() -> None:
    """4096 x 4096 at 8192 tokens: 347.95 us a GEMM in whole waves, 22.37 us a pass of 67.1 MB."""
    plain = predict.Machine(launch=0.0, linear=1.0, one_pass=1.0, exposed=0.0)
    whole = 1024 / (8 * 132)  # 1024 tiles in 8 waves of 132
    gemm, one = 347.95 / whole, 22.37
    assert predict.frozen_us(8192, 4096, 4096, plain) == pytest.approx(2 * gemm, rel=1e-4)
    expected = {
        variants.SHIPPED: 2 * gemm + 3 * one,
        predict.KEEPS_X: 2 * gemm + gemm / 0.93,
        predict.INPUT_SIDE: gemm + one + gemm / 0.93,
        variants.IN_REGISTERS: gemm + gemm / 0.82,
        variants.MADE: gemm + one + gemm / 0.95,
        variants.KEPT: gemm + gemm / 0.95,
        variants.AFTER: 2 * gemm + 2 * one,
        variants.BESIDE: 2 * gemm + 2 * one - (1 - whole) * gemm,
    }
    assert set(expected) == set(predict.WAYS)
    for name, us in expected.items():
        assert predict.layer_us(name, 8192, 4096, 4096, plain) == pytest.approx(us, rel=2e-4), name


def test_a_stored_z_is_hidden_but_for_a_share() -> None:
    """8192 tokens of 14336 features: 234.9 MB of z, 78.3 us at 3.0e12 B/s."""
    hidden, open_ = (predict.Machine(exposed=share) for share in (0.0, 0.5))
    sizes = (8192, 4096, 14336)
    stored = predict.layer_us(variants.KEPT, *sizes, open_) - predict.layer_us(variants.KEPT, *sizes, hidden)
    assert stored == pytest.approx(0.5 * 78.3, rel=1e-3)
    for name in (predict.KEEPS_X, predict.INPUT_SIDE):
        assert predict.layer_us(name, *sizes, open_) == predict.layer_us(name, *sizes, hidden), "no z is stored"


def test_the_report_has_the_targets_the_constants_and_the_ways(tmp_path: Path) -> None:
    rows = full(predict.ASSUMED)
    for name, ratio in ((variants.SHIPPED, 1.12), (variants.MADE, 1.08)):
        rows += [row("variant", O_PROJ, name, BOTH, ratio)]
    rows += [row("variant", O_PROJ, variants.KEPT, BOTH, None, note="not right, so not measured: dx")]
    rows += [row("op", O_PROJ, "linear", "time", None, backend="cuda", note="not right, so not measured: y")]
    results.append(tmp_path / "results.csv", rows)
    made = report.tables(results.read([tmp_path / "results.csv"]))
    assert "| forward / GEMM, in &lt;= " not in made["targets"]
    assert "| &lt;= 1.06 | &lt;= 1.00 | 1.020 (1.010-1.031) |" in made["targets"]
    assert "Not right, so without a figure: Llama-3-8B o_proj, linear (cuda)." in made["targets"]
    assert "| registers | 0.82 | 0.82 |" in made["constants"]
    assert f"| {variants.MADE} (triton) | 1.08 (1.07-1.09); 1.08, 1.08 |" in made["variants"]
    assert f"- {variants.KEPT} (triton): not right" in made["variants"]
    ops_table, variants_table = made["products"].split("**variants over")
    assert "| linear (triton) | 1.02 (1.01-1.03) | 1.02 (1.01-1.03) |" in ops_table
    assert f"| {variants.IN_REGISTERS} (triton) | 1.22 (1.21-1.23) | 1.22 (1.21-1.23) |" in variants_table


def test_a_cpu_s_results_have_none_of_these_tables() -> None:
    rows = results.read(sorted((results.ROOT / "benchmarks" / "results").glob("*cpu*.csv")))
    assert rows
    assert not {"targets", "constants", "variants"} & set(report.tables(rows))


def test_every_site_of_a_target_is_one_that_is_measured() -> None:
    assert targets.SQUARE[0] in SITES
    assert (O_PROJ.in_features, O_PROJ.out_features) == (4096, 4096)
    assert all(math.isfinite(bar) for place in blocks.PLACES for bar in place.bars)
    assert {peer for _, peer in targets.PEERS.values()} <= {method.name for method in blocks.METHODS}
    assert steps.LEAN in steps.METHODS
    assert {*steps.LORA_PEERS} <= {*steps.METHODS}
