"""What the engine needs from a checkpoint on disk: its files, and the edits that fold gains into it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from gain_ops.checkpoints.edits import CheckpointError, Edit
from gain_ops.gainfiles.file import GainFile
from gain_ops.utils.wording import first_of


class Container(Protocol):
    """An opened checkpoint: headers are read, tensors are not."""

    @property
    def root(self) -> Path:
        """The folder that holds the files, absolute; a copy has the same paths relative to its own root."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that a copy needs, absolute, below ``root``, sorted."""
        ...

    def edits(self, gains: GainFile, *, requantize: bool, check_base: bool) -> list[Edit]:
        """The edits to make, in the gain file's order; ``Edit.layer`` is the gain file's name. Changes nothing.

        A gain goes into its layer's own weight where this can take it exactly; otherwise, on the input side of the down
        projection of a gated FFN, into the rows of the up projection (models/up_rows.py). Otherwise it is refused, or with
        ``requantize`` the weight is quantised again.

        Args:
            gains: the gains to fold in.
            requantize: whether quantised weights may be decoded, scaled and quantised again where no scale can take the
                gain exactly.
            check_base: whether the weights must have the fingerprints in the gain file.

        Raises:
            CheckpointError: one error with everything that does not fit: layers, sizes, formats, fingerprints.

        """
        ...

    def describe(self, edit: Edit) -> str:
        """The stored form of an edit's tensor, for a table: "BF16 [576, 1536]", "Q4_1 [576, 1536]"."""
        ...


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise one CheckpointError with all problems, the first few in full; return where there are none."""
    if problems:
        raise CheckpointError(f"{what}: {first_of(problems, '; ')}")
