"""Markdown tables of results, and their places in README.md and in docs/.

A table is of one device and one dtype; below it are the versions, commits and dates of its figures, each once.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.contestants.contestants import FROZEN
from benchmarks.contestants.models import FROZEN_LIGER
from benchmarks.harness.results import Row
from benchmarks.report import predict, targets
from benchmarks.suites.blocks import LINEARS, WALL, WHOLE
from benchmarks.suites.memory import ANY_DEVICE
from benchmarks.suites.ops import OVER_PRODUCT
from gain_ops.planning.methods import FROZEN as FROZEN_MODEL
from gain_ops.utils.files import replace_file
from gain_ops.utils.wording import size_text

FLOORS = (FROZEN, FROZEN_MODEL, FROZEN_LIGER)  # the others are compared with them, so they are never called the best
RATIO = " / frozen"
TIMES = {"forward", "backward", "forward+backward", LINEARS, WALL}
LESS_IS_BETTER = {*TIMES, "saved", "optimizer", "peak", "peak, counted"}
MORE_IS_BETTER = {"throughput"}
COMPARED = {*TIMES, "throughput"}  # the metrics that have a ratio
TIME_COLUMNS, BYTE_COLUMNS = 4, 6  # they fit the width of a README; more sites go into another table

_NONE = "-"
_TEXT = ("", "op", "site", "target", "where", "verdict", "constant")  # columns of words
_NOTE = 240  # characters of a note: the text of an exception may fill pages
_MEANINGS = {
    "saved": "activations saved for backward",
    "saved, one block run again": "every block's input, and all of the block that is recomputed",
    "saved by the loss": "the part of these that the loss saves",
    "saved inputs": "the part of these that is the layer's input, which costs nothing where another op already holds it",
    "optimizer": "the gradients of the trained parameters, and AdamW's two moments",
    "peak": "the most that was allocated at once",
    "peak, counted": "weights, AdamW's moments, and the most that forward and backward hold at once",
}
_BRACKETS = "with its 20 % to 80 % quantiles in brackets"


class Who(NamedTuple):
    """A contestant by one backend."""

    contestant: str
    backend: str

    @property
    def label(self) -> str:
        """The name, and the backend where there is a choice of one."""
        return self.contestant if self.backend in ("", "-") else f"{self.contestant} ({self.backend})"


class Column(NamedTuple):
    """A column of a table: one metric at one site."""

    heading: str
    site: str
    metric: str


Figures = Mapping[tuple[Who, str, str], Row]  # by contestant, site and metric


def tables(rows: Iterable[Row]) -> dict[str, str]:
    """Every table that has a figure, by the name of its marker in a page."""
    kept = latest(rows)
    made = {
        "targets": goals(kept),
        "constants": constants(kept),
        "variants": ways(kept),
        "products": over_products(kept),
        "layers": layer_times(kept),
        "layers-forward": layer_times(kept, "forward"),
        "layers-backward": layer_times(kept, "backward"),
        "layers-bytes": layer_bytes(kept),
        "blocks": blocks(kept),
        "kept": kept_by_models(kept),
        "models": models(kept),
        "steps": steps(kept),
        "ops": ops(kept),
    }
    return {name: text for name, text in made.items() if text}


def goals(rows: Sequence[Row]) -> str:
    """The targets on a GPU, and the measured figures; one table for each device."""
    made = []
    for device, here in _by_device(rows).items():
        if cells := targets.lines(here):
            note = f"worst: the worst of the measured shapes, {_BRACKETS}."
            shown = [row for row in here if row.group in ("op", "layer", "block", "step")]
            wrong = dict.fromkeys(f"{row.site}, {_who(row).label}" for row in shown if row.note.startswith("not right"))
            notes = [note, *([f"Not right, so without a figure: {_plain('; '.join(wrong))}."] if wrong else [])]
            made.append(_assemble(f"targets, bfloat16, {device}", targets.HEADS, cells, notes, shown))
    return "\n\n".join(made)


def constants(rows: Sequence[Row]) -> str:
    """The constants of the predictions: assumed, and measured if the file has them; one table for each device."""
    made = []
    for device, here in _by_device(rows).items():
        found = predict.measured(here)
        if found.keys() - {"flops", "bytes"}:  # these every device has
            names = [(field.name, field.default) for field in dataclasses.fields(predict.Machine)]
            cells = [[name, f"{value:.4g}", f"{found[name]:.4g}" if name in found else _NONE] for name, value in names]
            shown = [row for row in here if row.group in ("ceiling", "op", "variant")]
            title = f"constants of benchmarks/report/predict.py, {device}"
            made.append(_assemble(title, ["constant", "assumed", "measured"], cells, [], shown))
    return "\n\n".join(made)


def ways(rows: Sequence[Row]) -> str:
    """Every way of a gained layer by sites: measured over the frozen linear, and as predicted by both sets of constants."""
    made = []
    for (device, tokens), here in split(rows, "variant", "device", "tokens").items():
        ratios = [row for row in here if row.metric == WHOLE + RATIO and row.median is not None]
        if not ratios:
            continue
        found = predict.measured(row for row in rows if row.device == device)
        machine = dataclasses.replace(predict.ASSUMED, **found)
        places = list(dict.fromkeys((row.site, place(row)) for row in ratios))
        figures = {(_who(row), row.site): row for row in ratios}
        cells = [
            [who.label, *(_predicted(figures.get((who, site)), machine) for site, _ in places)]
            for who in dict.fromkeys(map(_who, ratios))
        ]
        legend = f"Over the frozen linear, {_BRACKETS}; then as predicted by the assumed constants, and by the measured ones."
        title = f"ways of a layer, {WHOLE}, {here[0].dtype}, {tokens} tokens, {device}"
        heads = ["", *(heading for _, heading in places)]
        made.append(_assemble(title, heads, cells, [legend, *_remarks(here, {WHOLE + RATIO})], here))
    return "\n\n".join(made)


def over_products(rows: Sequence[Row]) -> str:
    """Ops and variants with a GEMM by sites: their time over that of the vendor's product of the same operands."""
    made = []
    found = [row for row in rows if row.metric == OVER_PRODUCT and row.median is not None]
    for group in ("op", "variant"):
        for (device, dtype, tokens), here in split(found, group, "device", "dtype", "tokens").items():
            places = list(dict.fromkeys((row.site, place(row)) for row in here))
            figures = {(_who(row), row.site): row for row in here}
            cells = []
            for who in dict.fromkeys(map(_who, here)):
                line = [figures.get((who, site)) for site, _ in places]
                cells.append([who.label, *(_NONE if row is None else _relative(row) for row in line)])
            title = f"{group}s over the vendor's product of the same operands, {dtype}, {tokens} tokens, {device}"
            heads = ["", *(heading for _, heading in places)]
            made.append(_assemble(title, heads, cells, [f"The ratio, {_BRACKETS}."], here))
    return "\n\n".join(made)


