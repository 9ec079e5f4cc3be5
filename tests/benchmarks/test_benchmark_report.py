"""Tables as text, their place in a README, plots as pixels, and the results file, on figures that are made up."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu import proof
from benchmarks.harness import results
from benchmarks.harness.results import Row
from benchmarks.report import plots, report
from benchmarks.report.report import FLOORS, Who

FROZEN = FLOORS[0]
CARD, CPU = "NVIDIA H100 80GB HBM3", "AMD EPYC 7B13, 2 threads"
ABOUT = {"torch": "2.13.0", "triton": "3.6.0", "commit": "788090b", "date": "2026-11-24"}
OURS, PEER, WIDE = "gain, output side, keeps z", "PEFT LoRA r=16", "ein sehr langer Name " * 6 + "→ π | <b>"


def row(contestant: str, metric: str, value: float | None, spread: float = 0.0, **other: object) -> Row:
    """A figure of a layer, in bf16 on the card; spread is half the distance of the quantiles."""
    units = {"saved": "B", "saved inputs": "B", "peak": "B", "throughput": "tokens/s", "share": "share"}
    unit = "x" if metric.endswith("frozen") else units.get(metric, "us")
    ends = (None, None) if value is None else (value - spread, value + spread)
    made = Row(
        "layer",
        "A o_proj",
        contestant,
        "-",
        metric,
        unit,
        "bfloat16",
        2048,
        64,
        32,
        value,
        *ends,
        9,
        device=CARD,
        **ABOUT,
    )
    return dataclasses.replace(made, **other)


def timed(contestant: str, us: float, ratio: float, spread: float = 0.01, **other: object) -> list[Row]:
    """A time and its ratio."""
    metric = "forward+backward"
    return [
        row(contestant, metric, us, spread * us, **other),
        row(contestant, f"{metric} / frozen", ratio, spread, **other),
    ]


def frozen(**other: object) -> list[Row]:
    return [row(FROZEN, "forward+backward", 100.0, 1.0, **other)]


def cells(text: str) -> dict[str, list[str]]:
    """The only table of a text, by its first column; every line of it has as many cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    parsed = [[cell.strip() for cell in line.replace("\\|", "¦")[1:-1].split("|")] for line in lines]
    assert len({len(line) for line in parsed}) == 1
    assert set(parsed[1]) <= {"---", "---:"}
    return {name: rest for name, *rest in parsed[:1] + parsed[2:]}


def test_a_time_its_ratio_and_its_spread() -> None:
    text = report.layer_times(
        [*frozen(), *timed(OURS, 108.0, 1.08, 0.015, backend="triton"), *timed(PEER, 1234.5, 12.345)]
    )
    assert cells(text) == {
        "": ["A o_proj (64 → 32)"],
        FROZEN: ["100 µs, 1"],
        f"{OURS} (triton)": ["**108 µs, 1.08 (1.07-1.09)**"],
        PEER: ["1,234 µs, 12.35 (12.34-12.36)"],
    }
    assert text.startswith(f"**forward+backward, bfloat16, 2048 tokens, {CARD}**\n")
    assert text.endswith(f"Device: {CARD}; torch 2.13.0, Triton 3.6.0; commit 788090b; 2026-11-24.")


@pytest.mark.parametrize(("ratio", "bold"), [(1.09, False), (1.101, True)])
def test_bold_only_beyond_the_spread(ratio: float, bold: bool) -> None:
    text = report.layer_times([*frozen(), *timed(OURS, 108, 1.08), *timed(PEER, 110, ratio)])
    assert cells(text)[OURS][0].startswith("**") is bold
    assert not cells(text)[PEER][0].startswith("**")


def test_where_we_lose_the_peer_is_bold() -> None:
    text = report.layer_times([*frozen(), *timed(OURS, 150, 1.5), *timed(PEER, 110, 1.1)])
    assert cells(text)[PEER] == ["**110 µs, 1.10 (1.09-1.11)**"]
    assert cells(text)[OURS] == ["150 µs, 1.50 (1.49-1.51)"]


