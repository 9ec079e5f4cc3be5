"""The parts of a run on a GPU, in order: python -m benchmarks.gpu.parts NAME OUT SECONDS runs one, for gpu.py.

The proof comes first, then the constants of the predictions, then the figures of the targets, then the rest. Every row is
flushed to OUT/results.csv at once. benchmarks/NOTES.md predicts what each part takes.
"""

import dataclasses
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.contestants import sites
from benchmarks.contestants.contestants import FROZEN
from benchmarks.contestants.sites import ARCHITECTURES, Site
from benchmarks.gpu import cublaslt, proof, warm
from benchmarks.harness import results, roofline
from benchmarks.harness.results import Row
from benchmarks.suites import blocks, ceilings, layers, memory, ops, steps, variants
from gain_ops.backends import extension, tables
from gain_ops.backends.interface import GEMMS

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
LLAMA, GPT2 = ARCHITECTURES["Llama-3-8B"], ARCHITECTURES["GPT-2 Large"]
# the targets' sites come first, in case the time runs out
ORDERED = [LLAMA.o_proj, LLAMA.down_proj, GPT2.o_proj, GPT2.down_proj]
ORDERED += [site for site in sites.SITES if site not in ORDERED]
VARIED = ORDERED[:4]
TUNED = [*ORDERED, LLAMA.up_proj, GPT2.up_proj]

Measure = Callable[[float, list[Row], Path], Iterator[Row]]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part, and its share of the time left when it starts; run(seconds, rows so far, the folder of the results)."""

    name: str
    share: float
    run: Measure


def environment(budget_s: float, before: list[Row], out: Path) -> Iterator[Row]:
    """Facts that a row has no column for."""
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    found = {
        "python": platform.python_version(),
        "cuda of torch": str(torch.version.cuda),
        "driver, power limit, largest clock": _output(query) if shutil.which("nvidia-smi") else "nvidia-smi not found",
        "cuda kernels": extension.obstacle() or f"built for {extension.architectures()}",
    }
    for name, value in found.items():
        yield _note("environment", name, None, value)


def _proof(*steps: str) -> Measure:
    """The steps that are not green yet, and any step that was red."""

    def run(budget_s: float, before: list[Row], out: Path) -> Iterator[Row]:
        said = {row.site: row.median for row in before if row.group == "proof"}
        wanted = [s for s in proof.STEPS if said.get(s) == 0.0 or (s in steps and said.get(s) != 1.0)]
        for outcome in proof.steps(budget_s, wanted) if wanted else ():
            value = None if outcome.green is None else float(outcome.green)
            yield _note("proof", outcome.step, value, " | ".join((outcome.summary, *outcome.details)))

    return run


def pointer_modes(budget_s: float, before: list[Row], out: Path) -> Iterator[Row]:
    """The scalings that cuBLASLt offers."""
    for line in cublaslt.lines():
        yield _note("cublaslt", "pointer modes", None, line)


def tune(budget_s: float, before: list[Row], out: Path) -> Iterator[Row]:
    """Tuning of the GEMMs at 8192 tokens: the table OUT/tuned.json is the result."""
    from gain_ops.kernels import tuning

    for site in TUNED:
        if any(row.group == "tuning" and row.site == site.name for row in before):
            continue
        given = tuning.problem(8192, site.out_features, site.in_features, DTYPE, DEVICE)
        found = {op: tables.fastest([*tuning.tune(op, given, out / "tuned.json")]) for op in GEMMS}
        yield _note("tuning", site.name, None, " | ".join(f"{op}: {rows[0]}" for op, rows in found.items() if rows))


def _ops(tokens: int) -> Measure:
    def run(budget_s: float, before: list[Row], out: Path) -> Iterator[Row]:
        todo = _not_yet(before, "op", "scale", "time", tokens)
        yield from ops.rows(todo, [tokens], DTYPE, DEVICE, budget_s, ceilings=roofline.measured(before))

    return run


def _layers(tokens: int) -> Measure:
    def run(budget_s: float, before: list[Row], out: Path) -> Iterator[Row]:
        todo = _not_yet(before, "layer", FROZEN, layers.METRICS[-1], tokens)
        yield from layers.rows(todo, tokens, DTYPE, DEVICE, budget_s, ceilings=roofline.measured(before))

    return run


def _variants(tokens: int) -> Measure:
    return lambda budget_s, before, out: variants.rows(VARIED, tokens, DTYPE, DEVICE, budget_s)


def _products(budget_s: float, before: list[Row], out: Path) -> Iterator[Row]:
    limits = roofline.measured(before)
    yield from ops.rows(sites.SHAPES, sites.TOKENS, DTYPE, DEVICE, budget_s, ceilings=limits, names=())


def _block(place: blocks.Place) -> Measure:
    return lambda budget_s, before, out: blocks.rows([place], blocks.TOKENS, DTYPE, DEVICE, budget_s)


def _wall(budget_s: float, before: list[Row], out: Path) -> Iterator[Row]:
    """Of a block of each architecture, with gains on every linear: what the host's launches cost."""
    places = [place for place in reversed(blocks.PLACES) if place.everywhere]
    methods = blocks.TIMED_BY_WALL
    yield from blocks.rows(places, blocks.WALL_TOKENS, DTYPE, DEVICE, budget_s, methods=methods, wall=True)


