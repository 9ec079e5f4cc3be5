"""The report of a study says what is there, and what is not; nothing that it is given can break its page."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gain_study.engine import chosen_rates, records
from gain_study.report import metrics, pages, report, tables
from gain_study.report.plots import Plot

from support.synthetic_studies import killed, make_study, renamed

VOID = {"meta", "img", "br"}


class _Page(HTMLParser):
    """Fails on a tag that does not nest; gathers the text, links, ids and images."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.links, self.ids, self.sources = set(), set(), []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "a":
            self.links.add(found["href"])
        self.ids.add(found.get("id"))
        self.sources += [found[key] for key in ("src", "data", "srcset") if key in found]
        assert not any(key.startswith("on") for key in found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def quick_plots(monkeypatch):
    """One small picture in the place of all plots, which have tests of their own."""

    def write_plots(study, folder):
        path = folder / "trade-off.png"
        path.write_bytes(b"\x89PNG")
        return [Plot(path, "Learning <against> forgetting", "caption")]

    monkeypatch.setattr(report, "write_plots", write_plots)


def _written(study, folder):
    page, markdown, *_ = report.write_report(study, folder)
    return page.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def test_the_report_is_one_page_with_all_sections_and_plots_within(tmp_path: Path):
    written = report.write_report(make_study(2, 2), tmp_path / "new" / "folder")
    names = [path.name for path in written]
    assert names[:2] == ["report.html", "report.md"]
    assert sorted(names) == sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    text = written[0].read_text(encoding="utf-8")
    page = _Page(text)
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    assert page.tags.count("h2") == len(page.links) == 10
    assert len(page.sources) == len(names) - 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"https?://|@import|url\(|<script", text)
    assert '<meta name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.usefixtures("quick_plots")
def test_the_same_study_gives_the_same_bytes(tmp_path: Path):
    study = make_study(2, 2, 2)
    assert _written(study, tmp_path) == _written(replace(study, stages=study.stages[::-1]), tmp_path)


@pytest.mark.usefixtures("quick_plots")
def test_a_report_of_a_file_is_that_of_its_records(tmp_path: Path):
    study = make_study(2, 2)
    path = tmp_path / "results.jsonl"
    for record in (study.header, study.base, *study.rates, *study.stages):
        records.append(path, record)
    assert _written(records.read(path), tmp_path) == _written(study, tmp_path)