def test_best_of_exact_figures_of_ties_and_of_nobody() -> None:
    def best(*values: float, spread: float = 0.0, more: bool = False) -> set[str]:
        rows = {Who(str(at), "-"): row(str(at), "saved", value, spread) for at, value in enumerate(values)}
        return {who.contestant for who in report.best(rows, more)}

    assert best(1, 2, 3) == {"0"}
    assert best(1, 2, 3, more=True) == {"2"}
    assert best(1, 1, 2, 3) == {"0", "1"}, "exact ones share it"
    assert best(1, 1, 1, 2) == set(), "but not most of them"
    assert best(1, 1) == best(1) == best() == set()
    assert best(1, 1, 2, 3, spread=0.1) == set(), "a tie of measurements has no winner"


def test_the_frozen_one_is_never_bold_and_a_figure_without_its_ratio_says_so() -> None:
    text = report.layer_times([*frozen(), *timed(PEER, 110, 1.1), row(OURS, "forward+backward", 90.0)])
    assert cells(text)[FROZEN] == ["100 µs, 1"]
    assert cells(text)[OURS] == ["90 µs, no ratio"]


def test_devices_dtypes_and_tokens_have_tables_of_their_own() -> None:
    rows = [
        one
        for device, dtype, tokens in [
            (CARD, "bfloat16", 512),
            (CARD, "bfloat16", 2048),
            (CARD, "float32", 512),
            (CPU, "float32", 512),
        ]
        for one in (
            *frozen(device=device, dtype=dtype, tokens=tokens),
            *timed(PEER, 1, 2, device=device, dtype=dtype, tokens=tokens),
        )
    ]
    parts = ["**forward" + part for part in report.layer_times(rows).split("**forward")[1:]]
    assert len(parts) == 4
    for part in parts:
        assert len(cells(part)) == 3
        assert (CARD in part) != (CPU in part)


def test_sites_are_columns_of_which_a_table_has_four() -> None:
    sites = [f"model{n} o_proj" for n in range(5)]
    rows = [one for site in sites for one in (*frozen(site=site), *timed(PEER, 1, 2, site=site))]
    first, second = report.layer_times(rows).split("\n\n**forward")
    assert len(cells(first)[PEER]) == 4
    assert cells(second)[""] == ["model4 o_proj (64 → 32)"]


def test_environments_are_named_each_once_and_the_latest_figure_counts() -> None:
    old = [*frozen(), *timed(PEER, 1, 2), *timed(OURS, 1, 3)]
    new = timed(PEER, 4, 1.5, date="2026-12-01", commit="abc")
    for rows in ([*old, *new], [*new, *old]):
        text = report.tables(rows)["layers"]
        assert cells(text)[PEER] == ["**4 µs, 1.50 (1.49-1.51)**"]
        assert text.count("Device: ") == 2
        assert text.count("commit abc; 2026-12-01") == 1


def test_who_has_no_figure_is_named_with_the_reason() -> None:
    rows = [
        *frozen(),
        *frozen(site="B"),
        *timed(OURS, 1, 1),
        row(OURS, "forward+backward", None, site="B", note="out of\nmemory | <!-- /bench -->"),
        row(PEER, "forward+backward", None, note="peft is not installed"),
        row(PEER, "forward+backward", None, note="peft is not installed", site="B"),
        row("DoRA", "forward+backward", None, note="peft is not installed"),
        row("silent", "forward+backward", None),
    ]
    text = report.layer_times(rows)
    assert list(cells(text)) == ["", FROZEN, OURS]
    assert cells(text)[OURS][1] == "-"
    assert f"- {PEER}; DoRA: peft is not installed\n" in text
    assert f"- {OURS} at B: out of memory \\| &lt;!-- /bench -->\n" in text
    assert "- silent: no reason given\n" in text


def test_a_reason_given_with_another_metric_counts_for_all() -> None:
    rows = [row(FROZEN, "forward", 1.0), row(PEER, "forward+backward", None, note="not right")]
    assert f"- {PEER}: not right" in report.layer_times(rows, "forward")


def test_a_note_of_everyone_names_nobody_and_pages_are_cut() -> None:
    rows = [row(name, "saved", 1.0, note="counted on meta") for name in (FROZEN, OURS)]
    assert "- all: counted on meta" in report.layer_bytes(rows)
    text = report.layer_bytes([*rows, row(PEER, "saved", None, note="x" * 5000)])
    assert "x" * 240 + " ..." in text
    assert "x" * 241 not in text


def test_names_that_are_wide_or_have_bars_stay_in_their_cell() -> None:
    table = cells(report.layer_times([*frozen(), *timed(WIDE, 1, 1)]))
    assert list(table)[-1] == WIDE.replace("|", "¦").replace("<", "&lt;")


