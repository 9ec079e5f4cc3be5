"""The reader of safetensors headers: nothing that the safetensors library refuses, and within limits of its own."""

import contextlib
import json
import random
import struct
import time
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save

from gain_ops.checkpoints.edits import CheckpointError
from gain_ops.checkpoints.formats.config import Config
from gain_ops.checkpoints.formats.headers import read_header
from gain_ops.checkpoints.formats.safetensors_folder import SafetensorsCheckpoint
from gain_ops.gainfiles.file import GainFile

ENTRY = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'
DATA = bytes(8)


def write(path: Path, header: str | bytes, data: bytes = DATA) -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def library_takes(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="np") as opened:
            opened.keys()
    except (safetensors.SafetensorError, ValueError):
        return False
    return True


REFUSED_BY_BOTH = {
    "a hole before the first tensor": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', bytes(16)),
    "a hole between two": (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
        bytes(3),
    ),
    "metadata of numbers": (f'{{"a":{{{ENTRY}}},"__metadata__":{{"x":1}}}}', DATA),
    "metadata in a list": (f'{{"a":{{{ENTRY}}},"__metadata__":[]}}', DATA),
    "metadata of objects": (f'{{"a":{{{ENTRY}}},"__metadata__":{{"x":{{}}}}}}', DATA),
    "a key twice in an entry": (f'{{"a":{{{ENTRY},"dtype":"F32"}}}}', DATA),
    "half of a pair in a name": (f'{{"a\\ud800":{{{ENTRY}}}}}', DATA),
    "UTF-16": (f'{{"a":{{{ENTRY}}}}}'.encode("utf-16-le"), DATA),
    "a mark of the byte order": (f'{{"a":{{{ENTRY}}}}}'.encode("utf-8-sig"), DATA),
    "bytes that are no UTF-8": (f'{{"a?":{{{ENTRY}}}}}'.encode().replace(b"?", b"\xff"), DATA),
    "deep nesting": (f'{{"a":{{{ENTRY},"x":{"[" * 100_000}{"]" * 100_000}}}}}', DATA),
    "a size in words": ('{"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}}', DATA),
    "a size with a point": ('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', DATA),
    "a size that is true": ('{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', DATA),
    "minus zero": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', DATA),
    "a size beyond 64 bits": ('{"a":{"dtype":"F32","shape":[0,73786976294838206464],"data_offsets":[0,0]}}', b""),
    "sizes whose product is": ('{"a":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}', b""),
    "a number of 5000 digits": (f'{{"a":{{"dtype":"F32","shape":[{"1" * 5000}],"data_offsets":[0,8]}}}}', DATA),
    "three offsets": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}}', DATA),
    "offsets the wrong way": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', DATA),
    "an unknown dtype": ('{"a":{"dtype":"F33","shape":[2],"data_offsets":[0,8]}}', DATA),
    "half a byte": ('{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}', b""),
    "a list": ("[]", b""),
    "text": ('"text"', b""),
    "NaN": (f'{{"a":{{{ENTRY},"x":NaN}}}}', DATA),
    "a comment": (f'{{"a":{{{ENTRY}}}}}//', DATA),
}
REFUSED_HERE = {
    "a name twice": (f'{{"a":{{{ENTRY}}},"a":{{{ENTRY}}}}}', DATA),
    "metadata twice": (f'{{"a":{{{ENTRY}}},"__metadata__":{{"x":"1","x":"2"}}}}', DATA),
    "a name of 10^5 parts": (f'{{"{"a." * 100_000}weight":{{{ENTRY}}}}}', DATA),
    "a name of 10^5 characters": (f'{{"{"a" * 100_000}":{{{ENTRY}}}}}', DATA),
}


@pytest.mark.parametrize("what", [*REFUSED_BY_BOTH, *REFUSED_HERE])
def test_a_hostile_header_is_refused_in_a_short_line(tmp_path: Path, what: str):
    path = write(tmp_path / "bad.safetensors", *(REFUSED_BY_BOTH | REFUSED_HERE)[what])
    assert library_takes(path) == (what in REFUSED_HERE)
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as raised:
        read_header(path)
    assert time.process_time() - start < 1
    assert len(str(raised.value)) < 700
    assert str(raised.value).isprintable()


