"""Files are whole or absent, and nothing but regular files is replaced."""

import errno
import multiprocessing
import os
import socket
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gain_ops.utils.errors import BusyError, FileError
from gain_ops.utils.files import copy_file, is_unfinished, locked_folder, replace_file


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
    copy_file(source, target, steps.append)
    assert target.read_bytes() == source.read_bytes()
    assert sum(steps) == size


def test_a_file_that_shrinks_while_it_is_copied_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _no_system_copy(monkeypatch)
    source = tmp_path / "a"
    source.write_bytes(bytes(9_000_000))
    with pytest.raises(OSError, match="became shorter"):
        copy_file(source, tmp_path / "b", lambda count: os.truncate(source, 5_000_000))


def test_a_copy_is_never_written_through_what_is_there(tmp_path: Path):
    source, link = tmp_path / "a", tmp_path / "b"
    source.write_text("new")
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        copy_file(source, link, lambda count: None)
    assert not (tmp_path / "elsewhere").exists()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("through_link", [False, True])
@pytest.mark.parametrize(("make", "kind"), [(_pipe, "a pipe"), (_socket, "a socket"), (_device, "a device")])
def test_what_is_no_file_is_neither_replaced_nor_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], kind: str, through_link: bool
):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    special = path = Path("special")
    make(special)
    if through_link:
        path = Path("link")
        path.symlink_to(special)
    before = special.lstat()
    with pytest.raises(FileError, match=f"{path} is {kind}: name a regular file"):
        replace_file(path, lambda beside: pytest.fail("written"))
    assert os.path.samestat(special.lstat(), before)
    assert special.lstat().st_mode == before.st_mode
    assert {found.name for found in tmp_path.iterdir()} == {special.name, path.name}


def test_the_systems_own_device_stays_one(tmp_path: Path):
    link = tmp_path / "gains.safetensors"
    link.symlink_to("/dev/null")
    for path in (Path("/dev/null"), Path("/dev/stdin").parent / "null", link):
        with pytest.raises(FileError, match="is a device"):
            replace_file(path, lambda beside: beside.write_text("new"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_link_that_leads_to_itself_is_an_error_of_the_system(tmp_path: Path):
    link = tmp_path / "a"
    link.symlink_to(link)
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(link, lambda beside: pytest.fail("written"))
    assert link.is_symlink()


def test_a_new_file_has_the_users_mode_and_a_replaced_one_keeps_its_own(tmp_path: Path):
    ordinary, path = tmp_path / "ordinary", tmp_path / "a"
    ordinary.touch()
    replace_file(path, lambda beside: beside.write_text("one"))
    assert path.stat().st_mode == ordinary.stat().st_mode
    path.chmod(0o640)
    replace_file(path, lambda beside: beside.write_text("two"))
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", 0o640)


def test_a_protected_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a"
    path.write_text("old")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda file, mode: not (Path(file) == path and mode & os.W_OK))  # root may all
    with pytest.raises(PermissionError, match="a'"):
        replace_file(path, lambda beside: pytest.fail("written"))
    assert path.read_text() == "old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path, number: int):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        replace_file(path, fail)
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_is_full_only_when_it_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(path, lambda beside: beside.write_text("new"))
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_takes_no_files_is_named_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = os.open

    def refuse(path: object, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)  # root may write into folders of any mode
    with pytest.raises(PermissionError) as caught:
        replace_file(tmp_path / "a", lambda beside: pytest.fail("written"))
    assert caught.value.filename == str(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_is_told_from_other_files(tmp_path: Path):
    left: list[Path] = []

    def write(beside: Path) -> None:
        left.append(beside)
        assert is_unfinished(beside)

    replace_file(tmp_path / "a.json", write)
    (tmp_path / ".part-mine").touch()
    assert not any(map(is_unfinished, tmp_path.iterdir()))
    for make in (Path.mkdir, lambda path: path.symlink_to(tmp_path / "a.json")):
        make(left[0])
        assert not is_unfinished(left[0])
        left[0].rename(tmp_path / "moved")
        if (tmp_path / "moved").is_dir():
            (tmp_path / "moved").rmdir()


def _write_a_letter(path: Path, letter: str) -> None:
    replace_file(path, lambda beside: beside.write_text(letter * 10_000))


def test_threads_that_write_one_file_leave_one_of_their_contents(tmp_path: Path):
    path = tmp_path / "a"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: _write_a_letter(path, "abcdefgh"[number % 8]), range(120)))
    assert len(set(path.read_text())) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_share_a_number_leave_one_of_their_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in two containers on one disk."""
    path = tmp_path / "a"
    monkeypatch.setattr(os, "getpid", lambda: 1)

    def write(beside: Path) -> None:
        beside.write_text("outer")
        _write_a_letter(path, "i")
        assert beside.read_text() == "outer"

    replace_file(path, write)
    assert path.read_text() == "outer"
    assert list(tmp_path.iterdir()) == [path]


def _try_lock(folder: Path, told: "multiprocessing.queues.SimpleQueue[str]") -> None:
    try:
        with locked_folder(folder, "another run"):
            told.put("free")
    except BusyError as error:
        told.put(str(error))


def test_a_folder_is_locked_for_other_processes_and_for_this_one(tmp_path: Path):
    folder = tmp_path / "runs" / "out"
    context = multiprocessing.get_context("fork")
    told = context.SimpleQueue()

    def ask() -> str:
        other = context.Process(target=_try_lock, args=(folder, told))
        other.start()
        other.join()
        return told.get()

    with locked_folder(folder, "another run"):
        said = f"another run is at work in {folder}: wait for it, or name another folder"
        assert ask() == said
        with pytest.raises(BusyError), locked_folder(folder, "another run"):
            pass
        assert folder.is_dir(), "the one that was refused did not make it, and does not remove it"
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
    assert ask() == "free"


def test_a_locked_folder_stays_where_it_was_there_or_has_files(tmp_path: Path):
    (tmp_path / "there").mkdir()
    with locked_folder(tmp_path / "there", "another run"):
        pass
    with locked_folder(tmp_path / "new" / "out", "another run"):
        (tmp_path / "new" / "out" / "gains").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["gains", "new", "out", "there"]


def test_a_pipe_is_no_folder_to_lock(tmp_path: Path):
    os.mkfifo(tmp_path / "out")
    with pytest.raises(FileError, match="out is a pipe: name a folder"), locked_folder(tmp_path / "out", "another run"):
        pass
