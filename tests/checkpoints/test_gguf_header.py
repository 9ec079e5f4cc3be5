"""The reader of GGUF headers: the same as the package gguf on whole files, and limits on all that a header asks for."""

import random
import resource
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.formats.gguf import open_gguf
from gain_ops.checkpoints.formats.gguf_header import read_gguf_header
from gain_ops.gainfiles.file import read_gains
from gain_ops.utils.errors import GainOpsError

from support.gguf_files import finish, write_tensors
from support.small_checkpoints import save_gain_file

U32, U64, ARRAY, TEXT = 4, 10, 9, 8
EXTREME = (0, 1, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
SECONDS, BYTES = 2.0, 200 << 20


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def file_of(path: Path, *, values: bytes = b"", count: int = 0, tensors: bytes = b"", number: int = 0) -> Path:
    """A file of a llama of one block, with these values and tensors after its own."""
    start = b"GGUF" + struct.pack("<IQQ", 3, number, count + 2)
    own = text(b"general.architecture") + struct.pack("<I", TEXT) + text(b"llama")
    own += text(b"llama.block_count") + struct.pack("<II", U32, 1)
    path.write_bytes(start + own + values + tensors)
    return path


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0, number: int | None = None) -> bytes:
    many = struct.pack("<I", len(dims) if number is None else number)
    return text(name) + many + struct.pack(f"<{len(dims)}QIQ", *dims, kind, offset)