def _predicted(row: Row | None, machine: predict.Machine) -> str:
    if row is None:
        return _NONE
    sizes = (row.tokens, row.in_features, row.out_features)
    if row.contestant not in predict.WAYS:
        return _relative(row)
    before, after = (
        predict.layer_us(row.contestant, *sizes, m) / predict.frozen_us(*sizes, m) for m in (predict.ASSUMED, machine)
    )
    return f"{_relative(row)}; {before:.2f}, {after:.2f}"


def _by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.device, []).append(row)
    return found


def layer_times(rows: Sequence[Row], metric: str = "forward+backward") -> str:
    """Contestants by sites: the time, and its ratio to the frozen linear."""
    made = []
    for (device, dtype, tokens), here in split(rows, "layer", "device", "dtype", "tokens").items():
        measured = (row for row in here if row.metric == metric and row.median is not None)
        columns = [Column(place(row), row.site, metric) for row in measured]
        title = f"{metric}, {dtype}, {tokens} tokens, {device}"
        made += [_grid(title, here, part) for part in _parts(columns, TIME_COLUMNS)]
    return "\n\n".join(made)


def layer_bytes(rows: Sequence[Row]) -> str:
    """Contestants by sites: bytes saved for backward, the input's part of them, and the peak."""
    made = []
    for (device, dtype, tokens), here in split(rows, "layer", "device", "dtype", "tokens").items():
        columns = [
            Column(f"{place(row)}: {row.metric}", row.site, row.metric)
            for row in here
            if row.metric in ("saved", "saved inputs", "peak") and row.median is not None
        ]
        title = f"memory of a layer, {dtype}, {tokens} tokens, {device}"
        made += [_grid(title, here, part) for part in _parts(columns, BYTE_COLUMNS)]
    return "\n\n".join(made)


