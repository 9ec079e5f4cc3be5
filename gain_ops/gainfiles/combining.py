"""Combine gain files into one: a product of powers of the gains, or a weighted sum of the deltas.

::

    how="powers":  gain = prod_i gain_i ** w_i            how="mean":  delta = sum_i w_i * delta_i            gain = 1 + delta
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gain_ops._version import __version__
from gain_ops.gainfiles.file import GainFile, GainFileError, read_gains
from gain_ops.utils.errors import UsageError
from gain_ops.utils.wording import some_of

HOWS = ("powers", "mean")


def combine_gains(
    files: Sequence[GainFile | str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    how: str = "powers",
    *,
    check_base: bool = True,
) -> GainFile:
    """Combine gain files into one, for write_gains(); no model is needed.

    ::

        how="powers":  gain = prod_i gain_i ** w_i
        how="mean":    delta = sum_i w_i * delta_i            gain = 1 + delta

    With powers the weights (1, 1) apply both files, (0.5, 0.5) give their geometric mean, (0.5,) goes half the way and
    (-1,) undoes. The weights of "mean" are never normalised: the result is a mean if they sum to 1. Results are computed in
    float64 and rounded to float32 once. A layer that a file lacks has gain 1 in it.

    Args:
        files: paths, or results of read_gains().
        weights: one for each file, or None for default_weights().
        how: "powers" or "mean".
        check_base: whether two files with a fingerprint of a layer's frozen weight must have the same one. With False, a
            layer whose fingerprints differ gets none.

    Returns:
        GainFile: every layer of any file. The targets are those that all files have, or otherwise the names of the layers;
        the base model is the one that the files name, or None where they name several.

    Raises:
        ValueError: no files, another number of weights, a weight that is not finite, or an unknown ``how``.
        GainFileError: files that differ in a layer's side, size or base; a power that is not defined (a gain below zero
            takes integer weights, a gain of zero none below zero); a result that float32 cannot hold; or a file that
            cannot be read.
        FileNotFoundError: no such file.

    """
    if how not in HOWS:
        raise UsageError(f"how={how!r} is not one of {', '.join(map(repr, HOWS))}")
    if weights is None:
        weights = default_weights(len(files), how)
    if not files or len(files) != len(weights):
        raise UsageError(
            f"give at least one file and a weight for each: got {len(files)} files, {len(weights)} weights"
        )
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"every weight must be finite, got {', '.join(map(str, weights))}")
    opened = {
        f"file {i}" if isinstance(file, GainFile) else f"file {i} ({file})": (
            file if isinstance(file, GainFile) else read_gains(file)
        )
        for i, file in enumerate(files, 1)
    }
    if whole := [label for label, file in opened.items() if file.modules]:
        raise GainFileError(f"{whole[0]} holds modules that were trained whole, and gains alone can be combined")
    sides = merged_sides(opened)
    fingerprints = _merged_fingerprints(opened, sides, check_base=check_base)
    combine = _powers if how == "powers" else _mean
    deltas = {}
    for name in sides:
        terms = [
            (label, file.deltas[name].double(), weight)
            for (label, file), weight in zip(opened.items(), weights, strict=True)
            if name in file.deltas
        ]
        _refuse_other_sizes(name, terms)
        deltas[name] = combine(name, terms).float()
        if not deltas[name].isfinite().all():
            raise GainFileError(f"the combined gain of {name} does not fit into float32: use smaller weights")
    return GainFile(
        deltas=deltas,
        sides=sides,
        fingerprints=fingerprints,
        targets=merged_targets(opened),
        base_model=_only(file.base_model for file in opened.values()),
        package=__version__,
        spots={name: text for file in opened.values() for name, text in file.spots.items() if fingerprints[name]},
    )


def default_weights(count: int, how: str = "powers") -> list[float]:
    """Weights for ``count`` files: 1 each for powers, so that all apply, and ``1 / count`` each for the mean."""
    return [1 / count if how == "mean" else 1.0] * count


def merged_sides(files: Mapping[str, GainFile]) -> dict[str, str]:
    """The side of each layer of any file, in the files' order; GainFileError if two differ. Keys are for messages."""
    found: dict[str, tuple[str, str]] = {}
    for label, file in files.items():
        for name, side in file.sides.items():
            other, other_side = found.setdefault(name, (label, side))
            if side != other_side:
                raise GainFileError(
                    f"{name} has its gain on the {other_side} side in {other} and on the {side} side in {label}: a "
                    "layer can have one side only"
                )
    return {name: side for name, (_, side) in found.items()}


def merged_targets(files: Mapping[str, GainFile]) -> str | tuple[str, ...]:
    """The targets that all files have, or otherwise the names of all layers."""
    targets = {file.targets for file in files.values()}
    return targets.pop() if len(targets) == 1 else tuple(merged_sides(files))


def _merged_fingerprints(
    files: Mapping[str, GainFile], names: Iterable[str], *, check_base: bool
) -> dict[str, str | None]:
    known = {name: [file.fingerprints.get(name) for file in files.values()] for name in names}
    differing = [name for name, prints in known.items() if len(set(prints) - {None}) > 1]
    if differing and check_base:
        bases = ", ".join(f"{label}: {file.base_model or 'unknown'}" for label, file in files.items())
        raise GainFileError(
            f"the files were trained on different weights (base models: {bases}): they differ in {len(differing)} of "
            f"{len(known)} layers, {some_of(differing)}. Combine files of one base, or pass check_base=False."
        )
    return {name: _only(prints) for name, prints in known.items()}


def _only(values: Iterable[str | None]) -> str | None:
    """The only value beside None, or None where there are several."""
    known = set(values) - {None}
    return known.pop() if len(known) == 1 else None


def _refuse_other_sizes(name: str, terms: Sequence[tuple[str, Tensor, float]]) -> None:
    (first, expected, _), *others = terms
    for label, delta, _ in others:
        if delta.shape != expected.shape:
            raise GainFileError(
                f"{name} has {expected.numel()} gains in {first} and {delta.numel()} in {label}: they are of different "
                "models"
            )


def _powers(name: str, terms: Sequence[tuple[str, Tensor, float]]) -> Tensor:
    """``prod_i (1 + delta_i) ** w_i - 1``, over logarithms, so that a small delta loses no digits."""
    logarithm = torch.zeros_like(terms[0][1])  # of the magnitude
    negative = torch.zeros_like(logarithm, dtype=torch.bool)
    for label, delta, weight in terms:
        below, zero = delta < -1, delta == -1
        if below.any() and not float(weight).is_integer():
            raise GainFileError(
                f"{name} has a gain below zero in {label}, which has no power {weight}: give it an integer weight, or use "
                "how='mean'"
            )
        if zero.any() and weight < 0:
            raise GainFileError(f"{name} has a gain of zero in {label}, which has no power {weight}")
        if weight:  # 0 ** 0 is 1
            logarithm += weight * torch.log1p(torch.where(below, -2 - delta, delta))
            negative ^= below & (weight % 2 == 1)
    return torch.where(negative, -logarithm.exp() - 1, logarithm.expm1())


def _mean(name: str, terms: Sequence[tuple[str, Tensor, float]]) -> Tensor:
    """``sum_i w_i * delta_i``."""
    return torch.stack([weight * delta for _, delta, weight in terms]).sum(0)
