"""The settings of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gain_ops.training.settings import check_windows
from gain_ops.utils.errors import UsageError
from gain_study.engine.methods import METHODS

__all__ = ["BUILT_IN", "TOY", "Settings"]

BUILT_IN = ("python", "licences", "readmes")
"""Domains that every machine has; any other name is a file or folder of text or data."""

TOY = Path("toy")
"""Instead of a model: a small one is trained from scratch on the domains' training text."""


@dataclass(frozen=True)
class Settings:
    """The settings of :func:`gain_study.engine.running.study`; the command line's options have the same names.

    Attributes:
        out: the folder of the results file.
        model: a transformers folder or GGUF file. None is SmolLM2-135M-Instruct. ``toy`` is a small model trained first.
        domains: names of :data:`BUILT_IN` domains, or paths of text files or folders, in the order of the first run.
        held_out: the same, for text that is measured and never learned: what the model knew before.
        methods: names in :data:`gain_study.engine.methods.METHODS`.
        seeds: each method learns each order once with each seed.
        orders: number of orders of the domains: as given, reversed, then permutations by a fixed seed.
        steps: training steps in a stage.
        batch_tokens: tokens in a step.
        sequence_length: tokens in a window.
        validation_windows: of each domain; perplexities are measured on them.
        selection_windows: of the first domain; learning rates are chosen on them.
        curve_points: how often a stage's curve is measured: at its end, its half, its quarter and so on, as most changes at
            the beginning. It is measured before the first step as well. 0 for no curve.
        curve_windows: the first so many validation windows; curves are measured on them.
        keep_adapters: one adapter is carried over from domain to domain, instead of being absorbed after each.
        tasks: whether multiple-choice accuracy is measured too.
        rates: grids of learning rates that replace the methods' own, by method.
        replay_share: share of each batch's windows that comes from earlier domains, for methods that replay.
        ewc_lambda: the strength of EWC's penalty, which is about ``lambda / 2 * sum(F) * d^2`` nats where weights move by d.
            SmolLM2-135M's sum(F) is 5e4 on licences. So at 4e2 the penalty is a nat for d = 3e-4, which is a few steps of full
            fine-tuning. The same estimate gives 3e2 for the toy model. There 1e2 to 1e3 trade forgetting for learning, and
            from 1e4 on little is learned. It is not tuned beyond that.
        fisher_windows: training windows of a domain; its Fisher information is estimated on them.
        dtype: of the weights.
        device: auto, cpu or cuda.
        trust_remote_code: whether code in the model's folder may be run.

    Raises:
        ValueError: a number is out of range, or a name is unknown or repeated.
    """

    out: Path
    model: Path | None = None
    domains: Sequence[str] = BUILT_IN
    held_out: Sequence[str] = ()
    methods: Sequence[str] = tuple(METHODS)
    seeds: Sequence[int] = (0, 1, 2)
    orders: int = 2
    steps: int = 24
    batch_tokens: int = 1024
    sequence_length: int = 256
    validation_windows: int = 12
    selection_windows: int = 8
    curve_points: int = 2
    curve_windows: int = 2
    keep_adapters: bool = False
    tasks: bool = True
    rates: Mapping[str, Sequence[float]] = field(default_factory=dict)
    replay_share: float = 0.25
    ewc_lambda: float = 1e3
    fisher_windows: int = 16
    dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_names()
        if self.replayed < 1 or self.replayed >= self.batch_size:
            replaying = [name for name in self.methods if METHODS[name].replays]
            if replaying:
                raise UsageError(
                    f"{', '.join(replaying)}: got {self.replay_share:g} of a batch of {self.batch_size} windows to replay; a "
                    "batch needs at least one replayed window and one of its own: give more batch tokens or another share"
                )
        if self.dtype != "float32" and any(METHODS[name].weights for name in self.methods):
            raise UsageError(
                f"full and ewc in {self.dtype}: their steps are smaller than the spacing of its numbers and would be lost: "
                "use float32, or leave them out (--methods)"
            )

    @property
    def batch_size(self) -> int:
        """Windows in one step."""
        return self.batch_tokens // self.sequence_length

    @property
    def curve_steps(self) -> set[int]:
        """The steps after which the curve is measured; 0 is before the first."""
        return (
            {0, *(max(1, self.steps >> halvings) for halvings in range(self.curve_points))}
            if self.curve_points
            else set()
        )

    @property
    def replayed(self) -> int:
        """Windows in one step from earlier domains, for a method that replays."""
        return round(self.replay_share * self.batch_size)

    def grid(self, method: str) -> tuple[float, ...]:
        """The learning rates that are tried for a method, ascending."""
        return tuple(sorted(self.rates.get(method, METHODS[method].rates)))

    def as_json(self) -> dict[str, Any]:
        """The settings as the results file has them: all but the folder, which may be moved, and what may run."""
        values = {name: value for name, value in asdict(self).items() if name not in ("out", "trust_remote_code")}
        return values | {
            "model": None if self.model is None else str(self.model),
            "domains": list(self.domains),
            "held_out": list(self.held_out),
            "methods": list(self.methods),
            "seeds": list(self.seeds),
            "rates": {name: sorted(grid) for name, grid in self.rates.items()},
        }

    def _check_numbers(self) -> None:
        for name in ("orders", "steps", "validation_windows", "selection_windows", "curve_windows", "fisher_windows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', ' ')} is {getattr(self, name)}: at least 1 is needed")
        if not 0 <= self.curve_points <= self.steps:
            raise UsageError(f"curve points is {self.curve_points}: 0 for none, at most one a step ({self.steps})")
        check_windows(self.batch_tokens, self.sequence_length)
        if not 0 <= self.ewc_lambda < math.inf:
            raise UsageError(f"ewc lambda is {self.ewc_lambda}: a finite strength, 0 or more, is needed")

    def _check_names(self) -> None:
        measured = [*self.domains, *self.held_out]
        for what, given in (("methods", self.methods), ("seeds", self.seeds), ("domains", measured)):
            if not given:
                raise UsageError(f"got no {what}: at least one is needed")
            if len(set(given)) < len(given):
                raise UsageError(f"{what} holds one twice: {', '.join(map(str, given))}")
        if not self.domains:
            raise UsageError("got no domains: at least one is needed")
        for name in self.methods:
            if name not in METHODS:
                raise UsageError(f"method {name!r} is unknown: choose among {', '.join(METHODS)}")
        possible = math.factorial(len(self.domains))
        if self.orders > possible:
            raise UsageError(f"orders is {self.orders}: {len(self.domains)} domains have only {possible} (--orders)")
        for name, grid in self.rates.items():
            owners = [owner for owner, method in METHODS.items() if method.rates]
            if name not in owners:
                also = f" ({name} takes those of {METHODS[name].rates_of})" if name in METHODS else ""
                raise UsageError(f"got rates for {name!r}: choose among {', '.join(owners)}{also}")
            if not grid or len(set(grid)) < len(grid) or not all(0 < rate < math.inf for rate in grid):
                raise UsageError(f"rates for {name}: got {list(grid)}; different finite rates above 0 are needed")
