"""TMA descriptors: what a kernel gets in place of a tensor, and their encoded forms, which are kept.

Triton encodes every descriptor of a launch again, which takes the host as long as all else of the launch. What is encoded is an
address, sizes and strides; so the same tensor, or the next one in its place, has the same descriptor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

Block = tuple[int, int]

LIMIT = 4096
"""Encoded descriptors that are kept of a compiled kernel; all are dropped when one more comes."""


def descriptor(t: Tensor, block: Block) -> TensorDescriptor:
    """A TMA descriptor of a row-major 2-D tensor whose tiles are ``block``."""
    shape, strides = t.shape, t.stride()
    if (
        len(shape) != 2
        or shape[0] < 1
        or shape[1] < 1
        or strides[1] != 1
        or (strides[0] * t.itemsize | t.data_ptr()) % 16
    ):
        return TensorDescriptor(t, list(shape), list(strides), list(block))  # says what is wrong
    # without __post_init__, whose checks take as long as all else of a launch; the block is of a schedule that compiled
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = t, shape, strides, block
    return made


class Encoded:
    """Launches a compiled kernel with descriptors that are encoded once for an address, sizes and strides."""

    def __init__(self, run: Any, encode: Callable[..., list[Any]], metas: Sequence[Any]) -> None:
        self.run = run
        """Triton's launcher of the kernel, but given what descriptors were encoded to in their places."""
        self._encode = encode
        self._metas = metas
        self._kept: dict[tuple[Any, ...], list[Any]] = {}

    def expand(self, tensors: tuple[Tensor | None, ...], blocks: tuple[Block | None, ...]) -> list[Any]:
        """The tensors as ``run`` takes them."""
        given: list[Any] = []
        number = 0
        for t, block in zip(tensors, blocks, strict=True):
            if t is None or block is None:
                given.append(t)
                continue
            key = (number, t.data_ptr(), t.shape, t.stride())
            found = self._kept.get(key)
            if found is None:
                found = self._encode(descriptor(t, block), self._metas[number])
                if len(self._kept) >= LIMIT:
                    self._kept.clear()
                self._kept[key] = found
            given += found
            number += 1
        return given


def encoded(compiled: CompiledKernel) -> Encoded | None:
    """The launcher of a compiled kernel that takes encoded descriptors, where Triton's is one of NVIDIA's as known here."""
    launcher: Any = compiled.run
    metas = getattr(compiled.metadata, "tensordesc_meta", None)
    launch: Any = getattr(launcher, "launch", None)
    code = getattr(launch, "__code__", None)
    if code is None or not metas or None in metas:
        return None
    # Triton's launcher encodes descriptors in a closure around the one in C
    cells = dict(zip(code.co_freevars, [cell.cell_contents for cell in launch.__closure__ or ()], strict=True))
    in_c, encode = (
        cells.get("launcher"),
        cells.get("make_tensordesc_arg", launch.__globals__.get("make_tensordesc_arg")),
    )
    if in_c is None or encode is None:
        return None
    run = copy.copy(launcher)
    run.launch = in_c
    if encode.__code__.co_argcount == 3:  # Triton 3.9; the third is unused
        return Encoded(run, lambda made, meta: encode(made, meta, ()), metas)
    return Encoded(run, encode, metas)