def test_every_dtype_of_the_library_is_read(tmp_path: Path):
    for name, bits in {"F4": 4, "F8_E8M0": 8, "F8_E4M3": 8, "BF16": 16, "C64": 64, "U64": 64}.items():
        path = write(
            tmp_path / "a.safetensors",
            json.dumps({"a": {"dtype": name, "shape": [2, 4], "data_offsets": [0, bits]}}),
            bytes(bits),
        )
        assert library_takes(path)
        assert read_header(path).entries["a"].size == bits


@pytest.mark.parametrize("key", ["", "\x1b[2J", "a\nb", "\u202e"])
def test_odd_names_that_the_library_takes(tmp_path: Path, key: str):
    path = write(tmp_path / "a.safetensors", json.dumps({key: json.loads(f"{{{ENTRY}}}")}))
    assert library_takes(path)
    assert list(read_header(path).entries) == [key]


PIECES = b'{ } [ ] , : " 0 -1 -0 1e9 2.5 true null \\u0041 \\ud800 \\u0000 \xff \0 "F32" "F4" "a" "shape" "__metadata__"'.split(
    b" "
)
PIECES += [b" ", b"\n", b"18446744073709551616"]


def mutated(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(data))
        match draw.randrange(4):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                del data[at : at + draw.randrange(1, 20)]
            case 2:
                data[at : at + draw.randrange(0, 6)] = draw.choice(PIECES)
            case 3:
                data[at:at] = data[draw.randrange(len(data)) :][: draw.randrange(1, 80)]
        data = data or bytearray(b"{")
    return bytes(data)


def test_what_the_library_refuses_is_refused(tmp_path: Path):
    """Mutated headers: no more than the library takes, nothing but a CheckpointError, and the same tensors."""
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.uint8), "c": torch.zeros(0, 5)}
    whole = save(tensors, metadata={"format": "pt", "x": "y"})
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = whole[8 : 8 + length], whole[8 + length :]
    draw, taken, path = random.Random(0), 0, tmp_path / "m.safetensors"
    for _ in range(800):
        write(path, mutated(header, draw), data)
        try:
            found = read_header(path)
        except CheckpointError:
            continue
        assert library_takes(path), path.read_bytes()
        with safetensors.safe_open(path, framework="np") as opened:
            assert sorted(found.entries) == sorted(opened.keys())
            assert dict(found.metadata) == (opened.metadata() or {})
            assert all(list(found.entries[name].shape) == opened.get_slice(name).get_shape() for name in found.entries)
        taken += 1
    assert taken > 8


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"[" * 100_000, "config.json is not JSON .*in one another"),
        ("config.json", b"[" * 70 + b"]" * 70, "config.json is not JSON .*more than 64"),
        ("config.json", b'{"a": 1, "a": 2}', "config.json is not JSON .*'a' is there twice"),
        ("config.json", '{"a": 1}'.encode("utf-16"), "config.json is not JSON"),
        ("config.json", b'{"a": "\\udc00"}', "config.json is not JSON"),
        ("config.json", b'{"a": ' + b"9" * 5000 + b"}", "config.json is not JSON"),
        ("config.json", b"", "config.json is not JSON"),
        ("model.safetensors.index.json", b"{" * 100_000, "index.json is not JSON"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "m", "a": "n"}}', "'a' is there twice"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": ["m"]}}', "no weight_map to files beside it"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "names no files"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": ".."}}', "no weight_map to files|lacks"),
    ],
)
def test_a_hostile_config_or_index(tmp_path: Path, file: str, content: bytes, message: str):
    (tmp_path / "config.json").write_text("{}")
    if file == "config.json":
        write(tmp_path / "model.safetensors", f'{{"a":{{{ENTRY}}}}}')
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsCheckpoint(tmp_path)


