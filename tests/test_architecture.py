"""The picture of the floors is of the imports as they are, and the script that draws it counts right."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def floors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_floors", ROOT / "docs" / "draw_floors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def picture(floors: ModuleType) -> str:
    return floors.picture()


def test_the_committed_picture_is_current(floors: ModuleType, picture: str) -> None:
    assert floors.PICTURE.read_bytes() == picture.encode(), (
        "the imports or the sentences have changed: python docs/draw_floors.py"
    )


def test_there_is_no_circle_and_every_box_is_drawn(floors: ModuleType, picture: str) -> None:
    assert floors.circles(floors.graph()) == []
    for names in floors.layers():
        assert all(f">{floors.FOLDERS.get(f'gain_ops.{name}', name)}" in picture for name in names)


def test_what_is_imported(floors: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import torch\nfrom gain_ops import reference\nfrom gain_ops.ops.raw import scale\n"
        "def late():\n    from gain_ops.ops import sharding\n"
    )
    known = {f"gain_ops.{name}" for name in ("reference", "ops", "ops.raw", "ops.sharding", "models")} | {"gain_ops"}
    assert floors.imports(path, known) == {"gain_ops.reference", "gain_ops.ops.raw", "gain_ops.ops.sharding"}


@pytest.mark.parametrize("wrong", [{"low": {"high"}}, {"low": {"beside"}}, {"high": {""}}])
def test_an_import_that_does_not_go_down_is_refused(floors: ModuleType, wrong: dict[str, set[str]]) -> None:
    below: dict[str, set[str]] = {"": {"high"}, "high": {"low"}, "low": set(), "beside": set()}
    layers = [["high"], ["low", "beside"]]
    floors.refuse_upward(layers, below)
    with pytest.raises(SystemExit, match="which is not below it"):
        floors.refuse_upward(layers, below | wrong)
    with pytest.raises(SystemExit, match=r"folders differ in: beside"):
        floors.refuse_upward([["high"], ["low"]], below)


def test_circles_and_depth(floors: ModuleType) -> None:
    between = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": {"e"}, "e": set()}
    assert floors.circles(between) == [["b", "c"]]
    assert floors.depth(between) == 4