def blocks(rows: Sequence[Row]) -> str:
    """Methods by the time of a block, and by the bytes that it saves, trains and holds."""
    return _by_site(rows, "block", (WHOLE, LINEARS, WALL, "saved", "saved inputs", "trained", "weights", "optimizer"))


def kept_by_models(rows: Sequence[Row]) -> str:
    """Methods by the bytes that models save for backward, and by the peak of a step, if counted on meta."""
    made = []
    counted = [row for row in rows if row.device == ANY_DEVICE]
    for (dtype, tokens), here in split(counted, "model", "dtype", "tokens").items():
        columns = [
            Column(f"{row.site}: {row.metric}", row.site, row.metric)
            for row in here
            if row.metric in ("saved", "peak, counted") and row.median is not None
        ]
        title = f"whole models, {dtype}, {tokens} tokens, {ANY_DEVICE}"
        made += [_grid(title, here, part) for part in _parts(columns, BYTE_COLUMNS)]
    return "\n\n".join(made)


def models(rows: Sequence[Row]) -> str:
    """Methods by the bytes that a model saves, trains and holds, and by its peak."""
    saved = ("saved", "saved, one block run again", "saved by the loss")
    return _by_site(rows, "model", (*saved, "trained", "weights", "optimizer", "peak, counted", "peak"))


def steps(rows: Sequence[Row]) -> str:
    """Methods by throughput of full training steps, by the bytes that they save and by their peak."""
    return _by_site(rows, "step", ("throughput", "saved", "peak"))


def ops(rows: Sequence[Row]) -> str:
    """Ops at their sites by backends: the time, and the share of it that the roofline's floor takes."""
    made = []
    for (device, dtype, tokens), here in split(rows, "op", "device", "dtype", "tokens").items():
        times = {(_who(row), row.site): row for row in here if row.metric == "time"}
        shares = {(_who(row), row.site): row for row in here if row.unit == "share"}
        backends = list(dict.fromkeys(row.backend for row in times.values() if row.median is not None))
        lines = []
        for op, site, where in dict.fromkeys((row.contestant, row.site, place(row)) for row in here):
            team = [Who(op, backend) for backend in backends]
            leaders = best(_measured({who: times.get((who, site)) for who in team}), more=False)
            lines.append([op, where, *(_cell(times.get((w, site)), shares.get((w, site)), w in leaders) for w in team)])
        if backends:
            table = [line for line in lines if set(line[2:]) != {_NONE}]
            legend = (
                f"After each time: the share of it that the roofline's floor takes, {_BRACKETS}. "
                "Bold: better than all others of its row by more than the spread."
            )
            notes = [legend, *_ceilings(rows, device, dtype), *_remarks(here, {"time"})]
            title = f"ops, {dtype}, {tokens} tokens, {device}"
            made.append(_assemble(title, ["op", "site", *backends], table, notes, here))
    return "\n\n".join(made)


def update_page(page: Path, tables: Mapping[str, str]) -> None:
    """Replace the text between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` by the table of that name.

    Raises:
        ValueError: a marker that is missing, not closed or present twice; the file is then as it was.

    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = _replaced(text, name, table, page)
    replace_file(page, lambda beside: beside.write_text(text, encoding="utf-8"))


def _replaced(text: str, name: str, table: str, page: Path) -> str:
    opening, closing = f"<!-- bench:{name} -->", "<!-- /bench -->"
    if text.count(opening) != 1:
        raise ValueError(f"{page} has the marker {opening} {text.count(opening)} times, expected once")
    before, _, rest = text.partition(opening)
    inside, found, after = rest.partition(closing)
    if not found or "<!-- bench:" in inside:
        raise ValueError(f"{page} has no {closing} that closes {opening}")
    return f"{before}{opening}\n{table.strip()}\n{closing}{after}"


def latest(rows: Iterable[Row]) -> list[Row]:
    """The latest of the figures with the same key and device: the latest date, and on one date the one read last."""
    kept = {}
    for row in sorted(rows, key=lambda row: row.date):
        shape = (row.dtype, row.tokens, row.in_features, row.out_features)
        kept[row.device, row.group, row.site, shape, row.contestant, row.backend, row.metric] = row
    return list(kept.values())


def split(rows: Iterable[Row], group: str, *names: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows of a group by their values of some fields, in order of appearance."""
    parts: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.group == group:
            key = tuple(str(getattr(row, name)) or f"{name} not recorded" for name in names)
            parts.setdefault(key, []).append(row)
    return parts


