"""The settings of ``gain-ops adapt``; without torch, since the command's options are declared from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gain_ops.utils.errors import UsageError

__all__ = ["Settings", "check_windows"]


@dataclass(frozen=True)
class Settings:
    """The settings of :func:`gain_ops.training.adaptation.adapt`; the command line's options have the same names.

    ``model`` None is SmolLM2-135M-Instruct, ``data`` None is Python source, and ``text_field`` the field
    of its records that has the text, for fields of unknown names. ``targets`` is a preset of ``gain_ops.apply``,
    or patterns of module names separated by commas. ``force`` allows the run to replace a gain file of an earlier run.
    ``trust_remote_code`` allows code in the model's folder to run.

    Raises:
        ValueError: a number out of its range.
    """

    out: Path
    model: Path | None = None
    data: Path | None = None
    text_field: str | None = None
    targets: str = "gain-ffn"
    side: str = "output"
    memory: str = "fast"
    steps: int = 24
    batch_tokens: int = 1024
    sequence_length: int = 256
    lr: float = 1e-2
    seed: int = 0
    dtype: str = "float32"
    device: str = "auto"
    force: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps is {self.steps}: at least 1 is needed")
        if self.text_field is not None and self.data is None:
            raise UsageError(f"text field is {self.text_field!r}, and there is no data: give --data too")
        check_windows(self.batch_tokens, self.sequence_length)
        if not 0 < self.lr < math.inf:
            raise UsageError(f"lr is {self.lr}: a finite learning rate above 0 is needed")

    @property
    def batch_size(self) -> int:
        """Windows in one step."""
        return self.batch_tokens // self.sequence_length


def check_windows(batch_tokens: int, sequence_length: int) -> None:
    """Raise UsageError unless a step is a whole number of windows that are long enough to predict from."""
    if sequence_length < 2:
        raise UsageError(f"sequence length is {sequence_length}: at least 2 tokens are needed to predict one")
    if batch_tokens < sequence_length or batch_tokens % sequence_length:
        raise UsageError(
            f"batch tokens is {batch_tokens}: it must be a multiple of the sequence length, {sequence_length}"
        )
