"""A quantised layer in a safetensors file, and what its bytes are once a gain is absorbed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import Tensor

from gain_ops.checkpoints.edits import Layer, Rounding
from gain_ops.checkpoints.formats.headers import read_header
from gain_ops.checkpoints.schemes import edits

TINY = 256 * torch.finfo(torch.float32).smallest_normal  # a code times a scale that is rounded to fewer bits near zero
NAME = "model.layers.0.self_attn.o_proj"

# the gains of real training, and those that break things: zero, negative, powers of two, tiny
GAINS = st.one_of(
    st.floats(0.5, 2.0, width=32),
    st.floats(-3.0, 3.0, width=32),
    st.sampled_from([0.0, -1.0, 1.0, 2.0, 0.25, 2.0**-12]),
)


@dataclass(frozen=True)
class Absorbed:
    """The layer's tensors afterwards, which of them were edited, and the rounding of each of these."""

    tensors: dict[str, Tensor]
    roundings: dict[str, Rounding]


def gains_of(data: st.DataObject, count: int) -> Tensor:
    return torch.tensor(data.draw(st.lists(GAINS, min_size=count, max_size=count)), dtype=torch.float32)


def absorb(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    gain: Tensor,
    side: str = "output",
    *,
    requantize: bool = False,
    described: Mapping[str, Any] | None = None,
    rows: int = 3,
) -> Absorbed:
    """Write a layer's tensors (by what follows its name) and apply the edits to the bytes, ``rows`` rows at a time.

    What no edit names keeps its bytes; that is checked. ``described`` is what torchao says in the header of the weight.
    """
    file = folder / "model.safetensors"
    metadata = {f"{NAME}.weight": json.dumps(described)} if described else None
    named = {f"{NAME}.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(named | {"model.norm.weight": torch.ones(3)}, file, metadata=metadata)
    header = read_header(file)
    stored = {name: header.entries[f"{NAME}.{name}"].stored() for name in tensors}
    layer = Layer("gained." + NAME, side, gain, stored)
    content = bytearray(file.read_bytes())
    roundings = {}
    for edit in edits(config, header.metadata, layer, requantize=requantize):
        assert edit.layer == layer.name
        region, rounding = edit.region, Rounding()
        for start in range(0, region.rows, rows):
            at = region.offset + start * region.row_bytes
            end = at + min(rows, region.rows - start) * region.row_bytes
            block = torch.frombuffer(bytearray(content[at:end]), dtype=torch.uint8).view(-1, region.row_bytes)
            before = block.clone()
            new, error = edit.rewrite(block, start)
            again, _ = edit.rewrite(block, start)
            assert torch.equal(block, before)
            assert torch.equal(new, again)
            assert (new.shape, new.dtype) == (block.shape, torch.uint8)
            content[at:end] = new.numpy().tobytes()
            rounding |= error
        roundings[edit.tensor.removeprefix(f"{NAME}.")] = rounding
    absorbed = folder / "absorbed.safetensors"
    absorbed.write_bytes(content)
    after = safetensors.torch.load_file(absorbed)
    assert torch.equal(after["model.norm.weight"], torch.ones(3))
    result = {name: after[f"{NAME}.{name}"] for name in tensors}
    for name in tensors.keys() - roundings.keys():
        assert same(result[name], tensors[name]), f"{name} changed, and no edit says so"
    return Absorbed(result, roundings)


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits."""
    return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def rounded_once(scale: Tensor, factor: Tensor) -> Tensor:
    """What a scale has to become, bit for bit."""
    return (scale.double() * factor.double()).to(torch.float32).to(scale.dtype)