def place(row: Row) -> str:
    """The site and its shape."""
    return f"{row.site} ({row.in_features} → {row.out_features})" if row.in_features else row.site


def number(row: Row) -> float:
    """The median of a row that has one."""
    if row.median is None:
        raise ValueError(f"{row.contestant} has no {row.metric} at {row.site}: {row.note or 'no reason given'}")
    return row.median


def spread(row: Row) -> tuple[float, float]:
    """From the 20 % to the 80 % quantile; the median where they were not recorded."""
    low, high = (number(row) if quantile is None else quantile for quantile in (row.q20, row.q80))
    return low, high


def best(figures: Mapping[Who, Row], more: bool) -> set[Who]:
    """Who is better than every other by more than the spread. Exact figures may tie, but at most half of them."""
    if not figures:
        return set()
    lead = (max if more else min)(figures.values(), key=number)
    low, high = spread(lead)
    leaders = {who for who, row in figures.items() if row is lead or (low == high and spread(row) == (low, high))}
    behind = [spread(row) for who, row in figures.items() if who not in leaders]
    apart = all(upper < low if more else lower > high for lower, upper in behind)
    return leaders if len(leaders) <= len(behind) and apart else set()


def _by_site(rows: Sequence[Row], group: str, metrics: Sequence[str]) -> str:
    made = []
    for (device, dtype, tokens, site), here in split(rows, group, "device", "dtype", "tokens", "site").items():
        seen = {row.metric for row in here if row.median is not None}
        columns = [Column(metric, here[0].site, metric) for metric in metrics if metric in seen]
        if columns:
            made.append(_grid(f"{group}: {site}, {dtype}, {tokens} tokens, {device}", here, columns))
    return "\n\n".join(made)


def _parts(columns: Sequence[Column], width: int) -> list[list[Column]]:
    once = list(dict.fromkeys(columns))
    return [once[start : start + width] for start in range(0, len(once), width)]


def _who(row: Row) -> Who:
    return Who(row.contestant, row.backend)


def _measured(rows: Mapping[Who, Row | None]) -> dict[Who, Row]:
    return {who: row for who, row in rows.items() if row is not None and row.median is not None}