def _not_yet(before: Sequence[Row], *key: object) -> list[Site]:
    """The sites without this figure; key: the group, contestant, metric and tokens of a figure that every site gets."""
    seen = {r.site for r in before if (r.group, r.contestant, r.metric, r.tokens) == key and r.median is not None}
    return [site for site in ORDERED if site.name not in seen]


BLOCKS = tuple(Part(place.site, 0.15, _block(place)) for place in blocks.PLACES)
PARTS = (
    Part("environment", 0.02, environment),
    # memcheck alone beside the tests: all four tools and a worker a core take longer than one after the other
    Part("proof", 0.35, _proof(proof.PARITY, "memcheck")),
    Part("ceilings", 0.03, lambda budget_s, before, out: ceilings.rows(DEVICE, budget_s)),
    Part("wall time of blocks", 0.05, _wall),
    Part("variants 8192", 0.15, _variants(8192)),
    Part("ops 8192", 0.2, _ops(8192)),
    BLOCKS[0],
    Part("cublaslt", 0.03, pointer_modes),
    Part("products", 0.1, _products),
    *BLOCKS[1:],
    Part("layers 8192", 0.5, _layers(8192)),
    Part("peaks of steps", 0.4, lambda budget_s, before, out: steps.peak_rows(DEVICE)),
    Part("layers 2048", 0.5, _layers(2048)),
    Part("ops 2048", 0.5, _ops(2048)),
    Part("tuning", 0.4, tune),
    Part("variants 2048", 0.2, _variants(2048)),
    Part("the rest of the proof", 0.4, _proof(*proof.STEPS)),
    Part("layers 512", 0.3, _layers(512)),
    Part("layers 32768", 0.4, _layers(32768)),
    Part("peaks of layers", 0.3, lambda budget_s, before, out: memory.peak_rows(sites.SITES, 8192, DTYPE, DEVICE)),
    Part("steps", 1.0, lambda budget_s, before, out: steps.rows(DEVICE, budget_s)),
)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _note(group: str, name: str, value: float | None, note: str) -> Row:
    about = results.environment(DEVICE)
    return Row(group, name, "-", "-", "green", "", "", 0, 0, 0, value, value, value, 1, note=note, **about)


def main(name: str, out: Path, seconds: float) -> None:
    """Run one part and flush its rows."""
    file = out / "results.csv"
    (part,) = (part for part in PARTS if part.name == name)
    before = results.read([file]) if file.exists() else []
    found = warm.Counter()
    for row in part.run(seconds, before, out):
        results.append(file, [row])
    if found.warm + found.compiled:
        results.append(file, [_note("triton", part.name, float(found.warm), str(found))])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
