"""Studies that take seconds: three small domains that differ much, and a watcher that remembers."""

from pathlib import Path
from typing import Any

from gain_ops.training.loop import Step
from gain_study.engine.running import Unit
from gain_study.engine.settings import Settings

LINES = {
    "fox": ("The quick brown fox jumps over the lazy dog.", "The dog does not mind, and sleeps.", "A fox is quick."),
    "sums": ("1 + 1 = 2", "2 + 2 = 4", "4 + 4 = 8", "8 + 8 = 16"),
    "code": ("def f(x):", "    return x + 1", "for i in range(9):", "    print(f(i))"),
}


class Watcher:
    """Remembers what it is told, and stops after some steps."""

    def __init__(self, stop_after: int = 1 << 30) -> None:
        self.phases: list[str] = []
        self.notices: list[str] = []
        self.units: list[Unit] = []
        self.steps: list[Step] = []
        self.results: list[str] = []
        self._stop_after = stop_after

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def unit(self, unit: Unit) -> None:
        self.units.append(unit)

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def result(self, text: str) -> None:
        self.results.append(text)

    def should_stop(self) -> bool:
        return len(self.steps) >= self._stop_after


def write_domains(root: Path) -> list[str]:
    """A folder of thirty texts for each domain; the folders."""
    for name, lines in LINES.items():
        (root / name).mkdir()
        for number in range(30):
            text = "\n".join(lines[(number + i * (number % 3 + 1)) % len(lines)] for i in range(40)) + f"\n{number}\n"
            (root / name / f"{number}.txt").write_text(text, encoding="utf-8")
    return [str(root / name) for name in LINES]


def small_settings(out: Path, model: Path, domains: list[str], **changes: Any) -> Settings:
    """Of a study with one seed and one order, but for ``changes``."""
    few: dict[str, Any] = {
        "seeds": (0,),
        "orders": 1,
        "steps": 3,
        "batch_tokens": 128,
        "sequence_length": 32,
        "validation_windows": 3,
        "selection_windows": 2,
        "curve_points": 1,
        "curve_windows": 1,
        "fisher_windows": 2,
        "tasks": False,
        "device": "cpu",
    }
    return Settings(out=out, model=model, domains=tuple(domains), **few | changes)
