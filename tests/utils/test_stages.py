"""Folders are whole or absent, and only a working folder of ours is written to and emptied."""

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gain_ops.utils import stages
from gain_ops.utils.errors import BusyError, FileError
from gain_ops.utils.stages import StagedFolder, stage_of, staged_folder


def _write(staged: StagedFolder, *names: str) -> None:
    for name in names:
        (staged.folder / name).parent.mkdir(exist_ok=True)
        (staged.folder / name).write_text(name)
        staged.finish(name, {"of": name})


def _stage(path: Path) -> Path:
    found = stage_of(path)
    assert found is not None
    return found


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
    assert [*tmp_path.iterdir()] == [_stage(path)]
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


@pytest.mark.parametrize(
    "journal",
    [
        "",
        "[]",
        "{}",
        '{"identity": "a"}',
        '{"identity": "a", "finished": ["one"]}',
        '{"identity": "a", "finished": {"one": []}}',
        '{"identity": "a", "finished": {"one": {"size": 3}}}',
        '{"identity": "a", "finished": {"one": 3}}',
    ],
)
def test_a_journal_that_cannot_be_read_counts_for_nothing(tmp_path: Path, journal: str):
    path = tmp_path / "model"
    _cut_after(path, "a", "one")
    (_stage(path) / "journal.json").write_text(journal)
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


def test_two_runs_that_begin_at_once_are_kept_apart(tmp_path: Path):
    """Neither sees a working folder without its marker, and one of them is refused."""
    path, begin, told = tmp_path / "model", threading.Barrier(2), []

    def run() -> None:
        begin.wait()
        try:
            with staged_folder(path, "a") as staged:
                _write(staged, "one")
                begin.wait(10)
            told.append("written")
        except BusyError:
            begin.wait(10)
            told.append("refused")

    for _ in range(4):
        told.clear()
        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(told) == ["refused", "written"]
        assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_begins_between_the_look_and_the_making_of_another_stays_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, look, first = tmp_path / "model", stages.stage_of, []

    def late(asked: Path) -> Path | None:
        found = look(asked)
        if not first:
            first.append(staged_folder(path, "a"))
            first[0].__enter__()
        return found

    monkeypatch.setattr(stages, "stage_of", late)
    with pytest.raises(BusyError), staged_folder(path, "a"):
        pass
    assert [found.name for found in tmp_path.iterdir()] == [".part-model"]
    first[0].__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == [path]


def _folder(place: Path, home: Path) -> None:
    place.mkdir()


def _link(place: Path, home: Path) -> None:
    place.symlink_to(home)


def _file(place: Path, home: Path) -> None:
    place.write_text("mine")


def _link_to_nothing(place: Path, home: Path) -> None:
    place.symlink_to(home / "nowhere")


def _pipe(place: Path, home: Path) -> None:
    os.mkfifo(place)


def _with_files(place: Path, home: Path) -> None:
    (place / "files").mkdir(parents=True)
    (place / "files" / "thesis").write_text("mine")
    (place / "journal.json").write_text(json.dumps({"identity": "a", "finished": {}}))


def _of_another(place: Path, home: Path) -> None:
    _with_files(place, home)
    (place / "made-by-gain-ops.json").write_text(json.dumps({"working folder of": "another"}))


def _whose_marker_is_a_link(place: Path, home: Path) -> None:
    _with_files(place, home)
    (home / "marker").write_text(json.dumps({"working folder of": "model"}))
    (place / "made-by-gain-ops.json").symlink_to(home / "marker")


def _made_by(place: Path) -> None:
    place.mkdir()
    (place / "made-by-gain-ops.json").write_text(json.dumps({"working folder of": "model"}))


def _whose_files_are_a_link(place: Path, home: Path) -> None:
    _made_by(place)
    (place / "files").symlink_to(home)


def _whose_old_is_a_link(place: Path, home: Path) -> None:
    _made_by(place)
    (place / "old").symlink_to(home)


def _whose_journal_is_a_link(place: Path, home: Path) -> None:
    _made_by(place)
    (place / "journal.json").symlink_to(home / "thesis")


