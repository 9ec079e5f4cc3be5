"""Gain files that anyone may have written: one clear GainFileError, whatever is in them."""

import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gain_ops.gainfiles.file import GainFile, GainFileError, read_gains, write_gains

NAME = "layers.0.o_proj"
HEADER: dict[str, Any] = {
    "format": "gain_ops.gains",
    "version": 1,
    "package": "0.1.0",
    "targets": "gain",
    "base_model": None,
    "layers": {NAME: {"side": "output", "base": None}},
}


def write(path: Path, header: Any, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors or {f"{NAME}.delta": torch.ones(4)}, path, metadata={"gain_ops": text})
    return path


def changed(**values: Any) -> dict[str, Any]:
    return HEADER | values


def layer(**values: Any) -> dict[str, Any]:
    return HEADER | {"layers": {NAME: HEADER["layers"][NAME] | values}}


OTHER_TYPES: list[Any] = [
    None,
    True,
    7,
    1.5,
    float("nan"),
    "text",
    [],
    ["a", 1],
    [["a"]],
    {},
    {"a": {}},
    "\x1b[2J",
    10**30,
]


def test_the_header_that_the_others_differ_from_is_read(tmp_path: Path) -> None:
    assert read_gains(write(tmp_path / "g.safetensors", HEADER)).sides == {NAME: "output"}


@pytest.mark.parametrize("value", OTHER_TYPES, ids=repr)
def test_values_of_other_types(tmp_path: Path, value: Any) -> None:
    headers = [changed(**{key: value}) for key in HEADER] + [layer(side=value), layer(base=value)]
    headers += [changed(layers={NAME: value}), value]
    allowed = {
        "package": isinstance(value, str),
        "base_model": isinstance(value, str | None),
        "targets": isinstance(value, str) or value == [],
        "base": isinstance(value, str | None),
    }
    for header, key in zip(headers, [*HEADER, "side", "base", "layer", "all"], strict=True):
        path = write(tmp_path / "g.safetensors", header)
        if allowed.get(key, False):
            read_gains(path)
            continue
        with pytest.raises(GainFileError, match=r"g\.safetensors (has|is damaged|holds)") as raised:
            read_gains(path)
        assert str(raised.value).isprintable(), key


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("[" * 100_000, "in one another"),
        ('{"format":' * 100_000, "in one another"),
        ('{"format": "gain_ops.gains", "format": "gain_ops.gains"}', "is there twice"),
        ('{"a": "\\ud800"}', "surrogates"),
        (json.dumps(changed(base_model="x")).replace('"x"', "1" * 5000), "digits"),
        (json.dumps(changed(base_model=0)).replace("0", "NaN"), "NaN"),
    ],
)
def test_headers_beyond_the_limits(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(GainFileError, match=f"has a damaged gain_ops header.*{message}"):
        read_gains(write(tmp_path / "g.safetensors", header))


@pytest.mark.parametrize("name", ["a" * 100_000, "a." * 100_000 + "b", "a" * 1001, ".".join("a" * 101)])
def test_very_long_names_are_neither_written_nor_read(tmp_path: Path, name: str) -> None:
    start = time.process_time()
    with pytest.raises(GainFileError, match=r"the name a.* has [\d,]+ characters and [\d,]+ parts, of at most"):
        read_gains(
            write(
                tmp_path / "g.safetensors",
                changed(layers={name: {"side": "output", "base": None}}),
                {f"{name}.delta": torch.ones(4)},
            )
        )
    file = GainFile({name: torch.ones(4)}, {name: "output"}, {name: None}, "gain", None, "0")
    with pytest.raises(GainFileError, match="would not be read again"):
        write_gains(file, tmp_path / "h.safetensors")
    assert not (tmp_path / "h.safetensors").exists()
    assert time.process_time() - start < 2


def test_a_name_with_control_characters_comes_back_as_it_is(tmp_path: Path) -> None:
    """A module may be called so, and its gains are not lost; commands print it escaped."""
    name = "a\x1b[2J\n\u202eo_proj"
    write_gains(
        GainFile({name: torch.ones(4)}, {name: "output"}, {name: None}, "gain", None, "0"), tmp_path / "g.safetensors"
    )
    assert list(read_gains(tmp_path / "g.safetensors").deltas) == [name]


def test_tensors_that_are_no_deltas_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    for tensor in (torch.ones(2, 2, 2), torch.ones(2, 0), torch.ones(4).half(), torch.ones(()), torch.ones(0)):
        with pytest.raises(GainFileError, match=r"layers\.0\.o_proj has a delta of shape"):
            read_gains(write(tmp_path / "g.safetensors", HEADER, {f"{NAME}.delta": tensor}))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GainFileError, match="is a device or a pipe"):
        read_gains(tmp_path / "pipe")
    with pytest.raises(GainFileError, match="is a device or a pipe"):
        read_gains("/dev/zero")


def test_mutated_files_are_read_or_refused_in_words(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors", HEADER).read_bytes()
    draw, path, read = random.Random(0), tmp_path / "g.safetensors", 0
    pieces = [b"\\u0000", b"\\ud800", b"[", b"{", b"}", b"null", b"1", b'\\"', b"\\\\", b"\xff", b"1e999", b"NaN"]
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2))):
            at = draw.randrange(8, len(data) - 16)
            data[at : at + draw.randrange(3)] = draw.choice([*pieces, bytes([draw.randrange(256)])])
        header = len(data) - 16
        path.write_bytes(struct.pack("<Q", header - 8) + bytes(data[8:]))
        try:
            read_gains(path)
        except GainFileError:
            continue
        read += 1
    assert read > 5
