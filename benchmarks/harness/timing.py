"""Times of callables that take turns: device time on CUDA, wall time on a CPU.

Clocks, temperature and other load drift, so cases that are compared are measured in one run: every case is called once a round,
and the order is reversed from one round to the next. A ratio is taken within each round and has its own spread.

On CUDA a case is captured into a CUDA graph and its replays are timed between two events: launches by the host leave no gaps
in the figure, and what an empty graph takes is subtracted. Where capturing fails the note says why, and the calls themselves
are timed between events. Before each sample the L2 cache is swept, by writing and then reading twice its size: cold, and with
nothing left in it to be written back.
"""

import contextlib
import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np
import torch

LEAST_ROUNDS = 5  # also where they take longer than the budget: two fewer would make q20 the least
WARM_UP_CALLS = 2  # what compiles, tunes or allocates on its first call; also asked for before a capture
MOST_SWEEPS = 20
EMPTY_SAMPLES = 25

Name = TypeVar("Name", bound=Hashable)
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: run(state), where state = setup() is made again, untimed, for every sample."""

    run: Callable[[Any], object]
    setup: Callable[[], Any] | None = None

    def state(self) -> Any:
        """What run() takes; None without a setup."""
        return None if self.setup is None else self.setup()


class Columns(TypedDict):
    """The columns of a results.Row that are the figure."""

    median: float | None
    q20: float | None
    q80: float | None
    samples: int


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """Of the rounds of one run, in microseconds (a ratio: in units of its base); note: how they were taken."""

    q20: float
    median: float
    q80: float
    rounds: tuple[float, ...]
    note: str = ""

    @property
    def samples(self) -> int:
        """How many rounds."""
        return len(self.rounds)

    def columns(self) -> Columns:
        """As a results.Row has them."""
        return {"median": self.median, "q20": self.q20, "q80": self.q80, "samples": self.samples}


NO_FIGURE: Columns = {"median": None, "q20": None, "q80": None, "samples": 0}  # columns() of what did not run


def quantiles(rounds: Sequence[float], note: str = "") -> Quantiles:
    """The quantiles of a series, interpolated linearly between its sorted values.

    Raises:
        ValueError: an empty series.

    """
    if not rounds:
        raise ValueError("quantiles of no rounds: expected one value at least")
    q20, median, q80 = (float(q) for q in np.quantile(rounds, (0.2, 0.5, 0.8)))
    return Quantiles(q20, median, q80, tuple(rounds), note)


def ratio(of: Quantiles, base: Quantiles) -> Quantiles:
    """``of / base``, round by round, so that what slows both down in a round is not in the spread.

    Raises:
        ValueError: figures of different runs, by their number of rounds.

    """
    if of.samples != base.samples:
        raise ValueError(f"a ratio needs two figures of one run, got {of.samples} and {base.samples} rounds")
    note = of.note if of.note == base.note else f"{of.note}; the base: {base.note}"
    return quantiles([a / b for a, b in zip(of.rounds, base.rounds, strict=True)], note)


def measure(
    f: Callable[[], object] | Case,
    device: torch.device,
    *,
    budget_s: float = 1.0,
    graph: bool = True,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Quantiles:
    """The time of one callable, in microseconds; see measure_together()."""
    return measure_together({"": f}, device, budget_s=budget_s, graph=graph, clock=clock)[""]


def measure_together(
    cases: Mapping[Name, Callable[[], object] | Case],
    device: torch.device,
    *,
    budget_s: float = 1.0,
    graph: bool = True,
    wall: bool = False,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[Name, Quantiles]:
    """The times of several callables in microseconds, from one run in which they take turns.

    Args:
        cases: what is timed, by name. What a call returns is dropped, after its clock has stopped.
        device: where it runs: its type decides the method.
        budget_s: seconds for all cases together, compiling and capturing not counted; LEAST_ROUNDS are always made. A tenth
            more is spent before, on rounds that are not kept.
        graph: on CUDA, time the replays of a CUDA graph where one can be captured.
        wall: on CUDA, time by the host's clock, from an idle device to an idle device: launches by the host are in it.
        clock: nanoseconds; what ends the budget, and what a CPU's samples are read from.

    """
    if not cases:
        return {}
    on_device = device.type == "cuda" and not wall
    watch: _Watch = _DeviceWatch(device, graph) if on_device else _HostWatch(clock, device)
    ready = {name: watch.ready(f if isinstance(f, Case) else Case(_ignoring_state(f))) for name, f in cases.items()}
    _take_turns(watch, ready, clock, budget_s / 10, 1)
    rounds = _take_turns(watch, ready, clock, budget_s, LEAST_ROUNDS)
    return {name: quantiles(rounds[name], ready[name].note) for name in cases}


def shared_out(
    items: Sequence[Item], budget_s: float, clock: Callable[[], int] = time.perf_counter_ns
) -> Iterator[tuple[Item, Callable[[], float]]]:
    """Each item with a function that tells what is left, in seconds, of its share: an equal one of what those before left.

    What an item's compiling and its gate take is so taken from its own measuring.
    """
    end = clock() + budget_s * 1e9
    for index, item in enumerate(items):
        until = clock() + (end - clock()) / (len(items) - index)
        yield item, functools.partial(_left, until, clock)


def _left(until: float, clock: Callable[[], int]) -> float:
    return max(0.0, (until - clock()) / 1e9)


def first_line(reason: BaseException) -> str:
    """An exception as a note: its type and the first line of what it says."""
    return f"{type(reason).__name__}: {(str(reason) or 'no message').splitlines()[0]}"


def without(us: float, overhead_us: float) -> float:
    """A sample less what an empty one takes; at most half of it, so that noise makes no figure 0 or negative."""
    return us - min(overhead_us, us / 2)


def cold_l2(device: torch.device) -> Callable[[], None]:
    """A function that leaves nothing of use in the L2 cache of a CUDA device; one that does nothing for a CPU."""
    if device.type != "cuda":
        return lambda: None
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(size // 4, dtype=torch.float32, device=device)

    def sweep() -> None:
        buffer.zero_()
        buffer.sum()  # written lines alone would go back to memory on the time of the next kernel

    return sweep


@dataclasses.dataclass(frozen=True)
class _Ready:
    case: Case
    note: str = ""
    sweeps: int = 1
    less_us: float = 0.0


class _Watch(Protocol):
    def ready(self, case: Case) -> _Ready:
        """Warm a case up."""

    def sample(self, ready: _Ready) -> Callable[[], float]:
        """Call it once; what comes back gives the microseconds after settle()."""

    def settle(self) -> None:
        """Wait until every sample can be read."""


class _HostWatch:
    """Wall time; of a GPU's work until it is done."""

    def __init__(self, clock: Callable[[], int], device: torch.device) -> None:
        self.clock, self.device = clock, device

    def ready(self, case: Case) -> _Ready:
        for _ in range(WARM_UP_CALLS):
            case.run(case.state())
        return _Ready(case, "wall time" if self.device.type == "cuda" else "")

    def sample(self, ready: _Ready) -> Callable[[], float]:
        state = ready.case.state()
        self.settle()
        start = self.clock()
        result = ready.case.run(state)
        self.settle()
        elapsed = self.clock() - start
        del result
        return lambda: elapsed / 1e3

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _DeviceWatch:
    """Time between two events on a stream of its own: a graph cannot be captured on the default stream.

    All graphs share one memory pool, so a run needs the memory of its largest case. That lets one graph write over what
    another has left; a replay only reads tensors from outside the graphs and what its own case's setup has just written.
    """

    def __init__(self, device: torch.device, graph: bool) -> None:
        self.device, self.graph = device, graph
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            self.sweep = cold_l2(device)
            self.sweep()
            self.sweep_us = self._between_events(self.sweep)
            self.empty_us = self._empty_graph() if graph else 0.0
            self.graph_note = "CUDA graph" if self.empty_us else "CUDA graph, its start included"

    def ready(self, case: Case) -> _Ready:
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP_CALLS):
                state = case.state()
                torch.cuda.synchronize(self.device)
                start = time.perf_counter()
                case.run(state)
                host_us = 1e6 * (time.perf_counter() - start)
                del state
            torch.cuda.synchronize(self.device)
            # swept as often as it takes the host to queue the call, the device finds all of it waiting
            sweeps = min(MOST_SWEEPS, max(1, math.ceil(host_us / self.sweep_us)))
            if not self.graph:
                return _Ready(case, "CUDA events", sweeps)
            try:
                return _Ready(self._captured(case), self.graph_note, less_us=self.empty_us)
            except Exception as reason:  # a capture fails in as many ways as there are libraries
                self._abandon_capture()
                # torch raises once more where it ends a broken capture: the first error is the one to read
                said = first_line(reason.__context__ or reason)
                return _Ready(case, f"CUDA events: a graph could not be captured: {said}", sweeps)

    def _captured(self, case: Case) -> Case:
        setup, run = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        state = None
        if case.setup is not None:
            with torch.cuda.graph(setup, pool=self.pool, stream=self.stream):
                state = case.setup()
        with torch.cuda.graph(run, pool=self.pool, stream=self.stream):
            case.run(state)
        return Case(lambda _: run.replay(), None if case.setup is None else setup.replay)

    def _abandon_capture(self) -> None:
        """Tell the allocator that a broken capture is over, and leave its pool.

        torch before 2.12 does not (pytorch/pytorch#180395), and then refuses every torch.cuda.empty_cache() that follows.
        """
        torch.cuda.synchronize(self.device)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        with contextlib.suppress(RuntimeError):  # "not currently recording", where torch has done both
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        self.pool = torch.cuda.graph_pool_handle()

    def sample(self, ready: _Ready) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            state = ready.case.state()
            for _ in range(ready.sweeps):
                self.sweep()
            start.record()
            ready.case.run(state)
            end.record()
        return lambda: without(1e3 * start.elapsed_time(end), ready.less_us)

    def _empty_graph(self) -> float:
        """What a replay costs beside its kernels: two events and a graph's start, some 5 us, much where a kernel takes 10.

        It is subtracted rather than spread over repetitions: within one graph all but the first would find L2 warm.
        """
        empty = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is empty
                # in a pool of its own: one that its last graph has left cannot be captured into again
                with torch.cuda.graph(empty, stream=self.stream):
                    pass
            samples = []
            for _ in range(EMPTY_SAMPLES):
                self.sweep()
                samples.append(self._between_events(empty.replay))
            return quantiles(samples).median
        except RuntimeError:  # a driver that takes no empty graph must not cost every figure: the notes say so
            return 0.0

    def settle(self) -> None:
        torch.cuda.synchronize(self.device)

    def _between_events(self, f: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end))


def _take_turns(
    watch: _Watch, ready: Mapping[Name, _Ready], clock: Callable[[], int], seconds: float, least: int
) -> dict[Name, list[float]]:
    """One sample of every case a round, for so many seconds and rounds at least."""
    rounds: dict[Name, list[float]] = {name: [] for name in ready}
    order = list(ready)
    end = clock() + seconds * 1e9
    made = 0
    while made < least or clock() < end:
        samples = {name: watch.sample(ready[name]) for name in order}
        watch.settle()
        for name, read in samples.items():
            rounds[name].append(read())
        order.reverse()
        made += 1
    return rounds


def _ignoring_state(f: Callable[[], object]) -> Callable[[Any], object]:
    return lambda _: f()
