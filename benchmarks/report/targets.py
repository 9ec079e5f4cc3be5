"""The targets of the kernels on a GPU, and the verdict of a results file: every line is judged by its worst shape.

Times are forward and backward in bf16 over the frozen linear's: medians, of the better of the backends at each shape. A line
without a figure is "not measured", and not met.
"""

import dataclasses
from collections.abc import Callable, Sequence

from benchmarks.harness.results import Row, ours
from benchmarks.suites import blocks, ops, steps, variants
from gain_ops.planning.methods import LORA

BOTH = "forward+backward"
SQUARE = ("Llama-3-8B o_proj", 8192)  # 4096 x 4096
PEERS = {
    "PEFT (IA)^3": ("PEFT (IA)^3, output side", blocks.IA3),
    blocks.LORA: (blocks.LORA, blocks.LORA),  # a layer and a block alike
    "torch.compile of F.linear(x, W) * s": ("torch.compile of F.linear(x, W) * s", blocks.COMPILED),
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure at one shape, and how far its quantiles reach."""

    value: float
    low: float
    high: float
    where: str


@dataclasses.dataclass(frozen=True)
class Target:
    """A line of the table: find(rows of one device) returns its figure at every measured shape."""

    name: str
    must: float
    goal: float
    find: Callable[[Sequence[Row]], list[Figure]]
    more: bool = False  # is better
    strict: bool = False  # the bar itself is not enough

    def worst(self, rows: Sequence[Row]) -> tuple[Figure | None, int]:
        """The worst figure, and the number of figures."""
        found = self.find(rows)
        pick = min if self.more else max
        return (pick(found, key=lambda figure: figure.value) if found else None), len(found)

    def verdict(self, figure: Figure | None) -> str:
        """``goal``, ``met``, ``missed`` or ``not measured``."""
        if figure is None:
            return "not measured"
        return "goal" if self._reaches(figure, self.goal) else "met" if self._reaches(figure, self.must) else "missed"

    def bar(self, value: float) -> str:
        """A bar with its relation: ``<= 1.06``."""
        return f"{'>' if self.more else '<'}{'' if self.strict else '='} {value:.2f}"

    def _reaches(self, figure: Figure, bar: float) -> bool:
        ahead = figure.value - bar if self.more else bar - figure.value
        return ahead > 0 or (ahead == 0 and not self.strict)


def _median(row: Row) -> float:
    assert row.median is not None
    return row.median


def _figure(row: Row, who: str = "") -> Figure:
    median = _median(row)
    low, high = (median if q is None else q for q in (row.q20, row.q80))
    return Figure(median, low, high, f"{row.site}, T={row.tokens}, {who or row.backend}")


def _op(contestant: str, metric: str, tokens: int, features: int = 0) -> Callable[[Sequence[Row]], list[Figure]]:
    """An op's figures from these tokens and in_features on."""
    return lambda rows: [
        _figure(row)
        for row in ours(rows, "op", contestant, metric).values()
        if row.tokens >= tokens and row.in_features >= features
    ]


def _square(rows: Sequence[Row]) -> list[Figure]:
    row = ours(rows, "layer", variants.SHIPPED, f"{BOTH} / frozen").get(SQUARE)
    return [] if row is None else [_figure(row)]


def _block(place: blocks.Place, metric: str) -> Callable[[Sequence[Row]], list[Figure]]:
    def find(rows: Sequence[Row]) -> list[Figure]:
        row = ours(rows, "block", blocks.GAIN, f"{metric} / frozen").get((place.site, blocks.TOKENS))
        return [] if row is None else [_figure(row)]

    return find


def _times_as_fast(peer: str) -> Callable[[Sequence[Row]], list[Figure]]:
    """The peer's time over that of gain_ops, for every layer and every block: both are over the same frozen one's."""
    of_layer, of_block = PEERS[peer]
    pairs = (("layer", variants.SHIPPED, of_layer, BOTH), ("block", blocks.GAIN, of_block, blocks.LINEARS))

    def find(rows: Sequence[Row]) -> list[Figure]:
        found = []
        for group, own_name, theirs, metric in pairs:
            mine = ours(rows, group, own_name, f"{metric} / frozen")
            for row in rows:
                named = (row.group, row.contestant, row.metric) == (group, theirs, f"{metric} / frozen")
                own = mine.get((row.site, row.tokens))
                if named and own is not None and row.median is not None and row.dtype == "bfloat16":
                    a, b = _figure(row), _figure(own)
                    found.append(Figure(a.value / b.value, a.low / b.high, a.high / b.low, b.where))
        return found

    return find


def _lean_peaks(rows: Sequence[Row]) -> list[Figure]:
    """The peak of lean gains over LoRA's on the same layers, with adapters in either dtype, for every step."""
    peaks = {(row.site, row.contestant): row for row in rows if row.group == "step" and row.metric == "peak"}
    found = []
    for (site, name), row in peaks.items():
        own = peaks.get((site, steps.LEAN))
        if name in steps.LORA_PEERS and own is not None and own.median is not None and row.median is not None:
            ratio = own.median / row.median
            found.append(Figure(ratio, ratio, ratio, f"{site}, T={row.tokens}, {name}"))
    return found


_WIDE = "in >= 4096, T >= 2048"
TARGETS = (
    Target(f"forward / GEMM, {_WIDE}", 1.06, 1.00, _op("linear", ops.OVER_PRODUCT, 2048, 4096)),
    Target(f"the same, z stored, {_WIDE}", 1.06, 1.00, _op("linear_z", ops.OVER_PRODUCT, 2048, 4096)),
    Target(
        "one-pass backward, share of the copy's bandwidth, T >= 8192",
        0.85,
        0.95,
        _op("backward", "achieved share of the floor", 8192),
        more=True,
    ),
    Target("recompute / GEMM, T >= 2048", 1.12, 1.03, _op("backward_recompute", ops.OVER_PRODUCT, 2048)),
    Target("input-side backward / GEMM, T >= 2048", 1.12, 1.03, _op("backward_input", ops.OVER_PRODUCT, 2048)),
    Target("4096 x 4096, T = 8192", 1.12, 1.05, _square),
    *(
        Target(f"{place.site}, {what}", *place.bars, _block(place, metric))
        for place in blocks.PLACES
        for what, metric in (("its linears", blocks.LINEARS), ("whole", BOTH))
    ),
    *(
        Target(f"times as fast as {peer}, every shape", 1.0, goal, _times_as_fast(peer), more=True, strict=True)
        for peer, goal in zip(PEERS, (1.5, 1.5, 1.1), strict=True)
    ),
    Target(f"peak of a step, lean / {LORA}, every shape", 1.0, 1.0, _lean_peaks, strict=True),
)


def lines(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells, for the rows of one device; none if nothing was measured."""
    found = [(target, *target.worst(rows)) for target in TARGETS]
    if all(figure is None for _, figure, _ in found):
        return []
    return [
        [
            target.name,
            target.bar(target.must),
            target.bar(target.goal),
            *_cells(figure, count),
            target.verdict(figure),
        ]
        for target, figure, count in found
    ]


HEADS = ("target", "must", "goal", "worst", "where", "shapes", "verdict")


def _cells(figure: Figure | None, count: int) -> list[str]:
    if figure is None:
        return ["-", "-", "0"]
    spread = f" ({figure.low:.3f}-{figure.high:.3f})" if figure.low < figure.high else ""
    return [f"{figure.value:.3f}{spread}", figure.where, str(count)]