def _tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("taken", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        _folder,
        _link,
        _file,
        _link_to_nothing,
        _pipe,
        _with_files,
        _of_another,
        _whose_marker_is_a_link,
        _whose_files_are_a_link,
        _whose_old_is_a_link,
        _whose_journal_is_a_link,
    ],
)
def test_what_is_not_ours_stays_and_another_name_is_taken(
    tmp_path: Path, make: Callable[[Path, Path], None], taken: int
):
    home, path = tmp_path / "home", tmp_path / "model"
    home.mkdir()
    (home / "thesis").write_text("mine")
    for number in range(taken):
        make(tmp_path / (f".part-model-{number}" if number else ".part-model"), home)
    before = _tree(tmp_path)
    _cut_after(path, "a", "one")
    assert _stage(path).name == f".part-model-{taken}"
    with staged_folder(path, "a") as staged:
        assert list(staged.finished) == ["one"]
        _write(staged, "two")
    assert sorted(_tree(path)) == ["one", "two"]
    assert {name: text for name, text in _tree(tmp_path).items() if not name.startswith("model")} == before


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users have numbers on POSIX alone")
def test_a_working_folder_of_another_user_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model"
    _cut_after(path, "a", "one")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert stage_of(path) is None
    with staged_folder(path, "a") as staged:
        assert not staged.finished
        _write(staged, "two")
    monkeypatch.undo()
    assert (_stage(path) / "files" / "one").exists()


def test_others_cannot_write_into_a_working_folder(tmp_path: Path):
    with staged_folder(tmp_path / "model", "a") as staged:
        assert staged.folder.parent.stat().st_mode & 0o077 == 0
        ordinary = tmp_path / "ordinary"
        ordinary.mkdir()
        assert staged.folder.stat().st_mode == ordinary.stat().st_mode


def test_links_that_somebody_put_among_the_files_are_removed_and_not_followed(tmp_path: Path):
    home, path = tmp_path / "home", tmp_path / "model"
    (home / "deep").mkdir(parents=True)
    (home / "deep" / "thesis").write_text("mine")
    _cut_after(path, "a", "one", "two")
    files = _stage(path) / "files"
    (files / "three").symlink_to(home / "deep" / "thesis")
    (files / "four").symlink_to(home / "nowhere")
    (files / "sub").symlink_to(home / "deep")
    (files / "two").unlink()
    (files / "two").symlink_to(home / "deep" / "thesis")
    os.mkfifo(files / "pipe")
    with staged_folder(path, "a") as staged:
        assert list(staged.finished) == ["one"]
        assert [file.name for file in staged.folder.iterdir()] == ["one"]
    assert (home / "deep" / "thesis").read_text() == "mine"
    assert not (home / "nowhere").exists()


@pytest.mark.parametrize("change", ["cut", "written again", "gone"])
def test_a_finished_file_that_is_no_longer_as_it_was_is_not_finished(tmp_path: Path, change: str):
    path = tmp_path / "model"
    _cut_after(path, "a", "one", "two")
    file = _stage(path) / "files" / "two"
    if change == "cut":
        os.truncate(file, 1)
    elif change == "written again":
        file.write_text("owt")
        os.utime(file, ns=(1, 1))
    else:
        file.unlink()
    with staged_folder(path, "a") as staged:
        assert list(staged.finished) == ["one"]
        assert not file.exists()


def test_what_somebody_keeps_in_our_working_folder_stays(tmp_path: Path):
    path = tmp_path / "model"
    _cut_after(path, "a", "one")
    thesis = _stage(path) / "thesis"
    thesis.write_text("mine")
    with staged_folder(path, "a"):
        pass
    assert (path / "one").exists()
    assert thesis.read_text() == "mine"
    assert stage_of(path) is None


@pytest.mark.parametrize("at", ["first", "last"])
@pytest.mark.parametrize(("make", "kind"), [(_file, "a file"), (_pipe, "a pipe")])
def test_what_is_no_folder_is_not_replaced(tmp_path: Path, make: Callable[[Path, Path], None], kind: str, at: str):
    path = tmp_path / "model"
    if at == "first":
        make(path, tmp_path)

    def run() -> None:
        with staged_folder(path, "a"):
            assert at == "last"
            make(path, tmp_path)

    with pytest.raises(FileError, match=f"model is {kind}: name a folder"):
        run()
    assert not path.is_dir()
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_folder_stays_one(tmp_path: Path):
    (tmp_path / "store" / "real").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "store" / "real")
    with staged_folder(tmp_path / "model", "a") as staged:
        _write(staged, "one")
    assert (tmp_path / "model").is_symlink()
    assert [path.name for path in (tmp_path / "store").rglob("*")] == ["real", "one"]


def test_a_long_name_has_a_working_folder_too(tmp_path: Path):
    path = tmp_path / ("m" * 255)
    _cut_after(path, "a", "one")
    with staged_folder(path, "a") as staged:
        assert list(staged.finished) == ["one"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named(tmp_path: Path):
    with pytest.raises(OSError, match="No space") as caught, staged_folder(tmp_path / "model", "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "model")
