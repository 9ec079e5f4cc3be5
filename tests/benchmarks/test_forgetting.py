"""The published studies of forgetting: how they are run, and that the page says what their results say."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from benchmarks.report import forgetting
from benchmarks.report.report import update_page
from gain_study.engine import running
from gain_study.engine.records import RESULTS, read
from gain_study.engine.settings import Settings
from gain_study.report import metrics, report
from gain_study.report.pages import html

RESULTS_FILES = sorted(forgetting.PUBLISHED.glob(f"*/{RESULTS}"))


class _Asked(Exception):
    """In the place of a study."""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Path, int, int]]:
    """The models that were trained, in no time: their folders, of how many texts, and how wide."""
    found = []

    def save(folder: Path, mixture: list[object], *, steps: int, width: int) -> None:
        folder.mkdir()
        found.append((folder.resolve(), len(mixture), width))

    monkeypatch.setattr(forgetting, "save_toy_model", save)
    for text in forgetting.LEARNED_BEFORE:
        (tmp_path / "texts" / text).mkdir(parents=True)
        (tmp_path / "texts" / text / "0.txt").write_text("something\n" * 100)
    return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trained: object) -> Callable[..., Settings]:
    """``asked(name, *more)``: the settings that a study would be run with."""

    def ask(name: str, *more: str) -> Settings:
        found: list[Settings] = []

        def keep(settings: Settings, watcher: object) -> None:
            found.append(settings)
            raise _Asked

        monkeypatch.setattr(running, "study", keep)
        with pytest.raises(_Asked):
            forgetting.run(name, tmp_path, more)
        return found[0]

    return ask


@pytest.mark.parametrize("name", forgetting.STUDIES)
def test_a_study_has_three_seeds_two_orders_and_its_own_folder(name, asked):
    settings = asked(name)
    assert (settings.out, len(settings.seeds), settings.orders) == (Path(name), 3, 2)
    assert {"gain-ffn", "lora"} < set(settings.methods)


def test_options_after_the_name_choose_a_part(asked):
    settings = asked("smollm2", "--methods", "lora", "--seeds", "1")
    assert (settings.methods, tuple(settings.seeds), settings.steps) == (("lora",), (1,), 16)


def test_a_missing_model_is_trained_before_the_study(asked, trained, tmp_path: Path):
    asked("small-100")
    assert trained == [(tmp_path / "small-model", 4, 160)]
    asked("small-25")
    asked("smollm2")
    assert len(trained) == 1


@pytest.mark.parametrize("path", RESULTS_FILES, ids=lambda path: path.parent.name)
def test_published_results_are_of_the_study_of_that_name(path, asked):
    there, settings = read(path).header.settings, asked(path.parent.name).as_json()
    for part in ("methods", "seeds"):  # it may not be finished
        assert set(there.pop(part)) <= set(settings.pop(part))
    assert {name: (there[name], value) for name, value in settings.items() if there[name] != value} == {}


def test_the_page_has_the_tables_of_the_published_results(tmp_path: Path):
    assert RESULTS_FILES
    page = tmp_path / "page.md"
    page.write_text(forgetting.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    update_page(page, forgetting.tables({path.parent.name: read(path) for path in RESULTS_FILES}))
    assert page.read_text(encoding="utf-8") == forgetting.PAGE.read_text(encoding="utf-8")


def test_the_plot_has_a_panel_for_each_thing_that_is_varied_and_a_line_a_method():
    pytest.importorskip("matplotlib")
    studies = {path.parent.name: read(path) for path in RESULTS_FILES}
    figure = forgetting.draw(studies)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    shown = [
        title
        for title, labels in forgetting._PANELS.items()
        if len(studies.keys() & labels.keys()) >= min(2, len(labels))
    ]
    assert titles == shown
    labels = {label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]}
    assert {"gain-ffn", "lora"} <= labels
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert all(low < y < high for line in axes.get_legend_handles_labels()[0] for y in line.get_ydata())


@pytest.mark.parametrize("name", forgetting.REPORTS)
def test_a_published_report_says_what_the_published_results_say(name):
    study = read(forgetting.PUBLISHED / name / RESULTS)
    page = forgetting.REPORTS[name].read_text(encoding="utf-8")
    blocks = [block for section in report.sections(study, plots=()) for block in section.blocks]
    assert len(blocks) > 30
    assert [block for block in blocks if html(block) not in page] == []


@pytest.mark.parametrize("page", ["README.md", "docs/forgetting.md"])
def test_what_is_claimed_in_words_is_what_was_measured(page):
    text = (forgetting.PAGE.parents[1] / page).read_text(encoding="utf-8")
    study = read(forgetting.PUBLISHED / "smollm2" / RESULTS)
    earlier = metrics.values(metrics.runs(study), metrics.EARLIER, 4)
    for method in ("gain-ffn", "lora"):
        found = metrics.spread_of(metrics.EARLIER, earlier[method])
        assert found.count == 6
        assert f"{-found.mean:.1f} ± {found.deviation:.1f} %" in text


def test_results_name_no_place_on_a_machine():
    for path in [*RESULTS_FILES, *forgetting.REPORTS.values()]:
        text = path.read_text(encoding="utf-8")
        assert "/tmp" not in text
        assert "/home" not in text
        assert "/root" not in text