@pytest.mark.usefixtures("quick_plots")
@pytest.mark.parametrize("stages", range(9))
def test_a_study_that_was_killed_says_what_is_missing(tmp_path: Path, stages):
    study = killed(make_study(2, 2, 2), stages)
    page, markdown = _written(study, tmp_path)
    _Page(page)
    for method, first in (("gain-ffn", 0), ("lora", 4)):
        runs = min(max(stages - first, 0) // 2, 2)
        assert (f"| {method} | {runs} of 2 | {stages - first == 2 * runs + 1:d} |" in markdown) == (runs < 2)
    assert ("No stage is finished yet." in markdown) == (stages == 0)
    assert ("No run is further than stage 1 of 2" in markdown) == (stages == 1)
    assert ("Not finished" in page) == (stages < 8)


@pytest.mark.usefixtures("quick_plots")
def test_before_the_base_was_measured_there_is_a_report(tmp_path: Path):
    study = make_study(2, 2)
    page, markdown = _written(replace(study, base=None, stages=[], rates=[]), tmp_path)
    _Page(page)
    assert "The base model has not been measured yet" in markdown


@pytest.mark.usefixtures("quick_plots")
@pytest.mark.parametrize(
    ("methods", "domains", "seeds", "held_out", "tasks"),
    [(1, 1, 1, False, ()), (1, 3, 2, True, ("t",)), (2, 1, 3, False, ())],
)
def test_small_studies(tmp_path: Path, methods, domains, seeds, held_out, tasks):
    page, markdown = _written(make_study(methods, domains, seeds, held_out=held_out, tasks=tasks), tmp_path)
    _Page(page)
    assert ("nothing is known of forgetting" in markdown) == (domains == 1)
    assert ("held out, %" in markdown) == held_out
    assert ("Multiple-choice" in markdown) == bool(tasks)
    assert ("nothing is known of the spread" in markdown) == (seeds == 1)
    assert "None" not in "".join(_Page(page).texts)
    assert "nan" not in markdown


@pytest.mark.usefixtures("quick_plots")
def test_names_cannot_break_the_page_nor_the_tables(tmp_path: Path):
    name = "<b>&|</td>\n`lora`\"'"
    study = renamed(make_study(2, 2, 2), "lora", name)
    study = replace(study, header=replace(study.header, model="</title><script>alert(1)</script>"))
    text, markdown = _written(study, tmp_path)
    page = _Page(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.texts.count(name) > 10
    assert "<" not in markdown
    found = [block for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(found) == 9
    for block in found:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(columns) == 1


def test_spreads_are_written_by_how_many_figures_there_are():
    assert tables.spread_text(None) == "-"
    assert tables.spread_text(metrics.spread([-3.21])) == "-3.2"
    assert tables.spread_text(metrics.spread([1.0, 2.0])) == "+1.5 (+1.0 to +2.0)"
    assert tables.spread_text(metrics.spread([1.0, 2.0, 6.0])) == "+3.0 ± 2.6"
    assert tables.spread_text(metrics.spread([-0.01])) == "+0.0"
    assert tables.perplexity_text(9.876) == "9.88"
    assert tables.perplexity_text(123_456_789.0) == "1.23e+08"


def test_the_summary_has_the_figures_of_the_measures():
    study = make_study(2, 3, 3)
    some = metrics.runs(study)
    table = tables.summary(some, 3)
    assert [row[:2] for row in table.rows] == [["gain-ffn", "3"], ["lora", "3"]]
    column = list(table.columns).index("earlier domains, %")
    found = metrics.values(some, metrics.EARLIER, 3)["lora"]
    assert table.rows[1][column] == tables.spread_text(metrics.spread_of(metrics.EARLIER, found))


def test_the_final_perplexities_stand_beside_the_bases():
    study = make_study(1, 2)
    table = tables.final_perplexities(study, metrics.runs(study), 2)
    assert table.rows[0] == ["base", "10.00", "13.00", "16.00"]
    last = study.stages[-1].perplexity["python"]
    assert table.rows[1][1] == f"{last:.2f} ({100 * (last / 10 - 1):+.1f} %)"


def test_differences_stand_out_where_they_are_larger_than_the_spread():
    clear = tables.differences(metrics.runs(make_study(2, 3, 4)), metrics.EARLIER, 3)
    assert isinstance(clear.rows[0][2], tables.Strong)
    assert clear.rows[0][2].startswith("-")
    assert clear.rows[1][1].startswith("+")
    same = make_study(2, 3, 3)
    twin = [s for s in same.stages if s.method == "gain-ffn"]
    same = replace(same, stages=[*twin, *(replace(stage, method="lora") for stage in twin)])
    row = tables.differences(metrics.runs(same), metrics.EARLIER, 3).rows[0]
    assert row[1:] == ["-", "+0.0 ± 0.0"]
    assert not isinstance(row[2], tables.Strong)


def test_methods_are_ranked_and_compared_with_the_best_run_by_run():
    runs = metrics.runs(make_study(3, 3, 4))
    table = tables.against_best(runs, metrics.EARLIER, 3)
    assert table.columns[4] == "above gain-ffn, %"
    assert [row[0] for row in table.rows] == ["gain-ffn", "lora", "full"]
    values = metrics.values(runs, metrics.EARLIER, 3)
    for method, count, change, beyond, *compared in table.rows:
        assert (count, change) == ("4", tables.spread_text(metrics.spread_of(metrics.EARLIER, values[method])))
        assert beyond == ("yes" if metrics.spread_of(metrics.EARLIER, values[method]).beyond else "no")
        above = metrics.paired(metrics.EARLIER, values[method], values["gain-ffn"])
        assert compared == (["-"] * 3 if method == "gain-ffn" else [tables.spread_text(above), "4", "yes"])
        assert method == "gain-ffn" or above.low > 0


def test_what_all_runs_do_not_agree_on_is_not_beyond_its_spread():
    study = make_study(2, 3, 4)
    twin = [stage for stage in study.stages if stage.method == "gain-ffn"]
    study = replace(study, stages=[*twin, *(replace(stage, method="lora") for stage in twin)])
    row = tables.against_best(metrics.runs(study), metrics.EARLIER, 3).rows[1]
    assert row[4:] == ["+0.0 ± 0.0", "4", "no"]
    row = tables.against_best(metrics.runs(make_study(2, 3, 3)), metrics.EARLIER, 3).rows[1]
    assert (row[3], row[5:]) == ("too few runs", ["3", "too few runs"])


def test_methods_without_a_run_in_common_are_not_compared():
    study = make_study(2, 2, 2)
    apart = [stage for stage in study.stages if (stage.method == "lora") == (stage.seed == 1)]
    row = tables.against_best(metrics.runs(replace(study, stages=apart)), metrics.EARLIER, 2).rows[1]
    assert (row[1], row[4:]) == ("1", ["-", "0", "-"])


def test_the_best_at_matched_perplexity_is_matched_in_all_stages():
    study = make_study(2, 4)
    table = tables.matched_against_best(metrics.runs(study))
    assert [(row[0], row[4], row[-1]) for row in table.rows] == [
        ("gain-ffn", "-", "4 of 4"),
        ("lora", table.rows[1][4], "4 of 4"),
    ]

    def learns_nothing(stage):
        curve = [replace(point, perplexity=dict(study.base.perplexity)) for point in stage.curve]
        return replace(stage, curve=curve) if (stage.method, stage.number) == ("gain-ffn", 2) else stage

    study = replace(study, stages=[learns_nothing(stage) for stage in study.stages])
    table = tables.matched_against_best(metrics.runs(study))
    assert [(row[0], row[-1]) for row in table.rows] == [("gain-ffn", "3 of 4"), ("lora", "4 of 4")]
    assert table.columns[4] == "above lora, %"
    assert table.rows[0][4].startswith("-")


def test_a_finished_study_without_doubts_says_nothing_of_either():
    study = make_study(3, 3, 4)
    assert tables.unfinished(study).rows == tables.doubted_rates(study).rows == []


def test_the_lowest_rate_is_chosen_of_those_that_one_domain_does_not_tell_apart():
    assert (
        chosen_rates.choose({3e-3: 7.511, 1e-2: 7.371, 3e-2: 7.355, 1e-1: 13.99}) == 1e-2
    )  # 3e-2 is next to diverging
    assert chosen_rates.choose({1e-2: 7.6, 3e-2: 7.3}) == 3e-2
    assert chosen_rates.choose({1e-2: 7.3, 3e-2: 7.6}) == 1e-2


def test_a_rate_on_the_edge_of_its_grid_is_doubted():
    study = make_study(1, 1)
    assert chosen_rates.doubt(study, "gain-ffn") is None  # 0.1 diverged, 0.03 is worse

    def with_rates(rates):
        return replace(study, rates=[rate for rate in study.rates if rate.lr in rates])

    assert "lower edge" in chosen_rates.doubt(with_rates([0.01, 0.03]), "gain-ffn")
    assert "upper edge" in chosen_rates.doubt(with_rates([0.001, 0.01]), "gain-ffn")
    assert chosen_rates.doubt(with_rates([0.01, 0.003, 0.1]), "gain-ffn") is None
    assert chosen_rates.doubt(with_rates([0.01]), "gain-ffn") == "only one rate was tried"
    assert chosen_rates.doubt(replace(with_rates([0.1]), stages=[]), "gain-ffn") == "all diverged"
    (row,) = tables.doubted_rates(with_rates([0.001, 0.01])).rows
    assert row == ["gain-ffn", "0.01", "on the upper edge of the grid: a higher rate may be better"]


def test_a_method_that_takes_anothers_rate_is_judged_by_its_grid():
    study = renamed(make_study(2, 1), "gain-ffn", "lora-replay")
    study = replace(study, rates=[rate for rate in study.rates if rate.method == "lora" and rate.lr <= 0.01])
    assert "upper edge" in chosen_rates.doubt(study, "lora-replay")
    text = tables.learning_rates(study).rows[0][1]
    assert text.startswith("those of lora: 0.001: ")


def test_a_table_may_have_no_headings():
    text = pages.to_html("title", [pages.Section("section", [tables.Table(["", ""], [["a", "b"]])])])
    assert "<thead" not in text
    assert "<td" in text
