import itertools

import pytest
import torch

from benchmarks.harness import results, roofline, timing

CPU = torch.device("cpu")


class Clock:
    """Nanoseconds that pass only where a case says so."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def passes(self, us: float) -> None:
        self.now += round(1000 * us)


def test_quantiles_interpolate_between_sorted_values() -> None:
    found = timing.quantiles([50, 10, 40, 20, 30, 0])
    assert (found.q20, found.median, found.q80, found.samples) == (10, 25, 40, 6)
    assert timing.quantiles([7.0]).columns() == {"median": 7, "q20": 7, "q80": 7, "samples": 1}
    with pytest.raises(ValueError, match="no rounds"):
        timing.quantiles([])


def test_setup_and_warm_up_are_not_in_the_figure() -> None:
    clock = Clock()
    durations = itertools.chain([1e6] * (timing.WARM_UP_CALLS + 1), itertools.cycle([10, 30, 20]))
    case = timing.Case(lambda state: clock.passes(next(durations) + state), lambda: clock.passes(5000) or 1)
    found = timing.measure(case, CPU, budget_s=0, clock=clock)
    assert found.rounds == (11, 31, 21, 11, 31)
    assert found.median == 21


def test_the_budget_ends_the_rounds_and_the_least_are_made_anyway() -> None:
    clock = Clock()
    assert timing.measure(lambda: clock.passes(1e6), CPU, budget_s=20, clock=clock).samples == 20
    assert timing.measure(lambda: clock.passes(1e6), CPU, budget_s=1, clock=clock).samples == timing.LEAST_ROUNDS


def test_what_one_leaves_goes_to_those_after_it() -> None:
    clock, seen = Clock(), []
    for item, left in timing.shared_out("abc", 30, clock):
        seen.append((item, left()))
        clock.passes({"a": 4e6, "b": 25e6, "c": 0}[item])
        seen.append(left())
    assert seen == [("a", 10), 6, ("b", 13), 0, ("c", pytest.approx(1)), pytest.approx(1)]


def test_cases_take_turns_and_the_order_turns_round() -> None:
    clock, calls = Clock(), []
    cases = {name: lambda name=name: (calls.append(name), clock.passes(1)) for name in "abc"}
    timing.measure_together(cases, CPU, budget_s=0, clock=clock)
    rounds = "".join(calls[timing.WARM_UP_CALLS * 3 :])
    assert rounds == "abc" + "abccba" * 2 + "abc"  # the first is the warm-up round


def test_a_ratio_has_its_own_spread() -> None:
    clock, drift = Clock(), itertools.count(1)
    speed = {"now": 1.0}

    def base() -> None:
        clock.passes(100 * speed["now"])

    def other() -> None:
        clock.passes(120 * speed["now"])
        speed["now"] = next(drift)  # the machine slows down from round to round

    speeds = timing.measure_together({"base": base, "pair": lambda: (base(), other())}, CPU, budget_s=0, clock=clock)
    assert speeds["base"].q80 > 1.5 * speeds["base"].q20
    # base and pair of one round may differ in speed by one step of the drift, no more
    found = timing.ratio(speeds["pair"], speeds["base"])
    assert found.rounds == tuple(a / b for a, b in zip(speeds["pair"].rounds, speeds["base"].rounds, strict=True))
    assert found.q80 / found.q20 < speeds["base"].q80 / speeds["base"].q20


def test_drift_that_hits_a_whole_round_is_not_in_a_ratio() -> None:
    base = timing.quantiles([100, 200, 400, 800, 1600])
    other = timing.quantiles([120, 240, 480, 960, 1920], "CUDA graph")
    found = timing.ratio(other, base)
    assert (found.q20, found.median, found.q80) == (pytest.approx(1.2),) * 3
    assert "the base" in found.note
    with pytest.raises(ValueError, match="one run"):
        timing.ratio(other, timing.quantiles([1.0]))


def test_an_empty_graphs_time_is_subtracted_and_leaves_a_figure() -> None:
    assert timing.without(10.0, 4.0) == 6.0
    assert timing.without(5.0, 4.0) == 2.5
    assert timing.without(5.0, 0.0) == 5.0


def test_wall_time_of_a_gpu_is_taken_from_idle_to_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.passes(queued.pop() if queued else 0))
    queued: list[float] = []

    def run(state: None) -> None:
        clock.passes(2)
        queued.append(40)

    case = timing.Case(run, lambda: queued.append(1000))  # what a setup queues is not in the figure
    found = timing.measure_together({"": case}, torch.device("cuda"), budget_s=0, wall=True, clock=clock)[""]
    assert (found.median, found.note) == (42, "wall time")


def test_real_time_on_a_cpu() -> None:
    x = torch.randn(64, 64)
    found = timing.measure_together(
        {"one": lambda: x @ x, "eight": lambda: [x @ x for _ in range(8)]}, CPU, budget_s=0.05
    )
    assert timing.ratio(found["eight"], found["one"]).median > 2
    assert timing.measure_together({}, CPU) == {}


def test_floor_by_hand() -> None:
    # 8192 tokens, 4096 x 4096, bf16: 2.7488e11 flops and 167.8 MB a GEMM, 347.95 us at 790e12 flop/s
    sizes = (8192, 4096, 4096, 2)
    h100 = roofline.ASSUMED_H100
    assert roofline.floor_us(roofline.frozen_forward(*sizes), torch.bfloat16, h100) == pytest.approx(347.95, abs=0.01)
    # 3 passes of 67.1 MB and 64 rows of partials, written and read: (201.327 + 1.049 + 1.049) MB at 3.0e12 B/s
    one_pass = roofline.floor_us(roofline.one_pass_backward(8192, 4096, 2), torch.bfloat16, h100)
    assert one_pass == pytest.approx((201.326592 + 2 * 1.048576) / 3.0, rel=1e-9)
    # NOTES.md: three passes are 9.6% of the frozen layer's two GEMMs
    ours, frozen = roofline.gained_layer("output", "output", *sizes), roofline.frozen_layer(*sizes)
    both = "forward+backward"
    ratio = roofline.floor_us(ours[both], torch.bfloat16, h100) / roofline.floor_us(frozen[both], torch.bfloat16, h100)
    assert ratio == pytest.approx(1.097, abs=0.001)
    # few tokens: the GEMM is bound by W's bytes
    (small,) = roofline.frozen_forward(8, 4096, 4096, 2)
    assert roofline.floor_us((small,), torch.bfloat16, h100) == pytest.approx(small.bytes / 3.0e6)
    assert roofline.floor_us((small,), torch.float64, h100) is None
    assert roofline.floor_us((small,), torch.bfloat16, None) is None


def test_measured_ceilings() -> None:
    def row(metric: str, dtype: str, value: float) -> results.Row:
        return results.Row("ceiling", metric, "-", "-", metric, "", dtype, 0, 0, 0, value, value, value, 5)

    rows = [row("copy", "float32", 2e12), row("matmul", "float32", 4e13), row("matmul", "bfloat16", 6e14)]
    found = roofline.measured(rows)
    assert found == roofline.Ceilings({torch.float32: 4e13, torch.bfloat16: 6e14}, 2e12)
    assert roofline.measured(rows[1:]) is None
    assert roofline.assumed(CPU) is None
    assert "assumption" in roofline.assumed(torch.device("cuda")).caveat


@pytest.mark.parametrize(
    ("side", "save", "gemms"), [("output", "output", 2), ("output", "input", 3), ("input", "auto", 2)]
)
def test_flops_of_a_layer(side: str, save: str, gemms: int) -> None:
    kernels = roofline.gained_layer(side, save, 512, 1280, 5120, 2)["forward+backward"]
    assert sum(k.flops for k in kernels if k.products) == gemms * 2 * 512 * 1280 * 5120


@pytest.mark.gpu
def test_an_empty_graph_takes_some_microseconds() -> None:
    assert 0 < timing._DeviceWatch(torch.device("cuda"), graph=True).empty_us < 100


@pytest.mark.gpu
def test_a_graph_replays_what_it_captured_and_says_where_it_cannot() -> None:
    device = torch.device("cuda")
    x = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()
    cases = {
        "one": lambda: x @ x,
        "four": lambda: [x @ x for _ in range(4)],
        "backward": timing.Case(lambda y: torch.autograd.grad(y, leaf, x), lambda: leaf @ x),
        "waits": lambda: (x @ x).sum().item(),
        "after": lambda: x @ x,
    }
    found = timing.measure_together(cases, device, budget_s=0.2)
    for name in ("one", "four", "backward", "after"):
        assert found[name].note == "CUDA graph", name
    assert "could not be captured" in found["waits"].note
    torch.cuda.empty_cache()  # which torch refuses as long as it takes the broken capture for a running one
    assert 2 < timing.ratio(found["four"], found["one"]).median < 6
    assert 0.5 < timing.ratio(found["backward"], found["one"]).median < 2
    assert timing.measure(lambda: x @ x, device, budget_s=0.1, graph=False).note == "CUDA events"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
