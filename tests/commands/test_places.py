"""Where the commands write: regular files alone, one run at a time, and nothing lost where a disk is full."""

import errno
import os
import signal
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import gain_ops
from gain_ops.checkpoints import absorb as absorbing
from gain_ops.commands import adapt, console
from gain_ops.commands.app import app
from gain_ops.training.loop import Step
from gain_ops.utils.errors import FileError

from support.small_checkpoints import contents, save_folder, save_gain_file

LAYER = "model.layers.0.mlp.down_proj"
FILES = ("gains.safetensors", "report.json", "report.md", "plot.png")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (console.STDOUT, console.STDERR):
        monkeypatch.setattr(place, "_width", 200)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _refusal(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/null")


SPECIAL = pytest.mark.parametrize(
    ("make", "kind"), [(_pipe, "a pipe"), (_socket, "a socket"), (_link_to_a_device, "a device")]
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the test, short enough for a socket's path."""
    monkeypatch.chdir(tmp_path)
    save_gain_file(Path("g.safetensors"), {LAYER: torch.rand(6)})
    save_folder(Path("base"), [{f"{LAYER}.weight": torch.randn(6, 10)}])
    return tmp_path


def _merge(out: Path) -> Result:
    return _run("merge", "g.safetensors", "g.safetensors", "--out", out)


def _plot(out: Path) -> Result:
    return _run("inspect", "g.safetensors", "--plot", out)


def _plan(out: Path) -> Result:
    return _run("plan", "--model", "llama-3-8b", "--json", out)


def _absorb(out: Path) -> Result:
    return _run("absorb", "--base", "base", "--gain", "g.safetensors", "--out", out, "--force")


def _adapt(out: Path) -> Result:
    return _run("adapt", "--model", "nowhere", "--out", out, "--force")


@SPECIAL
@pytest.mark.parametrize(
    ("call", "name"),
    [(_merge, "out.safetensors"), (_plot, "out.png"), (_plan, "out.json"), (_absorb, "out"), (_adapt, "out")],
)
def test_what_is_no_file_stays_what_it_is(
    place: Path, make: Callable[[Path], None], kind: str, call: Callable[[Path], Result], name: str
):
    make(Path(name))
    before = Path(name).stat()
    assert f"{name} is {kind}: name a" in _refusal(call(Path(name)))
    assert os.path.samestat(Path(name).stat(), before)
    assert Path(name).stat().st_mode == before.st_mode
    assert {path.name for path in place.iterdir()} == {"base", "g.safetensors", name}


def test_a_file_that_is_open_is_not_replaced_by_the_name_of_its_number(place: Path):
    with Path("opened").open("w") as opened:
        Path("link").symlink_to(f"/dev/fd/{opened.fileno()}")
        for name in (f"/dev/fd/{opened.fileno()}", f"/proc/self/fd/{opened.fileno()}", "link"):
            assert f"{name} is an open stream: name a regular file" in _refusal(_merge(Path(name)))
        assert os.path.samestat(Path("opened").stat(), os.fstat(opened.fileno()))


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(("call", "name"), [(_merge, "out.safetensors"), (_plot, "out.png"), (_plan, "out.json")])
def test_a_folder_is_no_place_for_a_file(place: Path, call: Callable[[Path], Result], name: str, linked: bool):
    folder = Path("home" if linked else name)
    folder.mkdir()
    (folder / "thesis").write_text("mine")
    if linked:
        Path(name).symlink_to(folder)
    assert f"{name} is a folder: name a file in it" in _refusal(call(Path(name)))
    assert contents(Path(name)) == {"thesis": b"mine"}


@SPECIAL
def test_gains_of_a_model_are_not_saved_over_it(place: Path, make: Callable[[Path], None], kind: str):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    gain_ops.apply(model, ["0"])
    make(Path("out"))
    with pytest.raises(FileError, match=f"out is {kind}"):
        gain_ops.save_gains(model, "out")
    assert not stat.S_ISREG(Path("out").stat().st_mode)


@SPECIAL
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_adaptation_that_could_not_be_written_is_said_before_the_training(
    place: Path, make: Callable[[Path], None], kind: str, name: str
):
    Path("out").mkdir()
    Path("out/report.json").write_text('{"written_by": "gain-ops adapt"}')
    Path("out", name).unlink(missing_ok=True)
    make(Path("out", name))
    assert f"out/{name} is {kind}" in _refusal(_adapt(Path("out")))
    assert not stat.S_ISREG(Path("out", name).stat().st_mode)


def test_a_folder_that_takes_no_files_is_said_before_the_training(place: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object, **options: object) -> object:
        raise OSError(errno.EROFS, "Read-only file system", str(place / "out" / ".part-1"))

    monkeypatch.setattr("gain_ops.training.adaptation.TemporaryFile", refuse)
    assert _refusal(_adapt(Path("out"))) == "out: Read-only file system"
    assert not Path("out").exists()


def _train(model: Path, data: Path, out: Path, *more: object, steps: int = 2) -> Result:
    call = ("--batch-tokens", 128, "--sequence-length", 32, "--steps", steps)
    return _run("adapt", "--model", model, "--data", data, "--out", out, *call, *more)


def test_two_adaptations_in_one_folder_are_kept_apart(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    second: list[Result] = []

    def step(self: object, done: Step) -> None:
        if not second:
            second.append(_train(tiny_model, code_folder, tmp_path / "out", "--force"))

    monkeypatch.setattr(adapt._ConsoleWatcher, "step", step)
    first = _train(tiny_model, code_folder, tmp_path / "out")
    assert first.exit_code == 0, first.output
    assert f"another adaptation is at work in {tmp_path / 'out'}: wait for it" in _refusal(second[0])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_without_locks_another_runs_gains_are_still_not_replaced(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gains, spare = tmp_path / "out" / "gains.safetensors", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    monkeypatch.setattr(adapt._ConsoleWatcher, "step", lambda self, done: gains.write_text("theirs"))
    line = _refusal(_train(tiny_model, code_folder, tmp_path / "out"))
    (kept,) = spare.rglob("*.safetensors")
    assert line == f"{gains} was written by another run meanwhile; the trained gains are in {kept}"
    assert gains.read_text() == "theirs"
    assert load_file(kept)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("at", ["step", "save"])
def test_a_signal_in_the_training_keeps_what_was_learned(
    tiny_model: Path,
    code_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    at: str,
):
    def send() -> None:
        signal.raise_signal(number)

    def step(self: object, done: Step) -> None:
        if done.number == 3:
            send()

    save = gain_ops.save_gains

    def save_late(*arguments: object) -> None:
        send()
        save(*arguments)

    before = signal.signal(number, signal.SIG_DFL)
    if at == "step":
        monkeypatch.setattr(adapt._ConsoleWatcher, "step", step)
    else:
        monkeypatch.setattr("gain_ops.training.adaptation.save_gains", save_late)
    result = _train(tiny_model, code_folder, tmp_path / "out", steps=5)
    signal.signal(number, before)
    gains = tmp_path / "out" / "gains.safetensors"
    assert result.exit_code == 128 + number
    steps = 3 if at == "step" else 5
    assert f"Stopped by {number.name}. The gains of {steps} training steps are in {gains}." in result.output
    assert any(delta.abs().max() > 0 for delta in load_file(gains).values())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gains.safetensors", "report.json"]


def _no_room_in(monkeypatch: pytest.MonkeyPatch, *folders: Path, but: str = "") -> None:
    """Files in these folders are cut as on a full disk."""
    for method in ("write_bytes", "write_text"):
        write = getattr(Path, method)

        def full(path: Path, content: str, write=write, **options: str) -> int:
            if any(path.is_relative_to(folder) for folder in folders) and not (but and path.suffix == but):
                write(path, content[:5], **options)
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(write(path, content, **options))

        monkeypatch.setattr(Path, method, full)


def test_gains_that_find_a_full_disk_are_kept_elsewhere(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, spare = tmp_path / "out", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    _no_room_in(monkeypatch, out)
    line = _refusal(_train(tiny_model, code_folder, out))
    (kept,) = spare.rglob("*.safetensors")
    assert line == f"{out / 'gains.safetensors'}: No space left on device; the trained gains are in {kept}"
    assert any(delta.abs().max() > 0 for delta in load_file(kept).values())
    assert not out.exists()


def test_where_no_disk_has_room_the_first_error_is_said(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, spare = tmp_path / "out", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    _no_room_in(monkeypatch, out, spare)
    assert _refusal(_train(tiny_model, code_folder, out)) == f"{out / 'gains.safetensors'}: No space left on device"


def test_a_report_that_finds_a_full_disk_says_where_the_gains_are(
    tiny_model: Path, code_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    _no_room_in(monkeypatch, out, but=".safetensors")
    gains = out / "gains.safetensors"
    line = _refusal(_train(tiny_model, code_folder, out))
    assert line == f"{out / 'report.json'}: No space left on device; the trained gains are in {gains}"
    assert [path.name for path in out.iterdir()] == ["gains.safetensors"]
    assert load_file(gains)


@pytest.mark.parametrize("at", ["first", "later"])
def test_absorbing_that_finds_a_full_disk_says_what_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch, at: str):
    copy, left = absorbing.copy_file, [0 if at == "first" else 2]

    def full(source: Path, target: Path, advance: Callable[[int], object]) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        left[0] -= 1
        copy(source, target, advance)

    with monkeypatch.context() as patch:
        patch.setattr(absorbing, "copy_file", full)
        line = _refusal(_absorb(Path("out")))
    assert "No space left on device. " in line
    if at == "first":
        assert line.endswith("Nothing was written.")
        assert not Path(".part-out").exists()
    else:
        assert line.endswith(f"The finished files are in {place / '.part-out'}: the same command continues from there.")
    assert _absorb(Path("out")).exit_code == 0
    assert contents(Path("out")).keys() == contents(Path("base")).keys()
    assert not list(place.glob(".part*"))


def test_absorbing_leaves_a_link_of_the_working_folders_name_alone(place: Path):
    Path("home/files").mkdir(parents=True)
    Path("home/files/thesis").write_text("mine")
    Path(".part-out").symlink_to("home")
    result = _absorb(Path("out"))
    assert result.exit_code == 0, result.output
    assert Path(".part-out").is_symlink()
    assert contents(Path("home")) == {"files/thesis": b"mine"}
    assert not list(place.glob(".part-out-*"))