def _grid(title: str, rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Contestants by columns; a contestant without any figure is named below."""
    sites, metrics = ({getattr(column, name) for column in columns} for name in ("site", "metric"))
    here = [row for row in rows if row.site in sites]
    figures = {(_who(row), row.site, row.metric): row for row in here}
    cells = [_column(figures, column) for column in columns]
    lines = {who: [column[who] for column in cells] for who in dict.fromkeys(map(_who, here))}
    table = [[who.label, *line] for who, line in lines.items() if set(line) != {_NONE}]
    shown = [row for row in here if row.metric in metrics]
    heads = ["", *(column.heading for column in columns)]
    return _assemble(title, heads, table, [_legend(metrics), *_remarks(here, metrics)], shown)


def _legend(metrics: set[str]) -> str:
    told = [f"{metric}: {meaning}." for metric, meaning in _MEANINGS.items() if metric in metrics]
    if metrics & COMPARED:
        told.append(f"After each figure: its ratio to the frozen one's, {_BRACKETS}.")
    return " ".join(
        [*told, "Bold: better than all others of its column by more than the spread, except the frozen one."]
    )


def _column(figures: Figures, column: Column) -> dict[Who, str]:
    everyone = dict.fromkeys(who for who, _, _ in figures)
    rows = {who: figures.get((who, column.site, column.metric)) for who in everyone}
    ratios = {who: figures.get((who, column.site, column.metric + RATIO)) for who in everyone}
    compared = _measured(ratios) if column.metric in COMPARED else _measured(rows)
    rivals = {who: row for who, row in compared.items() if who.contestant not in FLOORS}
    directed = column.metric in LESS_IS_BETTER | MORE_IS_BETTER
    leaders = best(rivals if directed else {}, column.metric in MORE_IS_BETTER)
    cells = {who: _cell(rows[who], ratios[who], who in leaders) for who in everyone}
    for who in _measured(rows):
        if column.metric in COMPARED and who not in compared:
            cells[who] += ", 1" if who.contestant in FLOORS else ", no ratio"
    return cells


def _cell(row: Row | None, beside: Row | None, bold: bool) -> str:
    """A figure with its ratio or share."""
    if row is None or row.median is None:
        return _NONE
    text = _amount(row)
    if beside is not None and beside.median is not None:
        text = f"{text}, {_relative(beside)}"
    return f"**{text}**" if bold else text


def _amount(row: Row) -> str:
    value = number(row)
    if row.unit == "B":
        return size_text(round(value))
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {'µs' if row.unit == 'us' else row.unit}".strip()


def _relative(row: Row) -> str:
    """``1.08 (1.07-1.10)``, and a share as ``92 % (91-93)``; an exact one has no brackets."""
    low, high = spread(row)
    share = row.unit == "share"
    median, *brackets = (f"{100 * value:.0f}" if share else f"{value:.2f}" for value in (number(row), low, high))
    return median + " %" * share + (f" ({'-'.join(brackets)})" if low < high else "")


def _remarks(rows: Iterable[Row], metrics: set[str]) -> list[str]:
    """Two lists: the contestants without a figure and why, and the notes on figures.

    A reason may be given once, with any metric, for everything that a contestant lacks at a site. A contestant with figures
    elsewhere in the table is named with the site; a note of all contestants names none.
    """
    rows = list(rows)
    seen = {(_who(row), row.site) for row in rows if row.metric in metrics and row.median is not None}
    present = {who for who, _ in seen}
    missing: dict[str, dict[str, None]] = {}
    noted: dict[str, dict[str, None]] = {}
    for row in rows:
        who = _who(row)
        if row.median is None and (row.metric in metrics or (who, row.site) not in seen):
            name = f"{who.label} at {row.site}" if who in present else who.label
            missing.setdefault(row.note or "no reason given", {})[name] = None
        elif row.note and row.median is not None and row.metric in metrics:
            noted.setdefault(row.note, {})[who.label] = None
    said = {note: names if len(names) < len(present) else ["all"] for note, names in noted.items()}
    return [
        "\n".join(
            [heading, "", *(f"- {'; '.join(map(_plain, names))}: {_short(note)}" for note, names in found.items())]
        )
        for heading, found in (("Without a figure:", missing), ("Notes:", said))
        if found
    ]


def _ceilings(rows: Iterable[Row], device: str, dtype: str) -> list[str]:
    """The ceilings behind the floors, if they were measured on the same device."""
    here = split(rows, "ceiling", "device").get((device,), [])
    told = [row for row in here if row.median is not None and (row.metric == "copy" or row.dtype == dtype)]
    return [f"Ceilings of the device: {', '.join(f'{row.metric} {_rate(row)}' for row in told)}."] if told else []


def _rate(row: Row) -> str:
    scale, prefix = (1e12, "T") if number(row) >= 1e12 else (1e9, "G")
    return f"{number(row) / scale:.3g} {prefix}{row.unit}"


def _environments(rows: Iterable[Row]) -> list[str]:
    found = dict.fromkeys((row.device, row.torch, row.triton, row.commit, row.date) for row in rows)
    return [
        _plain(f"Device: {device}; torch {torch}, Triton {triton}; commit {commit}; {date}.")
        for device, torch, triton, commit, date in found
    ]


def _assemble(
    title: str, heads: Sequence[str], lines: Iterable[Sequence[str]], notes: Iterable[str], shown: Iterable[Row]
) -> str:
    rule = ["---" if head in _TEXT else "---:" for head in heads]
    table = [heads, rule, *lines]
    body = "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in table)
    return "\n\n".join([f"**{_plain(title)}**", body, *notes, *_environments(shown)])


def _plain(text: str) -> str:
    """Text that stays within its cell and its paragraph, and is not read as HTML or as a marker."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _short(note: str) -> str:
    return _plain(note if len(note) <= _NOTE else f"{note[:_NOTE]} ...")
