"""Files and folders are whole or absent."""

from pathlib import Path

import pytest

from gain_ops.files import replace_file, replace_folder


def test_a_file_is_replaced(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")
    replace_file(path, lambda beside: beside.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(beside: Path) -> None:
        assert beside.suffix == ".json"
        beside.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "deep" / "model"
    for name in ("one", "two"):
        with replace_folder(path) as beside:
            (beside / name).touch()
    assert [file.name for file in path.iterdir()] == ["two"]
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()

    def fail() -> None:
        with replace_folder(path) as beside:
            (beside / "new").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name.startswith(".part-"):
            raise OSError("moved away")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)

    def replace() -> None:
        with replace_folder(path) as beside:
            (beside / "new").touch()

    with pytest.raises(OSError, match="moved away"):
        replace()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]
