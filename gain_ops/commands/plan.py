"""``gain-ops plan``: what a model's training needs on a number of GPUs, what fits, and how to start it."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gain_ops.commands.console import STDOUT, clear_errors, escape, print_table
from gain_ops.planning.configs import BUNDLED, read_config
from gain_ops.utils.errors import UsageError, file_errors
from gain_ops.utils.files import open_stream, regular_file, replace_file
from gain_ops.utils.wording import size_text

if TYPE_CHECKING:
    from gain_ops.planning.strategies import Job, Row


__all__ = ["plan"]

_FAMILIES = ("gain-ffn", "gain")
_STDOUT = 1


def plan(
    model: Annotated[
        str, typer.Option(help=f"A config.json, the folder of a transformers model, or {', '.join(BUNDLED)}.")
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all.")] = 1,
    memory: Annotated[float, typer.Option(help="GiB of each GPU, as torch sees it; an 80 GB GPU has about 79.")] = 79.0,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a step on each GPU (with tensor parallelism, on each group).")
    ] = 8192,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a window. Default: the model's longest, at most --tokens.")
    ] = None,
    targets: Annotated[str, typer.Option(help="The gains to recommend: gain-ffn or gain.")] = _FAMILIES[0],
    dtype: Annotated[str, typer.Option(help="The frozen weights' dtype: bfloat16 or float32.")] = "bfloat16",
    reserve: Annotated[
        float, typer.Option(help="GiB to leave free, for the CUDA context, workspaces and fragments; an assumption.")
    ] = 2.0,
    every: Annotated[bool, typer.Option("--all", help="Show each way with and without checkpointing.")] = False,
    out: Annotated[
        Path | None, typer.Option("--json", help="Write every row to this file; /dev/stdout: in place of the table.")
    ] = None,
) -> None:
    """Plan a training: bytes of each GPU under every strategy, and the simplest way that fits.

    It counts on the meta device, so it plans a model of any size on a laptop, without the weights.
    """
    with clear_errors():
        if targets not in _FAMILIES:
            raise UsageError(f"targets {targets!r} is unknown: choose {' or '.join(_FAMILIES)}")
        if not 0 < memory < float("inf"):
            raise UsageError(f"--memory is {memory:g}: give GiB above 0")
        if not 0 <= reserve < memory:
            raise UsageError(f"--reserve is {reserve:g}: give GiB from 0 to below --memory, {memory:g}")
        stream = None if out is None else open_stream(out)
        if out is not None and stream is None:
            with file_errors():
                regular_file(out)
        _import_torch()
        from gain_ops.measure.language_models import text_config
        from gain_ops.planning.strategies import GIB, Job, nearest, recommend, rows
        from gain_ops.training.loading import resolve_dtype

        weights = resolve_dtype(dtype)
        config = read_config(model)
        longest = getattr(text_config(config), "max_position_embeddings", None) or tokens
        length = sequence_length or min(tokens, longest)
        job = Job(config, gpus, round(memory * GIB), tokens, length, weights, reserve=round(reserve * GIB))
        with STDOUT.status("counting on the meta device", spinner="line"):
            found = list(rows(job))
            if all(row.obstacle for row in found):
                raise UsageError(f"{model} cannot be planned: {found[-1].obstacle}")  # the last changes no layer
            best = recommend(found, targets)
            other = None if best is not None else nearest(job, found, targets)
            layers = _layers(config) if best is not None and best.sharded > 1 else ""
        if out is not None:
            text = _json(model, job, found, best, other, layers)
            with file_errors():
                if stream is None:
                    replace_file(out, lambda path: path.write_text(text, encoding="utf-8"))
                else:
                    _write_to_stream(stream, text)
        if stream == _STDOUT:
            return  # its reader expects JSON alone
    _print_rows(found if every else _shown(found))
    STDOUT.print(
        f"of {memory:g} GiB, {reserve:g} are left free; GiB of a GPU; tokens: of all GPUs in a step; sent: by a GPU in a step",
        soft_wrap=True,
    )
    for line in _refusals(found):
        STDOUT.print(f"[yellow]not counted:[/] {escape(line)}", soft_wrap=True)
    if best is not None:
        _print_recommended(best, job, layers)
    else:
        _print_lacking(found, job, targets, other)
    if out is not None:
        STDOUT.print(f"wrote {escape(str(out))}", soft_wrap=True)


def launch(row: Row, gpus: int, layers: str) -> list[str]:
    """How to start such a training: lines of a script (docs/howto/distributed.md has the rest), and the command.

    layers is the name of the list of blocks, which FSDP shards one by one.
    """
    from gain_ops.planning.methods import METHODS
    from gain_ops.planning.strategies import NODE

    lines = [METHODS[row.method].line]
    if row.checkpointed:
        lines.append('model.gradient_checkpointing_enable({"use_reentrant": False})')
    over_tensor, over_data = "mesh", ""  # FSDP2 alone takes all processes
    if row.tensor > 1 and row.sharded > 1:
        lines.append(f'mesh = init_device_mesh("cuda", ({row.sharded}, {row.tensor}), mesh_dim_names=("dp", "tp"))')
        over_tensor, over_data = 'mesh["tp"]', ', mesh=mesh["dp"]'
    elif row.tensor > 1:
        lines.append(f'mesh = init_device_mesh("cuda", ({row.tensor},))')
    if row.tensor > 1:
        lines += [f"parallelize_module(model, {over_tensor}, styles)", "place_gains(model)"]
    if row.sharded > 1:
        lines.append(f"for block in model.{layers}:")
        lines += [f"    fully_shard(block{over_data})", f"fully_shard(model{over_data})"]
    elif row.tensor < gpus:
        lines.append("model = DistributedDataParallel(model, gradient_as_bucket_view=True)")
    if gpus == 1:
        return [*lines, "python train.py"]
    # the same number on each machine, and no group of tensor parallelism on two machines
    each = max(count for count in range(row.tensor, NODE + 1, row.tensor) if gpus % count == 0)
    nodes = f"--nnodes {gpus // each} " if gpus > NODE else ""
    return [*lines, f"torchrun {nodes}--nproc-per-node {each} train.py"]


def _import_torch() -> None:
    """Import torch so that what is imported after it takes less time, where this process does nothing but plan."""
    if "torch" in sys.modules:
        return
    # PEFT imports bitsandbytes, which has functions compiled as it is imported: that loads a compiler, and none is called.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    importlib.import_module("torch")
    gc.freeze()  # its objects stay until the process ends: no collection need look through them


def _write_to_stream(number: int, text: str) -> None:
    """Write to a file that is open, standard output in the way that print() does."""
    if number == _STDOUT:
        sys.stdout.write(text)
    else:
        with open(number, "w", encoding="utf-8", closefd=False) as stream:
            stream.write(text)


def _shown(found: list[Row]) -> list[Row]:
    """One row for each strategy and method: without checkpointing if that fits, otherwise with it."""
    kept: dict[tuple[str, str], Row] = {}
    for row in found:  # the row without checkpointing comes first
        known = kept.get((row.strategy, row.method))
        if known is None or not known.fits:
            kept[row.strategy, row.method] = row
    return list(kept.values())


def _print_rows(found: list[Row]) -> None:
    from gain_ops.planning.strategies import GIB

    shown = [row for row in found if row.obstacle is None]
    parts = ("weights", "gathered", "saved", "transient", "states", "peak", "left")
    rows = []
    for row in shown:
        figures = (row.weights, row.gathered, row.saved, row.transient, row.states, row.total, row.headroom)
        again = "run again" if row.checkpointed else "once"
        given = [row.strategy, row.method, again, *(f"{figure / GIB:.1f}" for figure in figures)]
        rows.append([*given, f"{row.step_tokens:,}", size_text(row.sent)])
    print_table(
        ["how", "method", "blocks", *parts, "tokens", "sent"],
        rows,
        left=3,
        breaks={number for number in range(1, len(shown)) if shown[number].strategy != shown[number - 1].strategy},
        dim={number for number, row in enumerate(shown) if not row.fits},
    )


def _refusals(found: list[Row]) -> list[str]:
    """What was not counted and why, a line for each reason."""
    reasons: dict[str, list[Row]] = {}
    for row in found:
        if row.obstacle:
            reasons.setdefault(row.obstacle, []).append(row)
    lines = []
    for reason, refused in reasons.items():
        methods, strategies = ({getattr(row, of): None for row in refused} for of in ("method", "strategy"))
        which = strategies if len(methods) == len({row.method for row in found}) else methods
        lines.append(f"{'; '.join(which)}: {reason}")
    return lines


def _layers(config: Any) -> str:
    from gain_ops.measure import meta_models
    from gain_ops.measure.language_models import decoder_layers

    return decoder_layers(meta_models.build(config))[0]


def _print_recommended(best: Row, job: Job, layers: str) -> None:
    STDOUT.print(
        f"[bold]{escape(_name(best))}[/]: {size_text(best.total)} of a GPU, {size_text(best.headroom)} to spare, "
        f"{best.step_tokens:,} tokens a step",
        soft_wrap=True,
    )
    for line in launch(best, job.gpus, layers):
        STDOUT.print(f"    {escape(line)}", soft_wrap=True)


def _print_lacking(found: list[Row], job: Job, targets: str, other: tuple[Job, Row] | None) -> None:
    """Where nothing is recommended: what lacks least, and the nearest that fits."""
    from gain_ops.planning.methods import METHODS
    from gain_ops.planning.strategies import recommend

    able = [row for row in found if row.obstacle is None and METHODS[row.method].targets == targets]
    if not able:
        line = f"[yellow]nothing to recommend:[/] no way with {targets} could be counted"
        for family in _FAMILIES:
            if (best := recommend(found, family)) is not None:
                line += f"; what fits with --targets {family}: {escape(_name(best))}, {size_text(best.total)} of a GPU"
        STDOUT.print(line, soft_wrap=True)
        return
    least = max(able, key=lambda row: row.headroom)
    line = f"[yellow]nothing fits:[/] {escape(_name(least))} lacks {size_text(-least.headroom)} on each GPU"
    if other is None:
        STDOUT.print(f"{line}: take a smaller model or a quantised base", soft_wrap=True)
        return
    near, row = other
    change = f"--gpus {near.gpus}"
    if near.gpus == job.gpus:
        change = f"--tokens {near.tokens}" + (f" --sequence-length {near.length}" if near.length < job.length else "")
    STDOUT.print(line, soft_wrap=True)
    STDOUT.print(
        f"the nearest that fits: [bold]{change}[/] with {escape(_name(row))}, {size_text(row.total)} of a GPU",
        soft_wrap=True,
    )


def _name(row: Row) -> str:
    return f"{row.method}, {row.strategy}" + (", with activation checkpointing" if row.checkpointed else "")


def _json(model: str, job: Job, found: list[Row], best: Row | None, other: tuple[Job, Row] | None, layers: str) -> str:
    def told(row: Row) -> dict[str, Any]:
        return asdict(row) | {"total": row.total, "fits": row.fits}

    asked = {name: getattr(job, name) for name in ("gpus", "memory", "tokens", "length", "reserve")}
    asked |= {"model": model, "dtype": str(job.dtype).removeprefix("torch.")}
    written = {"asked": asked, "rows": [told(row) for row in found], "recommended": None, "nearest": None}
    if best is not None:
        written["recommended"] = told(best) | {"launch": launch(best, job.gpus, layers)}
    if other is not None:
        near, row = other
        written["nearest"] = told(row) | {"gpus": near.gpus, "tokens": near.tokens, "length": near.length}
    return json.dumps(written, indent=2) + "\n"
