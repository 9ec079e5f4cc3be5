"""A base that changes after it was planned for: nothing is absorbed into it, and nothing is left."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gain_ops.checkpoints import plan as planning
from gain_ops.checkpoints import states
from gain_ops.checkpoints.absorb import absorb, verify
from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.plan import Plan, plan
from gain_ops.utils.stages import stage_of

from support.small_checkpoints import contents, save_folder, save_gain_file

LAYER = "model.layers.0.mlp.down_proj"
FILE = "model.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """(base, gain file) of one layer, and another of the same size."""
    torch.manual_seed(0)
    weights = {f"{LAYER}.weight": torch.randn(6, 10), "model.norm.weight": torch.randn(10)}
    base = save_folder(tmp_path / "base", [weights])
    save_folder(tmp_path / "other", [{name: weight + 1 for name, weight in reversed(weights.items())}])
    return base, save_gain_file(tmp_path / "g.safetensors", {LAYER: torch.randn(6)})


def _written_in_place(base: Path) -> None:
    (base / FILE).write_bytes((base.parent / "other" / FILE).read_bytes())


def _at_the_old_time(base: Path) -> None:
    """As by rsync or cp -p of a file of the same size and time."""
    before = (base / FILE).stat()
    _written_in_place(base)
    os.utime(base / FILE, ns=(before.st_atime_ns, before.st_mtime_ns))


def _another_in_its_place(base: Path) -> None:
    before = (base / FILE).stat()
    os.utime(base.parent / "other" / FILE, ns=(before.st_atime_ns, before.st_mtime_ns))
    (base.parent / "other" / FILE).replace(base / FILE)


def _longer(base: Path) -> None:
    with (base / FILE).open("ab") as file:
        file.write(b" ")


def _shorter(base: Path) -> None:
    os.truncate(base / FILE, 100)


def _gone(base: Path) -> None:
    (base / FILE).unlink()


def _a_folder_of_that_name(base: Path) -> None:
    (base / FILE).unlink()
    (base / FILE).mkdir()


def _beside_the_weights(base: Path) -> None:
    (base / "config.json").write_text('{"model_type": "gpt2"}')


CHANGES = [
    _written_in_place,
    _at_the_old_time,
    _another_in_its_place,
    _longer,
    _shorter,
    _gone,
    _a_folder_of_that_name,
    _beside_the_weights,
]


def test_a_weight_deep_in_a_file_of_the_old_size_and_time(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(states, "_HEAD", 8)
    base, gain = small
    work = plan(base, gain)
    before = (base / FILE).stat()
    with (base / FILE).open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    os.utime(base / FILE, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"has changed since it was planned, in model\.safetensors"):
        absorb(work, tmp_path / "out")


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_changed_after_the_plan(
    small: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], None], verified: bool
):
    base, gain = small
    work = plan(base, gain)
    change(base)
    before = contents(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"base has changed since it was planned, in (model|config).*: plan again"
    ):
        absorb(work, tmp_path / "out", verified=verified)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at", [0.0, 0.9])
def test_a_base_that_changes_while_it_is_copied(
    small: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], None], verified: bool, at: float
):
    base, gain = small
    changed = []

    def progress(what: str, done: int, total: int) -> None:
        if not changed and done >= at * total:
            changed.append(what)
            change(base)

    with pytest.raises((CheckpointError, OSError)):
        absorb(plan(base, gain), tmp_path / "out", verified=verified, progress=progress)
    assert changed == ["copying"]
    assert not (tmp_path / "out").exists()


def test_a_base_that_changes_while_it_is_verified(small: tuple[Path, Path], tmp_path: Path):
    base, gain = small

    def progress(what: str, done: int, total: int) -> None:
        if what == "verifying" and done == total:
            _at_the_old_time(base)

    with pytest.raises(CheckpointError, match="has changed since it was planned"):
        absorb(plan(base, gain), tmp_path / "out", progress=progress)
    assert stage_of(tmp_path / "out") is None
    assert not (tmp_path / "out").exists()


def test_verifying_with_a_plan_that_no_longer_fits(small: tuple[Path, Path], tmp_path: Path):
    base, gain = small
    work = plan(base, gain)
    absorb(work, tmp_path / "out")
    _at_the_old_time(base)
    with pytest.raises(CheckpointError, match="has changed since it was planned"):
        verify(work, tmp_path / "out")


def test_a_base_that_changes_while_it_is_read(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, gain = small
    open_checkpoint = planning.open_checkpoint

    def open_late(path: Path) -> object:
        opened = open_checkpoint(path)
        _at_the_old_time(base)
        return opened

    monkeypatch.setattr(planning, "open_checkpoint", open_late)
    with pytest.raises(CheckpointError, match=r"base changed while it was read, in model\.safetensors: try again"):
        plan(base, gain)
    monkeypatch.undo()
    assert isinstance(plan(base, gain), Plan)


def test_what_is_finished_of_one_base_is_not_taken_for_another(small: tuple[Path, Path], tmp_path: Path):
    """Whose sizes and times are the same."""
    base, gain = small

    def stop(what: str, done: int, total: int) -> None:
        if what == "verifying":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        absorb(plan(base, gain), tmp_path / "out", progress=stop)
    _at_the_old_time(base)
    absorb(plan(base, gain), tmp_path / "out", verified=False)
    absorb(plan(base, gain), tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


def test_reading_the_base_and_using_its_folder_changes_nothing(small: tuple[Path, Path], tmp_path: Path):
    base, gain = small
    work = plan(base, gain)
    (base / FILE).read_bytes()
    (base / "notes.txt").write_text("mine")
    shutil.copy(gain, base / "pytorch_model.bin")
    absorb(work, tmp_path / "out")


def test_an_output_that_appears_meanwhile_is_not_replaced_and_what_is_finished_is_kept(
    small: tuple[Path, Path], tmp_path: Path
):
    base, gain = small
    out = tmp_path / "out"

    def progress(what: str, done: int, total: int) -> None:
        if what == "verifying" and not out.exists():
            out.mkdir()
            (out / "config.json").write_text("mine")

    with pytest.raises(CheckpointError, match="out is not empty"):
        absorb(plan(base, gain), out, progress=progress)
    assert contents(out) == {"config.json": b"mine"}
    copied: list[int] = []
    absorb(plan(base, gain), out, force=True, progress=lambda what, done, total: copied.append(done))
    assert copied[1] > 0, "the first file was finished before"
    assert (out / FILE).exists()
