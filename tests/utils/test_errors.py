"""Errors of ours have one base, each beside the built-in that programs catch already."""

import re
from pathlib import Path

import pytest

import gain_ops
from gain_ops.checkpoints.edits import CheckpointError, InexactError
from gain_ops.gainfiles.file import GainFileError
from gain_ops.models.carriers import CannotFold
from gain_ops.models.up_rows import NotGated
from gain_ops.utils import errors

KINDS = {
    gain_ops.BackendUnavailable: RuntimeError,
    GainFileError: ValueError,
    CheckpointError: ValueError,
    InexactError: ValueError,
    CannotFold: ValueError,
    NotGated: ValueError,
    errors.UsageError: ValueError,
    errors.FileError: OSError,
    errors.BusyError: BlockingIOError,
    errors.IsAFolderError: IsADirectoryError,
    errors.MissingFileError: FileNotFoundError,
    errors.MissingPackageError: ImportError,
    errors.DivergedError: FloatingPointError,
}

# a signal within a study, and setup.py's, which cannot import the package
APART = {"Stopped", "CannotBuild"}


@pytest.mark.parametrize(("kind", "built_in"), KINDS.items(), ids=lambda kind: kind.__name__)
def test_an_error_is_caught_as_ours_and_as_what_it_was(kind: type[Exception], built_in: type[Exception]) -> None:
    for caught in (gain_ops.GainOpsError, built_in):
        with pytest.raises(caught, match="said"):
            raise kind("said")


def test_no_error_is_left_out() -> None:
    known = {kind.__name__ for kind in KINDS} | {"GainOpsError"}
    found = set()
    for path in Path(gain_ops.__file__).parent.rglob("*.py"):
        for name, bases in re.findall(r"^class (\w+)\((.*)\):", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if re.search(r"Error\b|Exception\b|Warning\b|CannotFold\b", bases):
                found.add(name)
    assert found - APART == known


def test_a_model_that_does_not_fit_is_told_by_an_error_of_ours() -> None:
    import torch

    with pytest.raises(gain_ops.GainOpsError, match="matches no linear module"):
        gain_ops.apply(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["no_such"])
