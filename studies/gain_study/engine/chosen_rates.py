"""The learning rates that were tried and chosen, and whether the choice may have missed a better one."""

from __future__ import annotations

from collections.abc import Mapping

from gain_study.engine.methods import METHODS
from gain_study.engine.records import Rate, Study

__all__ = ["MARGIN", "choose", "chosen", "doubt", "owner", "tried"]

MARGIN = 0.005
"""The share by which a lower learning rate's perplexity may be above the best one and still be chosen."""


def choose(perplexities: Mapping[float, float]) -> float:
    """The lowest learning rate whose perplexity is at most MARGIN above the best one, given perplexities by rate.

    One domain and one seed do not tell such rates apart, and the higher one may be close to diverging on another domain.
    """
    bound = (1 + MARGIN) * min(perplexities.values())
    return min(rate for rate, perplexity in perplexities.items() if perplexity <= bound)


def owner(method: str) -> str:
    """The method whose grid was tried: another method where this one uses the other's rate."""
    known = METHODS.get(method)
    return known.rates_of or method if known else method


def tried(study: Study, method: str) -> list[Rate]:
    """The rates of the method's own grid, ascending."""
    return sorted((rate for rate in study.rates if rate.method == method), key=lambda rate: rate.lr)


def chosen(study: Study, method: str) -> float | None:
    """The rate of the method's stages, or of the method that it shares a rate with; None before the first stage."""
    return next((stage.lr for stage in study.stages if method in (stage.method, owner(stage.method))), None)


def doubt(study: Study, method: str) -> str | None:
    """Why the chosen rate may not be the best; None where its neighbours on both sides are worse or diverged."""
    grid, rate = tried(study, owner(method)), chosen(study, method)
    if grid and all(one.perplexity is None for one in grid):
        return "all diverged"
    if rate is None or rate not in [one.lr for one in grid]:
        return None
    if len(grid) == 1:
        return "only one rate was tried"
    if rate == grid[-1].lr:
        return "on the upper edge of the grid: a higher rate may be better"
    return "on the lower edge of the grid: a lower rate may be better" if rate == grid[0].lr else None
