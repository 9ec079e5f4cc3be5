"""A run on a GPU rehearsed without one: each part's calls on meta tensors, over Triton's real launcher and a recording driver.

    python -m benchmarks.gpu.rehearsal sm_90 [--no-compile] [--only PART ...]

Imports, arguments, the choice of kernels, their compiling, their shared memory and the rows are as on the device. Nothing is
computed or timed: every figure is 1, and the gate passes whatever it is given. What asks for a real GPU is in NOT_REHEARSED.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu import odd_shapes, warm
from benchmarks.gpu import parts as real
from benchmarks.harness import gate, timing
from benchmarks.harness.results import Row
from gain_ops.backends.interface import OPS
from gain_ops.ops import dispatch, raw

# a subprocess of its own, cuBLASLt, the allocator's counters, or do_bench
NOT_REHEARSED = (
    "proof",
    "cublaslt",
    "peaks of steps",
    "tuning",
    "the rest of the proof",
    "peaks of layers",
    "steps",
)
SANITIZED = "what the sanitizers watch"
REHEARSED = (*(part.name for part in real.PARTS if part.name not in NOT_REHEARSED), SANITIZED)
META = torch.device("meta")
MEASURED = "rehearsed"

Name = TypeVar("Name", bound=Hashable)


def parts(
    architecture: str, *, compile: bool = True, only: Collection[str] = REHEARSED
) -> Iterator[tuple[str, list[Row]]]:
    """Each part with the rows that it makes, as it ends; what the sanitizers watch comes last, and has none."""
    rows: list[Row] = []
    with _recording(architecture, compile), tempfile.TemporaryDirectory() as out:
        for part in real.PARTS:
            if part.name in only:
                made = list(part.run(0.0, rows, Path(out)))
                rows += made
                yield part.name, made
        if SANITIZED in only:
            odd_shapes.main(META)
            yield SANITIZED, []


def refused(rows: Collection[Row]) -> list[str]:
    """What raised where it was called, and so has no figure: the compiler's refusals too."""
    return sorted({f"{row.contestant} ({row.backend}): {row.note}" for row in rows if "raised" in row.note})


@contextlib.contextmanager
def _recording(architecture: str, compile: bool) -> Iterator[None]:
    from gain_ops.kernels.recording import recording

    def runs(device_type: str, *of: Any) -> str | None:
        return None if device_type == META.type else "rehearsed on meta tensors alone"

    with contextlib.ExitStack() as stack:
        stack.enter_context(recording(architecture, compile=compile))
        for target, name, stand_in in (
            (real, "DEVICE", META),
            (timing, "measure_together", _measured),
            (gate, "compare", lambda *of: []),
            (torch, "equal", lambda *of: True),
            (torch, "compile", lambda layer, **options: layer),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        # torch's dispatcher gives meta tensors to the fakes
        for op in OPS:
            stack.enter_context(mock.patch.object(raw, op, _by_backend(op)))
        stack.enter_context(mock.patch.dict(dispatch._OBSTACLES, triton=runs))
        dispatch.forget()
        stack.callback(dispatch.forget)
        yield


def _by_backend(op: str) -> Callable[..., Any]:
    def call(*of: Any) -> Any:
        *arguments, backend = of
        like = next(a for a in arguments if isinstance(a, Tensor))
        return getattr(dispatch.implementation(backend, like), op)(*arguments)

    return call


def _measured(
    cases: Mapping[Name, Callable[[], object] | timing.Case], device: torch.device, **options: Any
) -> dict[Name, timing.Quantiles]:
    """Every case once."""
    for case in cases.values():
        if isinstance(case, timing.Case):
            case.run(case.state())
        else:
            case()
    return {name: timing.quantiles([1.0] * timing.LEAST_ROUNDS, MEASURED) for name in cases}


def compile_all(out: Path, architecture: str) -> str:
    """Rehearse every part and pack what it compiled into OUT's archive; what was packed, in words."""
    out.mkdir(parents=True, exist_ok=True)
    with warm.compiling_into((out / warm.FOLDER).resolve()) as keys:
        for part, rows in parts(architecture):
            print("\n    ".join([f"{part}: {len(rows)} rows, {len(keys)} kernels so far", *refused(rows)]), flush=True)
    return warm.pack(out / warm.FOLDER, keys, architecture, out / warm.ARCHIVE)


def main() -> None:
    """Print every part, how many of its rows have a figure, and what raised."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.rehearsal", description=main.__doc__)
    parser.add_argument("architecture")
    parser.add_argument(
        "--no-compile", action="store_true", help="in a minute: what is launched, not whether it compiles"
    )
    parser.add_argument("--only", nargs="+", choices=REHEARSED, default=REHEARSED, metavar="PART")
    arguments = parser.parse_args()
    for part, rows in parts(arguments.architecture, compile=not arguments.no_compile, only=arguments.only):
        figures = sum(row.median is not None for row in rows)
        print("\n    ".join([f"{part}: {figures} figures", *refused(rows)]), flush=True)


if __name__ == "__main__":
    main()