def test_bytes_in_the_units_of_a_reader() -> None:
    names = (FROZEN, OURS, PEER)
    rows = [row(name, "saved", value) for name, value in zip(names, (0.0, 64 * 2.0**20, 1.5 * 2**30), strict=True)]
    rows += [row(name, "saved inputs", 512.0) for name in names]
    text = report.layer_bytes(rows)
    assert cells(text)[""] == ["A o_proj (64 → 32): saved", "A o_proj (64 → 32): saved inputs"]
    assert [line[0] for line in list(cells(text).values())[1:]] == ["0 B", "**64.0 MiB**", "1.50 GiB"]
    assert cells(text)[OURS][1] == "512 B", "an input that is kept is neither good nor bad"


def test_steps_blocks_and_models() -> None:
    rows = []
    for name, rate, peak in (("frozen", 1200.0, 10.0), ("gain", 1100.0, 20.0), ("full fine-tuning", 600.0, 90.0)):
        ratio = row(name, "throughput / frozen", rate / 1200, 0.01, group="step")
        rows += [row(name, "throughput", rate, 5, group="step"), row(name, "peak", peak * 2**20, group="step")]
        rows += [ratio] if name != "frozen" else []
        rows += [row(name, "saved", peak, group=group) for group in ("block", "model")]
    made = report.tables(rows)
    assert list(made) == ["blocks", "models", "steps"]
    assert cells(made["steps"])["gain"] == ["**1,100 tokens/s, 0.92 (0.91-0.93)**", "**20.0 MiB**"]
    assert cells(made["steps"])["frozen"] == ["1,200 tokens/s, 1", "10.0 MiB"]
    assert cells(made["models"])["gain"] == cells(made["blocks"])["gain"] == ["**20 B**"]


def op(name: str, backend: str, us: float | None, share: float = 0.5, **other: object) -> list[Row]:
    placed = {"group": "op", "backend": backend, **other}
    spread = 0 if us is None else 0.01 * us
    shares = [] if us is None else [row(name, "share", share, 0.01, **placed)]
    return [row(name, "time", us, spread, **placed), *shares]


def test_ops_by_backend_with_their_share_and_the_ceilings() -> None:
    copy = row("copy", "copy", 2.99e12, group="ceiling", unit="B/s", dtype="float32")
    products = [
        row("matmul", "matmul", 7.9e14, group="ceiling", unit="flop/s", dtype=d) for d in ("bfloat16", "float32")
    ]
    rows = [
        *op("linear", "eager", 20, 0.46),
        *op("linear", "triton", 10, 0.92),
        *op("scale", "eager", 5),
        copy,
        *products,
    ]
    rows += op("scale", "triton", None, note="no GPU")
    text = report.tables(rows)["ops"]
    assert cells(text) == {
        "op": ["site", "eager", "triton"],
        "linear": ["A o_proj (64 → 32)", "20 µs, 46 % (45-47)", "**10 µs, 92 % (91-93)**"],
        "scale": ["A o_proj (64 → 32)", "5 µs, 50 % (49-51)", "-"],
    }
    assert "copy 2.99 TB/s, matmul 790 Tflop/s." in text
    assert "- scale (triton): no GPU" in text


def test_no_rows_no_tables() -> None:
    assert report.tables([]) == {}
    assert report.tables([row(PEER, "forward+backward", None, note="no GPU")]) == {}


README = "# π\n<!-- bench:layers -->\nold\n<!-- /bench -->\nkept\n<!-- bench:ops --><!-- /bench -->\nend\n"


