"""``gain-ops info``: what is installed and found here, and which backend runs each op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gain_ops.commands.console import clear_errors, print_pairs
from gain_ops.commands.tune import Tokens, sizes_of

if TYPE_CHECKING:
    import torch


__all__ = ["info"]


def info(
    shape: Annotated[
        str | None, typer.Option(help="A layer's features, INxOUT: say by what its GEMMs would run, and why.")
    ] = None,
    tokens: Tokens = 8192,
) -> None:
    """Versions, devices, environment variables, and the backend that each op would use."""
    with clear_errors():
        sizes = None if shape is None else sizes_of(shape)
        import torch

        from gain_ops.measure import environment

        print_pairs("versions", {**environment.versions(), "cuda kernels": environment.compiled_kernels()}.items())
        print_pairs("devices", [(str(device), environment.describe_device(device)) for device in environment.devices()])
        print_pairs("environment", environment.variables().items() or [("GAIN_OPS_*", "none set")])
        dtypes = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float32]}
        for device_type in dict.fromkeys(device.type for device in environment.devices()):
            for dtype in dtypes[device_type]:
                _print_backends(device_type, dtype, None if sizes is None else (tokens, sizes[1], sizes[0]))


def _print_backends(device_type: str, dtype: torch.dtype, size: tuple[int, int, int] | None) -> None:
    from gain_ops.ops import dispatch

    together: dict[tuple[str, str], list[str]] = {}
    for op, backend, reason in dispatch.explain(device_type, dtype, size):
        together.setdefault((backend, reason), []).append(op)
    rows = [(backend, f"{', '.join(ops)} ({reason})") for (backend, reason), ops in together.items()]
    print_pairs(f"backend on {device_type} in {str(dtype).removeprefix('torch.')}", rows)
