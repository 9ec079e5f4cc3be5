"""The predicted time of every way of a gained layer, counted before it runs.

``python -m benchmarks.report.predict`` prints NOTES.md's table.

    GEMM    =  max(flops / (rate * share of the last wave that is used), bytes / bandwidth)
    a pass  =  bytes / (bandwidth * one_pass) + launches

The constants are assumptions until a GPU has run; measured() takes each from the rows of a results file that has it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from benchmarks.contestants import sites
from benchmarks.harness.results import Row, ours
from benchmarks.suites import ops, variants
from gain_ops.backends import prediction
from gain_ops.backends.prediction import E, gemm_us, used

KEEPS_X, INPUT_SIDE = "gain, output side, keeps x", "gain, input side"


@dataclasses.dataclass(frozen=True)
class Machine:
    """The constants. Without a unit they are shares, of the rate of the vendor's GEMM of the same size unless noted."""

    flops: float = prediction.FLOPS
    bytes: float = prediction.BYTES
    launch: float = prediction.LAUNCH
    linear: float = 0.98  # own GEMM with the gain in its epilogue
    reduction: float = 0.93  # own GEMM that reads C and makes column sums: recompute, input side
    registers: float = 0.82  # own dx GEMM that scales dy in registers and sums ddelta
    summing: float = 0.95  # own dx GEMM on W' that sums ddelta
    one_pass: float = prediction.PASS
    exposed: float = 0.25  # of the bytes of a stored z, not hidden under the main loop


ASSUMED = Machine()


def measured(rows: Iterable[Row]) -> dict[str, float]:
    """The constants that these rows of one device give, by name, in 16 bits and, where it matters, at 8192 tokens."""
    kept = list(rows)
    ceiling = {(row.metric, row.dtype): row.median for row in kept if row.group == "ceiling"}
    found: dict[str, float | None] = {
        "flops": ceiling.get(("matmul", "bfloat16")),
        "bytes": ceiling.get(("copy", "float32")),
        "launch": ceiling.get(("launch", "float32")),
        "linear": _inverse(_typical(kept, "op", ("linear",), ops.OVER_PRODUCT, least=4096)),
        "reduction": _inverse(_typical(kept, "op", ("backward_recompute", "backward_input"), ops.OVER_PRODUCT)),
        "registers": _inverse(_typical(kept, "variant", (variants.IN_REGISTERS,), ops.OVER_PRODUCT)),
        "summing": _inverse(_typical(kept, "variant", (variants.KEPT,), ops.OVER_PRODUCT)),
        "one_pass": _typical(kept, "op", ("backward",), "achieved share of the floor"),
        "exposed": _exposed(kept, ceiling.get(("copy", "float32"))),
    }
    return {name: value for name, value in found.items() if value is not None}


def layer_us(name: str, t: int, i: int, o: int, machine: Machine = ASSUMED) -> float:
    """Forward and backward of a layer [o, i] at t tokens by one of WAYS, in us."""
    return WAYS[name](_Count(t, i, o, machine))


def frozen_us(t: int, i: int, o: int, machine: Machine = ASSUMED) -> float:
    """The frozen linear's two GEMMs."""
    count = _Count(t, i, o, machine)
    return count.there + count.back


class _Count:
    """The pieces of the ways, in us."""

    def __init__(self, t: int, i: int, o: int, machine: Machine) -> None:
        self.machine = machine
        self.activation, self.result, self.weight = E * t * i, E * t * o, E * i * o
        self.there, self.back = self._gemm(t, o, i), self._gemm(t, i, o)
        self.idle = (1 - used(t, i)) * self.back
        self.stores_z = 1e6 * machine.exposed * self.result / machine.bytes
        self.forward = self.there / machine.linear
        self.scales_w = self.passes(2 * self.weight, 1)

    def _gemm(self, m: int, n: int, k: int) -> float:
        return gemm_us(m, n, k, flops=self.machine.flops, bandwidth=self.machine.bytes)

    def passes(self, moved: float, kernels: int) -> float:
        return 1e6 * moved / (self.machine.bytes * self.machine.one_pass) + kernels * self.machine.launch


WAYS: dict[str, Callable[[_Count], float]] = {
    variants.SHIPPED: lambda c: c.forward + c.stores_z + c.passes(3 * c.result, 2) + c.back,
    KEEPS_X: lambda c: c.forward + c.there / c.machine.reduction + c.machine.launch + c.back,
    INPUT_SIDE: lambda c: (
        c.passes(2 * min(c.activation, c.weight), 1) + c.there + c.back / c.machine.reduction + c.machine.launch
    ),
    variants.IN_REGISTERS: lambda c: c.forward + c.stores_z + c.back / c.machine.registers + c.machine.launch,
    variants.MADE: lambda c: c.forward + c.stores_z + c.scales_w + c.back / c.machine.summing + c.machine.launch,
    variants.KEPT: lambda c: c.forward + c.stores_z + c.back / c.machine.summing + c.machine.launch,
    variants.AFTER: lambda c: c.forward + c.stores_z + c.back + c.passes(2 * c.result, 2),
    variants.BESIDE: lambda c: c.forward + c.stores_z + c.back + max(0.0, c.passes(2 * c.result, 2) - c.idle),
}


def _typical(
    rows: Sequence[Row], group: str, contestants: Sequence[str], metric: str, *, least: int = 0
) -> float | None:
    """The median over contestants and over sites of at least ``least`` in_features, at 8192 tokens."""
    found = [
        row.median
        for contestant in contestants
        for (_, tokens), row in ours(rows, group, contestant, metric).items()
        if tokens == 8192 and row.in_features >= least and row.median is not None
    ]
    return median(found) if found else None


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value


def _exposed(rows: Sequence[Row], bandwidth: float | None) -> float | None:
    """The time that storing z adds to the forward, over the time of its bytes at the copy's bandwidth."""
    plain, stored = (ours(rows, "op", name, "time") for name in ("linear", "linear_z"))
    pairs = [(row, row.median, plain[key].median) for key, row in stored.items() if key in plain and row.tokens == 8192]
    found = [
        1e-6 * (us - base) * bandwidth / (E * row.tokens * row.out_features)
        for row, us, base in pairs
        if us is not None and base is not None and bandwidth is not None
    ]
    return median(found) if found else None


def main() -> None:
    """Print the prediction for every way, over the frozen linear, with the assumed constants."""
    shapes = [site for site in sites.SHAPES if "Qwen" not in site.name]
    for name in WAYS:
        print(f"\n{name}\n{'':24s}" + "".join(f"{t:>8d}" for t in sites.TOKENS))
        for site in shapes:
            sizes = (site.in_features, site.out_features)
            ratios = [layer_us(name, t, *sizes) / frozen_us(t, *sizes) for t in sites.TOKENS]
            print(f"{site.name:24s}" + "".join(f"{ratio:8.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