def real_file(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_token_list(["a", "bc", "\u00e9" * 9])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_bool("some.flag", True)
    writer.add_float64("some.number", 0.25)
    writer.add_string("tokenizer.chat_template", "{{ x }}" * 20)
    for name in ("blk.0.ffn_down.weight", "blk.0.attn_output.weight"):
        writer.add_tensor(name, np.ones((4, 32), np.float32))
    writer.add_tensor(
        "blk.0.ffn_up.weight",
        gguf.quants.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    finish(writer)
    return path


def test_values_and_tensors_are_those_of_the_package(tmp_path: Path):
    path = real_file(tmp_path / "a.gguf")
    expected = gguf.GGUFReader(path)
    found = read_gguf_header(path)
    of_file = {key: field for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    assert found.values.keys() == of_file.keys()
    for key, field in of_file.items():
        assert found.values[key] == (None if field.types[0] == gguf.GGUFValueType.ARRAY else field.contents())
    assert [(t.name, t.kind, list(t.shape[::-1]), t.offset) for t in found.tensors] == [
        (t.name, t.tensor_type, t.shape.tolist(), t.data_offset) for t in expected.tensors
    ]


def test_a_file_of_another_alignment(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_uint32("llama.block_count", 1)
    writer.add_tensor("blk.0.ffn_down.weight", np.ones((4, 32), np.float32))
    finish(writer)
    (found,) = read_gguf_header(tmp_path / "a.gguf").tensors
    assert found.offset == gguf.GGUFReader(tmp_path / "a.gguf").tensors[0].data_offset
    assert found.offset % 256 == 0


HOSTILE = {
    "an array of 2^62": {"count": 1, "values": text(b"a") + struct.pack("<IIQ", ARRAY, 0, 1 << 62)},
    "texts, 2^64 - 1 of them": {"count": 1, "values": text(b"a") + struct.pack("<IIQ", ARRAY, TEXT, (1 << 64) - 1)},
    "a text of 2^63 bytes": {"count": 1, "values": text(b"a") + struct.pack("<IQ", TEXT, 1 << 63)},
    "a key of 2^64 - 1 bytes": {"count": 1, "values": struct.pack("<Q", (1 << 64) - 1)},
    "2^63 values": {"count": (1 << 63) - 2},
    "2^64 - 1 tensors": {"number": (1 << 64) - 1},
    "as many tensors as are allowed, and none there": {"number": 1 << 18},
    "arrays in arrays": {
        "count": 1,
        "values": text(b"a") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 50_000,
    },
    "a type that is none": {"count": 1, "values": text(b"a") + struct.pack("<I", 77)},
    "a key twice": {"count": 2, "values": (text(b"a") + struct.pack("<IB", 0, 1)) * 2},
    "dimensions, 2^32 - 1 of them": {"number": 1, "tensors": tensor(b"t", (), number=(1 << 32) - 1)},
    "no dimensions": {"number": 1, "tensors": tensor(b"t", ())},
    "five dimensions": {"number": 1, "tensors": tensor(b"t", (1, 1, 1, 1, 1))},
    "a size that overflows": {"number": 1, "tensors": tensor(b"t", (1 << 40, 1 << 40))},
    "a size that overflows to zero": {"number": 1, "tensors": tensor(b"t", (1 << 32, 1 << 32, 2))},
    "an empty tensor of 2^62 rows": {"number": 1, "tensors": tensor(b"t", (0, 1 << 62))},
    "a type of tensor that is none": {"number": 1, "tensors": tensor(b"t", (32,), kind=9999)},
    "half a block": {"number": 1, "tensors": tensor(b"t", (16,), kind=8)},
    "an offset beyond the file": {"number": 1, "tensors": tensor(b"t", (1,), offset=1 << 63)},
    "a tensor twice": {"number": 2, "tensors": tensor(b"t", (1,)) * 2},
    "a name of 10^5 parts": {"number": 1, "tensors": tensor(b"t." * 30_000 + b"weight", (1,))},
    "an alignment of 3": {"count": 1, "values": text(b"general.alignment") + struct.pack("<II", U32, 3)},
    "an alignment of 0": {"count": 1, "values": text(b"general.alignment") + struct.pack("<II", U32, 0)},
    "an alignment in words": {"count": 1, "values": text(b"general.alignment") + struct.pack("<I", TEXT) + text(b"32")},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_refused_at_once(tmp_path: Path, what: str):
    path = file_of(tmp_path / "bad.gguf", **HOSTILE[what])
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"bad\.gguf is not a whole GGUF file"):
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("blocks", [513, 1 << 31, (1 << 32) - 1])
def test_more_blocks_than_any_model_has(tmp_path: Path, blocks: int):
    path = write_tensors(tmp_path / "a.gguf", "llama", {"blk.0.ffn_down.weight": ("F32", 4, 32)}, block_count=blocks)
    with pytest.raises(CheckpointError, match=f"claims {blocks:,} blocks, and at most 512"):
        open_gguf(path)


def test_a_sparse_file_of_a_large_array_is_not_read(tmp_path: Path):
    """The bytes are there, as a hole of the file system's, and still the limits hold."""
    path = file_of(tmp_path / "bad.gguf", count=1, values=text(b"a") + struct.pack("<IIQ", ARRAY, 0, 1 << 36))
    with path.open("rb+") as file:
        file.truncate(1 << 37)
    with pytest.raises(CheckpointError, match="an array of 68,719,476,736 elements"):
        open_gguf(path)


def mutated(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data))
        match draw.randrange(6):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                data[at : at + 8] = struct.pack("<Q", draw.choice(EXTREME))
            case 2:
                data[at : at + 4] = struct.pack("<I", draw.choice(EXTREME) & 0xFFFFFFFF)
            case 3:
                del data[at : at + draw.randrange(1, 40)]
            case 4:
                data[at:at] = data[draw.randrange(len(data)) :][: draw.randrange(1, 200)]
            case 5:
                data = data[: max(at, 1)]
        data = data or bytearray(b"G")
    return bytes(data)


def fuzz(folder: Path, count: int, seconds: float) -> int:
    """Open mutated files, and fold gains into what opens; nothing but a GainOpsError, and no file over the limits."""
    whole = real_file(folder / "whole.gguf")
    content, header = whole.read_bytes(), int(gguf.GGUFReader(whole).data_offset)
    names = ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj")
    gains = read_gains(save_gain_file(folder / "g.safetensors", {name: torch.ones(4) for name in names}))
    draw, path = random.Random(0), folder / "mutated.gguf"
    end, done, opened = time.monotonic() + seconds, 0, 0
    while done < count and time.monotonic() < end:
        # most of a file is data, where a change means nothing
        data = mutated(content[:header], draw) + content[header:] if draw.random() < 0.9 else mutated(content, draw)
        path.write_bytes(data)
        start, said = time.process_time(), ""
        try:
            open_gguf(path).edits(gains, requantize=True, check_base=False)
            opened += 1
        except GainOpsError as error:
            said = str(error)
        assert said.isprintable(), data
        assert time.process_time() - start < SECONDS, data
        done += 1
    assert opened > done // 100  # some mutations leave a file whole: the others were refused for a reason
    return done


def test_mutated_files_are_refused_in_words(tmp_path: Path):
    tracemalloc.start()
    try:
        assert fuzz(tmp_path, 200, 60) == 200
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_a_hundred_thousand_mutated_files(tmp_path: Path):
    fuzz(tmp_path, 10, 60)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(tmp_path, 100_000, 120)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < BYTES
