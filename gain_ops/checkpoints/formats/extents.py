"""Where the tensors of a file lie, beside each other."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from gain_ops.checkpoints.edits import CheckpointError, Region


def refuse_shared_bytes(file: Path, regions: Mapping[str, Region]) -> None:
    """Raise CheckpointError for two tensors of a file that share a byte: a gain on one would change the other."""
    filled = [(region.offset, region.offset + region.size, name) for name, region in regions.items() if region.size]
    for (_, end, one), (start, _, other) in pairwise(sorted(filled)):
        if start < end:
            raise CheckpointError(f"{file} is damaged: {one} and {other} overlap, at byte {start:,}: fetch it again")
