"""The learning rates that were tried and chosen, and whether the choice may have missed a better one."""

from __future__ import annotations

from gain_ops.recipes.study.methods import METHODS
from gain_ops.recipes.study.records import Rate, Study

__all__ = ["chosen", "doubt", "owner", "tried"]


def owner(method: str) -> str:
    """The method whose grid was tried: another one where the method takes what was found for that."""
    known = METHODS.get(method)
    return known.rates_of or method if known else method


def tried(study: Study, method: str) -> list[Rate]:
    """The rates of the method's own grid, rising."""
    return sorted((rate for rate in study.rates if rate.method == method), key=lambda rate: rate.lr)


def chosen(study: Study, method: str) -> float | None:
    """The rate that the method's stages were trained at, or those of a method that takes its rate; None before the first."""
    return next((stage.lr for stage in study.stages if method in (stage.method, owner(stage.method))), None)


def doubt(study: Study, method: str) -> str | None:
    """Why the chosen rate may not be the best; None where its neighbours on both sides are worse, or diverged."""
    grid, rate = tried(study, owner(method)), chosen(study, method)
    if grid and all(one.perplexity is None for one in grid):
        return "all diverged"
    if rate is None or rate not in [one.lr for one in grid]:
        return None
    if len(grid) == 1:
        return "the only one tried was taken"
    if rate == grid[-1].lr:
        return "on the upper edge of the grid, so that a higher one may be better"
    return "on the lower edge of the grid, so that a lower one may be better" if rate == grid[0].lr else None
