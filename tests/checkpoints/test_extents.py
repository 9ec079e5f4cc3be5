"""Tensors that share bytes of a file: a gain on one would change the other, so no such file is read."""

import json
import struct
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from gain_ops.checkpoints.compare import compare
from gain_ops.checkpoints.edits import CheckpointError, Region
from gain_ops.checkpoints.formats.extents import refuse_shared_bytes
from gain_ops.checkpoints.formats.gguf import open_gguf
from gain_ops.checkpoints.formats.headers import read_header

BYTES = 32 * 34  # of a Q8_0 [32, 32]


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf(path: Path, *offsets: int) -> Path:
    """A GGUF file of a llama with Q8_0 tensors [32, 32] at these offsets."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(offsets), 2)
    head += _text("general.architecture") + struct.pack("<I", 8) + _text("llama")
    head += _text("llama.block_count") + struct.pack("<II", 4, len(offsets))
    for number, offset in enumerate(offsets):
        head += _text(f"blk.{number}.ffn_down.weight") + struct.pack("<IQQIQ", 2, 32, 32, 8, offset)
    head += bytes(-len(head) % 32)
    path.write_bytes(head + bytes(max(offsets) + BYTES))
    return path


@pytest.mark.parametrize("offsets", [(0, 0), (0, BYTES - 32), (BYTES - 32, 0), (0, 2 * BYTES, 32), (64, 4 * BYTES, 64)])
def test_gguf_tensors_that_share_bytes_are_refused(tmp_path: Path, offsets: tuple[int, ...]):
    path = _gguf(tmp_path / "a.gguf", *offsets)
    with pytest.raises(CheckpointError, match=r"a.gguf is damaged: blk\.\d\.ffn_down\.weight and .* overlap, at byte"):
        open_gguf(path)
    with pytest.raises(CheckpointError, match="overlap"):
        compare(path, path)


@pytest.mark.parametrize("offsets", [(0,), (0, BYTES), (BYTES, 0), (0, BYTES + 64, 4 * BYTES)])
def test_gguf_tensors_beside_each_other_are_read(tmp_path: Path, offsets: tuple[int, ...]):
    assert len(open_gguf(_gguf(tmp_path / "a.gguf", *offsets)).tensors) == len(offsets)


def test_a_tensor_without_bytes_shares_none(tmp_path: Path):
    regions = {"one": Region(tmp_path, 8, 2, 4), "none": Region(tmp_path, 12, 0, 4), "two": Region(tmp_path, 16, 2, 4)}
    refuse_shared_bytes(tmp_path, regions)


@pytest.mark.parametrize("second", [(0, 16), (8, 24), (12, 16)])
def test_safetensors_that_share_bytes_are_refused(tmp_path: Path, second: tuple[int, int]):
    extents = {"one": (0, 16), "two": second}
    header = {
        name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
        for name, (start, end) in extents.items()
    }
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(max(end for _, end in extents.values())))
    with pytest.raises(CheckpointError, match="overlaps another tensor"):
        read_header(path)
