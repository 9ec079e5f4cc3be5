"""Files and folders are whole or absent."""

import errno
import os
from pathlib import Path

import pytest

from gain_ops.utils.files import StagedFolder, copy_file, replace_file, stage_of, staged_folder


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


def test_the_folder_of_a_file_is_made(tmp_path: Path):
    path = tmp_path / "runs" / "one" / "a.json"
    replace_file(path, lambda beside: beside.write_text("new"))
    assert path.read_text() == "new"


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(IsADirectoryError, match="runs is a folder: name a file in it"):
        replace_file(tmp_path / "runs", lambda beside: pytest.fail("written"))
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, there: bool):
    target, link = tmp_path / "store" / "blob", tmp_path / "a.json"
    link.symlink_to(Path("store") / "blob")
    if there:
        target.parent.mkdir()
        target.write_text("old")

    def write(beside: Path) -> None:
        assert beside.suffix == ".json"
        assert beside.parent == target.parent, "a move to another file system would not be at once"
        beside.write_text("new")

    replace_file(link, write)
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def _no_system_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "copy_file_range", refuse)


def _copy_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some systems copy a part, and then nothing more."""
    whole, calls = os.copy_file_range, []

    def part(source: int, target: int, count: int) -> int:
        calls.append(count)
        return whole(source, target, 1000) if len(calls) < 3 else 0

    monkeypatch.setattr(os, "copy_file_range", part)


@pytest.mark.parametrize("size", [0, 1, 5000, 9_000_001])
@pytest.mark.parametrize("system", [None, _no_system_copy, _copy_that_stops])
def test_a_copy_has_the_same_bytes_whatever_the_system_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, system
):
    if system is not None:
        system(monkeypatch)
    source, target, steps = tmp_path / "a", tmp_path / "b", []
    source.write_bytes(os.urandom(size))
    target.write_bytes(b"longer and older" * 10)
    copy_file(source, target, steps.append)
    assert target.read_bytes() == source.read_bytes()
    assert sum(steps) == size


def test_a_file_that_shrinks_while_it_is_copied_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _no_system_copy(monkeypatch)
    source = tmp_path / "a"
    source.write_bytes(bytes(9_000_000))
    with pytest.raises(OSError, match="became shorter"):
        copy_file(source, tmp_path / "b", lambda count: os.truncate(source, 5_000_000))


def _write(staged: StagedFolder, *names: str) -> None:
    for name in names:
        (staged.folder / name).parent.mkdir(exist_ok=True)
        (staged.folder / name).write_text(name)
        staged.finish(name, {"of": name})


def _cut_after(path: Path, identity: str, *names: str) -> None:
    """A run that ends with an error once these files are finished and another is half-written."""
    with pytest.raises(RuntimeError):
        _run_and_fail(path, identity, *names)


def _run_and_fail(path: Path, identity: str, *names: str) -> None:
    with staged_folder(path, identity) as staged:
        _write(staged, *names)
        (staged.folder / "half").write_text("ha")
        raise RuntimeError


def test_a_folder_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "deep" / "model"
    for name in ("one", "two"):
        with staged_folder(path, name) as staged:
            _write(staged, name)
            assert not (path / name).exists()
    assert [file.name for file in path.iterdir()] == ["two"]
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    _cut_after(path, "a")
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_goes_on_where_the_last_was_cut(tmp_path: Path):
    path = tmp_path / "model"
    _cut_after(path, "a", "one", "sub/two")
    assert [*tmp_path.iterdir()] == [stage_of(path)]
    with staged_folder(path, "a") as staged:
        assert staged.finished == {"one": {"of": "one"}, "sub/two": {"of": "sub/two"}}
        assert not (staged.folder / "half").exists()
        _write(staged, "three")
    assert sorted(file.name for file in path.iterdir()) == ["one", "sub", "three"]
    assert (path / "sub" / "two").read_text() == "sub/two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_with_other_inputs_starts_anew(tmp_path: Path):
    path = tmp_path / "model"
    _cut_after(path, "a", "one")
    with staged_folder(path, "b") as staged:
        assert staged.finished == {}
        assert list(staged.folder.iterdir()) == []
        _write(staged, "two")
    assert [file.name for file in path.iterdir()] == ["two"]


@pytest.mark.parametrize("journal", ["", "[]", "{}", '{"identity": "a"}'])
def test_a_journal_that_cannot_be_read_counts_for_nothing(tmp_path: Path, journal: str):
    path = tmp_path / "model"
    _cut_after(path, "a", "one")
    (stage_of(path) / "journal.json").write_text(journal)
    with staged_folder(path, "a") as staged:
        assert staged.finished == {}
        assert list(staged.folder.iterdir()) == []


def test_what_is_discarded_does_not_outlive_an_error(tmp_path: Path):
    def run() -> None:
        with staged_folder(tmp_path / "model", "a") as staged:
            _write(staged, "one")
            staged.discard()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name == "files":
            raise OSError("moved away")
        return rename(self, target)

    def replace() -> None:
        with staged_folder(path, "a") as staged:
            _write(staged, "new")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse_the_new)
        with pytest.raises(OSError, match="moved away"):
            replace()
    assert [file.name for file in path.iterdir()] == ["old"]
    replace()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moved", [False, True], ids=["before the new is in place", "after it"])
def test_a_crash_between_the_two_moves_loses_neither_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
):
    class Crash(BaseException):
        pass

    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def crash(self: Path, target: Path) -> Path:
        if self.name == "files":
            if moved:
                rename(self, target)
            raise Crash
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        with pytest.raises(Crash), staged_folder(path, "a") as staged:
            _write(staged, "new")
    with staged_folder(path, "a") as staged:
        assert [file.name for file in path.iterdir()] == (["new"] if moved else ["old"])
        assert list(staged.finished) == ([] if moved else ["new"])
        _write(staged, "new")
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_two_runs_at_once_are_kept_apart(tmp_path: Path):
    path = tmp_path / "model"
    with staged_folder(path, "a") as staged:
        _write(staged, "one")
        with pytest.raises(OSError, match=r"another run is writing .*model"), staged_folder(path, "a"):
            pass
        assert (staged.folder / "one").exists()
    assert (path / "one").exists()