def test_the_readme_is_replaced_between_its_markers_however_often(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README, encoding="utf-8")
    for _ in range(2):
        report.update_page(readme, {"layers": "| \\1 µ |\n\n", "ops": "new"})
        assert readme.read_text(encoding="utf-8") == (
            "# π\n<!-- bench:layers -->\n| \\1 µ |\n<!-- /bench -->\nkept\n<!-- bench:ops -->\nnew\n<!-- /bench -->\nend\n"
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (README, "bench:steps --> 0 times"),
        ("<!-- bench:steps --><!-- /bench -->" * 2, "bench:steps --> 2 times"),
        ("<!-- bench:steps -->", "no <!-- /bench --> that closes <!-- bench:steps -->"),
        ("<!-- bench:steps -->" + README, "no <!-- /bench --> that closes <!-- bench:steps -->"),
    ],
)
def test_a_marker_that_is_not_as_expected_raises_and_nothing_is_written(tmp_path: Path, text: str, says: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        report.update_page(readme, {"layers": "new", "steps": "new"} if "layers" in text else {"steps": "new"})
    assert readme.read_text(encoding="utf-8") == text


def test_the_pages_have_the_tables_of_the_published_results(tmp_path: Path) -> None:
    from benchmarks.__main__ import PAGES, RESULTS, published

    made = published(results.read(sorted(RESULTS.glob("*.csv"))))
    assert made.keys() == PAGES.keys()
    assert all(made.values())
    for page, tables in made.items():
        text = page.read_text(encoding="utf-8")
        copy = tmp_path / page.name
        copy.write_text(text, encoding="utf-8")
        report.update_page(copy, tables)
        assert copy.read_text(encoding="utf-8") == text


def test_figures_of_a_run_whose_proof_was_red_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.__main__ import main

    file = tmp_path / "gpu.csv"
    row = Row("proof", proof.PARITY, "-", "-", "green", "", "", 0, 0, 0, 0.0, 0.0, 0.0, 1, note="3 failed")
    results.append(file, [*layers_of((8192,)), row])
    monkeypatch.setattr("sys.argv", ["benchmarks", "report", str(file), "--publish"])
    monkeypatch.setattr("benchmarks.__main__.PAGES", {})
    with pytest.raises(SystemExit, match=f"{file} is of a run whose proof was red: {proof.PARITY}: 3 failed"):
        main()
    results.append(file, [dataclasses.replace(row, q20=1.0, median=1.0, q80=1.0, note="all passed")])
    main()


def layers_of(tokens: tuple[int, ...], **other: object) -> list[Row]:
    names = ((OURS, "eager", 1.3), (OURS, "triton", 1.1), (PEER, "-", 3.0), (WIDE, "-", 0.97))
    return [
        one
        for count in tokens
        for site in ("A o_proj", "B down_proj", "C down_proj")
        for name, backend, ratio in names
        for one in timed(name, 100 * ratio, ratio, site=site, backend=backend, tokens=count, **other)
    ]


def _is_drawn(path: Path) -> bool:
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    colors = np.unique((255 * pixels.reshape(-1, 3)[::7]).astype(np.uint8), axis=0)
    return path.stat().st_size > 10_000 and pixels.shape[1] >= 1500 and pixels.std() > 0.05 and len(colors) > 20


@pytest.mark.slow
def test_plots_of_a_kind_a_device_and_a_number_of_tokens(tmp_path: Path) -> None:
    rows = [*layers_of((512, 2048)), *op("linear", "eager", 20, 0.46), *op("linear", "triton", 10, 1.3)]
    written = plots.draw(rows, tmp_path / "made")
    assert sorted(tmp_path.rglob("*")) == sorted([tmp_path / "made", *written])
    assert [path.name.split("-")[0] for path in written] == ["bars", "bars", "tokens", "roofline"]
    assert all("h100" in path.name for path in written)
    assert all(_is_drawn(path) for path in written)


def test_two_devices_two_plots_and_none_against_one_number_of_tokens(tmp_path: Path) -> None:
    written = plots.draw([*layers_of((512,)), *layers_of((512,), device="Ωμέγα, 2 threads")], tmp_path)
    assert [path.name.split("-")[0] for path in written] == ["bars", "bars"]
    assert len(set(written)) == 2


def test_nothing_is_drawn_from_no_figures(tmp_path: Path) -> None:
    only = [*frozen(), row(PEER, "forward+backward / frozen", None, note="no GPU")]
    assert plots.draw([], tmp_path / "a") == plots.draw(only, tmp_path / "a") == []
    assert not (tmp_path / "a").exists()


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [row(WIDE, "saved", 1 / 3, note='a "quoted",\nnote'), row(PEER, "saved", None, floor=2.5)]
    path = tmp_path / "made" / "results.csv"
    results.append(path, rows[:1])
    results.append(path, iter(rows[1:]))
    assert results.read([path]) == rows
    assert results.read([path, path]) == rows * 2
    assert results.read([]) == []


def test_another_version_or_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.csv"
    with monkeypatch.context() as patch:
        patch.setattr(results, "VERSION", results.VERSION + 1)
        results.append(path, [row(PEER, "saved", 1.0)])
    with pytest.raises(ValueError, match=r"results\.csv is not a results file of version 1"):
        results.read([path])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a results file"):
        results.read([path])