def test_a_config_may_have_infinity(tmp_path: Path):
    """As those of Mamba 2 have."""
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    SafetensorsCheckpoint(write(tmp_path / "model.safetensors", f'{{"a":{{{ENTRY}}}}}'))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "model.fp16", "model"])
def test_an_index_under_the_names_of_diffusers_and_of_variants(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text('{"_class_name": "Transformer2DModel"}')
    shards = [f"{name}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for tensor, shard in zip("ab", shards, strict=True):
        write(tmp_path / shard, f'{{"{tensor}":{{{ENTRY}}}}}')
    index = tmp_path / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    found = SafetensorsCheckpoint(tmp_path)
    assert {file.name for file in found.files} == {*shards, index.name, "config.json"}


def test_a_single_file_of_diffusers_beside_a_variant(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"):
        write(tmp_path / name, f'{{"a":{{{ENTRY}}}}}')
    found = SafetensorsCheckpoint(tmp_path)
    assert {file.name for file in found.files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    write(tmp_path / "model.safetensors", f'{{"a":{{{ENTRY}}}}}')
    with pytest.raises(CheckpointError, match="several models, diffusion_pytorch_model"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("value", [7, "lm_head", ["("], ["(a+)+$"], [".*.*.*x"], [7], {"a": 1}], ids=repr)
def test_patterns_of_a_config_are_valid_and_end_soon(tmp_path: Path, value: object):
    quantization = {"quant_method": "bitnet", "quantization_mode": "online", "modules_to_not_convert": value}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=r"modules_to_not_convert in config\.json is no list of names"):
        Config(tmp_path / "config.json").quantised_by_forward("a" * 1000)


@pytest.mark.parametrize(
    "method", ["awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "hqq", "torchao", ["x"]]
)
def test_descriptions_that_do_not_fit_the_tensors(method: object, tmp_path: Path):
    """Of a quantisation: entries and tensors of any form end in a CheckpointError."""
    draw = random.Random(str(method))
    values: list[object] = [None, True, 0, -1, 1.5, 1 << 70, "x", "0x0", [], ["("], {}, {"a": {"weights": 7}}]
    values += [{"a": {"weights": {"num_bits": "4", "block_structure": [0, 0]}}}]
    names = ["weight", "weight_scale", "weight_packed", "weight_shape", "qweight", "qzeros", "scales", "g_idx", "SCB"]
    names += ["weight.absmax", "W_q", "scale", "zero", "_weight_qdata", "_weight_scale", "weight_scale_inv"]
    keys = ["bits", "group_size", "sym", "version", "format", "config_groups", "weight_block_size", "desc_act"]
    states = [{"shape": [8, 1 << 62], "blocksize": 1}, {"shape": [8, 8], "blocksize": 0}, {"shape": 7}, []]
    for _ in range(60):
        config = {key: draw.choice(values) for key in draw.sample(keys, 4)} | {"quant_method": method}
        tensors = {}
        for name in draw.sample(names, 5):
            dtype = draw.choice([torch.uint8, torch.int32, torch.float16, torch.float8_e4m3fn])
            tensors[f"l.{name}"] = torch.ones(draw.choice([(8,), (8, 8), (1, 8), (), (8, 1, 1)])).to(dtype)
        state = json.dumps(draw.choice(states)).encode()
        tensors["l.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
        described = draw.choice(
            ["{", "[]", '{"_type": ["a"], "_data": 7}', '{"_type": "Int4Tensor", "_data": {"shape": 7}}']
        )
        (tmp_path / "model.safetensors").write_bytes(save(tensors, metadata={"l.weight": described}))
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        for side in ("output", "input"):
            gains = GainFile({"l": torch.ones(8)}, {"l": side}, {"l": None}, "gain", None, "0")
            with contextlib.suppress(CheckpointError):
                SafetensorsCheckpoint(tmp_path).edits(gains, requantize=draw.random() < 0.5, check_base=True)
