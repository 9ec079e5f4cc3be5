"""Writes a plain model with the gains folded into its weights: the work of ``gain-ops absorb``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import gain_ops
from gain_ops.files import replace_folder
from gain_ops.recipes.evaluation import largest_difference, logits
from gain_ops.recipes.models import load_model

__all__ = ["AbsorbReport", "absorb_to_folder"]

_PROBE_SHAPE = (2, 64)  # windows, tokens
_RELOAD_TOLERANCE = 1e-3  # of the largest logit: the same weights in the same dtype, so about the same bits


@dataclass(frozen=True)
class AbsorbReport:
    """What absorbing changed.

    ``max_weight_error`` is the largest rounding error of a weight. ``max_logit_difference`` is between the model with
    gains and the folder as plain transformers loads it, on fixed random tokens; None without verification.
    """

    layers: int
    max_weight_error: float
    max_logit_difference: float | None
    max_logit: float


def absorb_to_folder(
    source: Path,
    gains: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    force: bool = False,
    check_base: bool = True,
    verify: bool = True,
) -> AbsorbReport:
    """Load a model and a gain file, fold ``W <- diag(gain) @ W``, and save model and tokenizer for plain transformers.

    The folder is written beside ``out``, verified there, and moved into place; an error leaves nothing behind.

    Args:
        source: the model, as in :func:`gain_ops.recipes.models.load_model`.
        gains: a file of ``gain_ops.save_gains``.
        out: the folder to make.
        dtype: of the written weights; None keeps the model's own.
        device: where to compute; None is the CPU.
        force: replace ``out`` where it is a model folder already.
        check_base: refuse a gain file that was trained on other weights; see ``gain_ops.load_gains``.
        verify: load the folder again and compare logits with the model that has gains.

    Raises:
        FileExistsError: ``out`` is not empty, and ``force`` is off or it is not a model folder.
        ValueError: ``out`` holds the model or the gain file to read, or the saved model is not the absorbed one.
        OSError: files that cannot be read or written.
    """
    if not gains.is_file():
        raise FileNotFoundError(f"no gain file at {gains}: give one that gain-ops adapt or gain_ops.save_gains wrote")
    _check_out(out, [source, gains], force=force)
    loaded = load_model(source, dtype=dtype, device=device or torch.device("cpu"))
    gain_ops.load_gains(loaded.model, gains, check_base=check_base)
    ids = _probe(loaded.model)
    gained = _logits(loaded.model, ids)
    absorbed = gain_ops.absorb(loaded.model)
    difference = None
    with replace_folder(out) as folder:
        cast("Any", loaded.model).save_pretrained(folder)
        cast("Any", loaded.tokenizer).save_pretrained(folder)
        if verify:
            difference = _verify(folder, loaded.model, ids, gained)
    return AbsorbReport(len(absorbed.layers), absorbed.max_abs_error, difference, gained.abs().max().item())


def _check_out(out: Path, inputs: list[Path], *, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: name a folder to write into (--out)")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{out} is not empty: name another folder (--out), or replace it with --force")
    if not (out / "config.json").is_file():
        raise FileExistsError(f"{out} is not a model folder (no config.json in it), so --force does not replace it")
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out} holds {path}, which is to be read: name another folder (--out)")


def _probe(model: nn.Module) -> Tensor:
    vocabulary = cast("Any", model).get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, _PROBE_SHAPE, generator=torch.Generator().manual_seed(0))


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return logits(model, ids)


def _verify(folder: Path, absorbed: nn.Module, ids: Tensor, gained: Tensor) -> float:
    """The largest logit difference between the model with gains and what the folder holds."""
    reloaded = load_model(folder, dtype=None, device=gained.device).model
    found = _logits(reloaded, ids)
    drift = largest_difference(found, _logits(absorbed, ids))
    if not drift <= _RELOAD_TOLERANCE * gained.abs().max().item():
        raise ValueError(
            f"the saved model is not the absorbed one: logits differ by {drift:.2e} after reloading, so nothing was "
            "written; please report this with the model's name"
        )
    return largest_difference(gained, found)
