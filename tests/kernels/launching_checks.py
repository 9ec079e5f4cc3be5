"""Checks of launches by plan, run by test_launching.py in a process of its own, where kernels are not interpreted.

Nothing is compiled: Triton binds and specialises, and a class that remembers its launches takes its compiler's place.
"""

import contextlib
import dataclasses
import json
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.compiler.compiler import LazyDict
from triton.runtime import JITFunction, driver

from benchmarks.harness import stand_in
from gain_ops.kernels import (
    aot,
    descriptors,
    glu,
    launching,
    linear_backward,
    linear_forward,
    partials,
    rms_norm,
    rms_norm_wide,
    rows,
)
from gain_ops.kernels.launching import Schedule

SCALE = tl.constexpr(3)


@triton.jit(do_not_specialize=["T"])
def kernel(a, b, c, T, N, stride, eps: tl.float32, UNIT: tl.constexpr, KIND: tl.constexpr):
    tl.store(a, SCALE)


@triton.jit
def without_rows(a, N, left, UNIT: tl.constexpr):
    tl.store(a, N)


HOPPER = ("cuda", 90, 32)
made: list[tuple[Any, ...]] = []


class Compiled(CompiledKernel):
    """Of Triton's class, as a plan asks, and not compiled."""

    def __init__(self, src: Any) -> None:
        self.src, self.module, self.name = src, None, "kernel"
        self.function, self.packed_metadata, self.metadata = object(), object(), None

    @property
    def run(self) -> Any:
        return lambda *given: made.append((self, *given))

    def _init_handles(self) -> None:
        pass


class Driver:
    def __init__(self, *target: Any) -> None:
        self.target, self.device, self.stream = GPUTarget(*(target or HOPPER)), 0, 0
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"multiprocessor_count": 132})

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 * device + self.stream

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def active(*given: Any) -> Iterator[Driver]:
    """A fresh driver, no plans, and nothing compiled before."""
    now = Driver(*given)
    for one in (kernel, without_rows, *KERNELS):
        one.device_caches.clear()
    with (
        mock.patch("triton.compiler.compile", lambda src, target, options: Compiled(src)),
        mock.patch.object(driver, "_active", now),
    ):
        launching.forget()
        yield now
    launching.forget()


KERNELS = {
    found
    for module in (glu, linear_backward, linear_forward, partials, rms_norm, rms_norm_wide, rows)
    for found in vars(module).values()
    if isinstance(found, JITFunction)
}


def last() -> tuple[Any, ...]:
    return made.pop()


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    """Two launches; descriptors are equal where what they describe is the same."""
    assert one[0] is other[0], "another compiled kernel"
    assert len(one) == len(other)
    for at, (left, right) in enumerate(zip(one, other, strict=True)):
        if at in (7, 8, 9):  # metadata and hooks: empty chains are left out
            continue
        if hasattr(left, "block_shape"):
            assert left.base is right.base
            assert [list(v) for v in (left.shape, left.strides, left.block_shape)] == [
                list(v) for v in (right.shape, right.strides, right.block_shape)
            ]
            assert left.padding == right.padding
        else:
            assert left is right or (type(left) is type(right) and left == right), (at, left, right)


def plainly(grid: int, tensors: Any, rows: int | None, numbers: Any, schedule: Schedule, of: Any = None) -> None:
    """As Triton's users launch."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    blocks = schedule.blocks or (None,) * len(tensors)
    arguments = [
        t if t is None or block is None else TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))
        for t, block in zip(tensors, blocks, strict=True)
    ]
    (of or kernel)[(grid,)](*arguments, *([] if rows is None else [rows]), *numbers, **schedule.constants)


BASE = {dtype: torch.zeros(4096, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
SCHEDULES = [
    Schedule({"UNIT": unit, "KIND": kind, "num_warps": warps, "enable_fp_fusion": True})
    for unit, kind, warps in ((1, "a", 4), (8, "a", 4), (8, "b", 4), (8, "b", 8))
]
DESCRIBED = [
    Schedule(SCHEDULES[0].constants, blocks) for blocks in (((16, 16), None, None), ((32, 16), None, (16, 32)))
]

pointers = st.none() | st.builds(
    lambda dtype, offset: BASE[dtype][offset:],
    st.sampled_from(sorted(BASE, key=str)),
    st.sampled_from([0, 1, 3, 8, 16]),
)
boxes = st.builds(
    lambda dtype, offset, shape: BASE[dtype][8 * offset : 8 * offset + shape[0] * shape[1]].view(shape),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 2),
    st.sampled_from([(1, 8), (8, 8), (16, 32), (3, 16)]),
)
sizes = st.sampled_from([0, 1, 2, 8, 15, 16, 17, 32, 4096, 2**31 - 1, 2**31, 2**32, 2**40, -1, -(2**31)])
first = pointers.filter(lambda t: t is not None)
by_pointer = st.tuples(st.tuples(first, pointers, pointers), st.sampled_from(SCHEDULES))
by_descriptor = st.tuples(st.tuples(boxes, pointers, boxes), st.sampled_from(DESCRIBED))
calls = st.tuples(
    by_pointer | by_descriptor,
    st.integers(1, 3),
    sizes,
    st.tuples(sizes, sizes, st.sampled_from([1e-5, 1e-6, 0.0])),
    st.integers(0, 1),  # the device
    st.sampled_from([False, False, True]),  # debug
)


def _changed(call: Any, other: Any, part: int) -> Any:
    """A call with one part of another: a tensor, the schedule or what follows; descriptors stay descriptors."""
    (tensors, schedule), *rest = call
    (others, other_schedule), *other_rest = other
    if part >= 4:
        return call[0], *(rest[: part - 4] + other_rest[part - 4 : part - 3] + rest[part - 3 :])
    if (schedule.blocks is None) != (other_schedule.blocks is None):
        return other
    if part == 3:
        return (tensors, other_schedule), *rest
    return ((*tensors[:part], others[part], *tensors[part + 1 :]), schedule), *rest


alike = st.builds(
    lambda first, others: [first, *(_changed(first, other, part) for other, part in others)],
    calls,
    st.lists(st.tuples(calls, st.integers(0, 8)), min_size=3, max_size=12),
)

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@check
def hits_and_misses_launch_what_triton_would() -> None:
    hit = 0

    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(alike, st.sampled_from([HOPPER, ("hip", "gfx942", 64)]))
    def holds(several: list[Any], target: tuple[Any, ...]) -> None:
        nonlocal hit
        with active(*target) as now:
            for round in range(2):
                for (tensors, schedule), grid, rows, numbers, device, debug in several:
                    now.device, now.stream = device, round
                    with mock.patch.object(triton.knobs.runtime, "debug", debug):
                        plans = len(launching._plans)
                        launching.launch(kernel, grid, tensors, rows, numbers, schedule)
                        hit += len(launching._plans) == plans and bool(plans)
                        mine = last()
                        plainly(grid, tensors, rows, numbers, schedule)
                        same(mine, last())
                    assert not made

    holds()
    assert hit > 150, hit


@check
def a_hit_does_not_bind_and_a_row_more_is_a_hit() -> None:
    with active():
        tensors, numbers = (BASE[torch.float32],) * 3, (16, 16, 1e-5)
        with mock.patch.object(JITFunction, "_pack_args", autospec=True, side_effect=JITFunction._pack_args) as bound:
            for rows in (1, 16, 17, 2**31 - 1):
                launching.launch(kernel, 1, tensors, rows, numbers, SCHEDULES[0])
                assert last()[13] == rows
            assert bound.call_count == 1
        assert len(launching._plans) == 1
        launching.launch(kernel, 1, tensors, 2**31, numbers, SCHEDULES[0])
        wide = last()
        plainly(1, tensors, 2**31, numbers, SCHEDULES[0])
        same(wide, last())
        assert len(launching._plans) == 1, "64-bit rows have no plan"


@check
def arguments_left_to_the_schedule_follow_in_the_kernel_s_order() -> None:
    with active():
        schedule = Schedule({"UNIT": 4, "num_warps": 4, "left": 7})
        for _ in range(2):
            launching.launch(without_rows, 2, (BASE[torch.float32],), None, (16,), schedule)
        mine = last()
        assert mine[11:] == (16, 7, 4)
        plainly(2, (BASE[torch.float32],), None, (16,), schedule, without_rows)
        same(mine, last())


@check
def hooks_are_called_with_the_launch_s_metadata() -> None:
    with active():
        given = ((BASE[torch.float32],) * 3, 4, (16, 16, 1e-5), SCHEDULES[0])
        for _ in range(2):
            launching.launch(kernel, 1, *given)
        assert last()[7:10] == (None, None, None), "chains of no hooks are left out"
        runtime, seen = triton.knobs.runtime, []

        def hook(metadata: Any) -> None:
            seen.append(metadata)

        for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            chain.add(hook)
            try:
                launching.launch(kernel, 1, *given)
                mine = last()
                plainly(1, *given)
                plain = last()
            finally:
                chain.remove(hook)
            assert mine[0] is plain[0]
            assert mine[8:10] == plain[8:10]
            assert mine[7].get() == plain[7].get()


@check
def what_plans_do_not_know_goes_to_triton() -> None:
    given = ((BASE[torch.float32],) * 3, 4, (16, 16, 1e-5), SCHEDULES[0])
    ran: list[str] = []
    run = JITFunction.run

    def replaced(self: Any, *arguments: Any, **options: Any) -> Any:
        ran.append("run")
        return run(self, *arguments, **options)

    with active():
        launching.launch(kernel, 1, *given)
        with mock.patch.object(JITFunction, "run", replaced):
            launching.launch(kernel, 1, *given)
        assert ran == ["run"]
        with mock.patch.object(kernel, "pre_run_hooks", [lambda *_, **__: ran.append("pre")]):
            launching.launch(kernel, 1, *given)
        assert ran == ["run", "pre"]
        inspect = mock.Mock(return_value=("key", "hash"))
        with (
            mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", inspect),
            mock.patch.object(kernel, "run", side_effect=lambda *_, **__: ran.append("inspected")),
        ):
            launching.launch(kernel, 1, *given)
        assert ran[-1] == "inspected"
        with mock.patch.object(launching, "RUN", None):
            before = len(launching._plans)
            launching.launch(kernel, 1, *given[:3], SCHEDULES[1])
            assert len(launching._plans) == before


@check
def a_changed_mode_is_another_plan() -> None:
    given = ((BASE[torch.float32],) * 3, 4, (16, 16, 1e-5), SCHEDULES[0])
    with active():
        found = []
        for mode in ("", "fpsan", "", "iisan"):
            with mock.patch.object(triton.knobs.compilation, "instrumentation_mode", mode):
                launching.launch(kernel, 1, *given)
                found.append(last())
                plainly(1, *given)
                same(found[-1], last())
        assert found[0][0] is found[2][0] is not found[1][0]
        with mock.patch.object(kernel, "debug", True):
            launching.launch(kernel, 1, *given)
            mine = last()
            plainly(1, *given)
            same(mine, last())


@check
def a_changed_global_is_refused_as_by_triton() -> None:
    given = ((BASE[torch.float32],) * 3, 4, (16, 16, 1e-5), SCHEDULES[0])
    place = globals()
    with active():
        kernel.hash = None
        kernel.cache_key  # noqa: B018 (Triton collects the globals as it makes the key)
        for _ in range(2):
            launching.launch(kernel, 1, *given)
        before = place["SCALE"]
        place["SCALE"] = tl.constexpr(4)
        try:
            with pytest.raises(RuntimeError, match="SCALE has changed"):
                launching.launch(kernel, 1, *given)
        finally:
            place["SCALE"] = before
        made.clear()
        launching.launch(kernel, 1, *given)
        assert len(made) == 1


@check
def plans_are_bounded_and_of_one_driver() -> None:
    tensors = (BASE[torch.float32],) * 3
    with active(), mock.patch.object(launching, "LIMIT", 5):
        for size in range(40):
            launching.launch(kernel, 1, tensors, 1, (size, 16, 1e-5), SCHEDULES[0])
            assert len(launching._plans) <= 5
        launching.launch(kernel, 1, tensors, 1, (39, 16, 1e-5), SCHEDULES[0])
        first = last()[0]
        with mock.patch.object(driver, "_active", Driver()):
            kernel.device_caches.clear()
            launching.launch(kernel, 1, tensors, 1, (39, 16, 1e-5), SCHEDULES[0])
            assert last()[0] is not first


@check
def a_descriptor_that_tma_cannot_read_is_refused() -> None:
    good = BASE[torch.bfloat16][:64].view(8, 8)
    others = (None, good)
    with active():
        for _ in range(2):
            launching.launch(kernel, 1, (good, *others), 1, (8, 8, 1e-5), DESCRIBED[1])
        for bad, why in (
            (BASE[torch.bfloat16][1:65].view(8, 8), "16-byte aligned"),
            (BASE[torch.bfloat16][:96].view(8, 12), "16-byte aligned"),
            (good.t(), "contiguous|aligned"),
            (good[:0], "positive"),
            (good.view(-1), "mismatch"),
        ):
            with pytest.raises(AssertionError, match=why):
                launching.launch(kernel, 1, (bad, *others), 1, (8, 8, 1e-5), DESCRIBED[1])


@check
def threads_get_their_own_launches() -> None:
    wrong: list[str] = []
    with active():
        tensors = (BASE[torch.float32],) * 3
        local = threading.local()
        run = property(lambda self: lambda *given: setattr(local, "given", (self, *given)))
        with mock.patch.object(Compiled, "run", run), mock.patch.object(launching, "LIMIT", 7):

            def work(seed: int) -> None:
                for step in range(100):
                    size = (seed * 7 + step * 3) % 20
                    launching.launch(kernel, 1, tensors, step, (size, 16, 1e-5), SCHEDULES[size % 4])
                    mine = local.given
                    plainly(1, tensors, step, (size, 16, 1e-5), SCHEDULES[size % 4])
                    if mine[0] is not local.given[0] or mine[10:] != local.given[10:]:
                        wrong.append(f"{seed}: {step}")

            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong, wrong[:3]


@check
def every_op_launches_the_same_with_plans_and_without() -> None:
    def launches() -> list[tuple[Any, ...]]:
        made.clear()
        problem = dataclasses.replace(PROBLEM, call=name)
        for t, transposed, n in ((8, False, 64), (24, False, 64), (8, True, 64), (8, False, 60)):
            aot.call(dataclasses.replace(problem, tokens=t, features=n, transposed=transposed))
        return [tuple(_plain(part) for part in launch[:5] + launch[10:]) for launch in made]

    def _plain(part: Any) -> Any:
        if isinstance(part, Tensor):
            return (part.dtype, part.shape, part.stride(), part.data_ptr() % 16)
        if hasattr(part, "block_shape"):
            return (_plain(part.base), list(part.shape), list(part.strides), list(part.block_shape))
        return part if isinstance(part, int | float | str | CompiledKernel) or part is None else "object"

    PROBLEM = aot.Problem("", "bfloat16", 8, 64)
    for name in aot.CALLS | aot.VARIANTS:
        with active():
            launches()
            with_plans = launches()
            hits = len(launching._plans)
            assert hits, name
            with mock.patch.object(launching, "RUN", None):
                without = launches()
            assert with_plans == without, name


@contextlib.contextmanager
def launcher_in_c() -> Iterator[list[tuple[Any, ...]]]:
    """What Triton's launcher of NVIDIA's hands to C; an encoded descriptor is what it was encoded from."""
    from triton.backends.nvidia import driver as nvidia

    given: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> None:
        given.append(arguments)

    def encode(*arguments: Any) -> tuple[Any, ...]:
        encodings.append(arguments)
        return tuple(tuple(one) if isinstance(one, list | torch.Size) else one for one in arguments)

    if reason := stand_in.obstacle():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder, stand_in.driver(Path(folder)):
        utils: Any = driver.active.utils
        filled = {name: encode for name in vars(utils) if name.startswith("fill_tma_descriptor")}
        with mock.patch.multiple(utils, **filled), contextlib.ExitStack() as stack:
            if hasattr(utils, "launch"):
                stack.enter_context(mock.patch.object(utils, "launch", record))
            else:  # Triton 3.6 makes a module for each kernel
                module = SimpleNamespace(launch=record)
                stack.enter_context(mock.patch.object(nvidia, "compile_module_from_src", return_value=module))
            linear_forward.linear_kernel.device_caches.clear()
            launching.forget()
            yield given
            # a kernel that goes asks the driver, so it goes first
            linear_forward.linear_kernel.device_caches.clear()
            launching.forget()


encodings: list[tuple[Any, ...]] = []


def _flat(part: Any) -> Any:
    """What C gets, to compare: tensors by their address; a chain of no hooks, and what it would be told, as none."""
    if isinstance(part, tuple | list):
        return [_flat(one) for one in part]
    if isinstance(part, Tensor):
        return part.data_ptr()
    return None if isinstance(part, LazyDict) or (hasattr(part, "calls") and not part.calls) else part


@check
def a_descriptor_is_encoded_once_and_is_that_of_triton() -> None:
    memory = torch.zeros(16, 4096, dtype=torch.bfloat16)

    def views(t: int, n: int, k: int, row: int) -> tuple[Any, ...]:
        x = memory[row].as_strided((t, k), (k * t, 1), memory[row].storage_offset())
        y, z = (memory[row + place, : t * n].view(t, n) for place in (2, 3))
        w = memory[row + 1, : n * k].view(n, k)
        return (x, w, memory[8, :n], None, y, z) if row else (x, w, memory[8, :n], memory[9, :n], y, None)

    cases = [views(t, n, k, row) for t in (1, 2, 8) for n, k in ((16, 32), (32, 16)) for row in (0, 4)]

    def launches() -> Any:
        given.clear()
        encodings.clear()
        for case in cases:
            linear_forward.launch(*case)
        return _flat(given)

    with launcher_in_c() as given:
        launches()
        with mock.patch.object(launching, "RUN", None):
            plainly = launches()
        assert len(plainly) == len(cases)
        assert launches() == plainly
        assert encodings
        assert launches() == plainly
        assert not encodings
        with mock.patch.object(descriptors, "LIMIT", 3):
            launching.forget()
            for _ in range(2):
                assert launches() == plainly
            assert all(len(plan.encoded._kept) <= 3 for plan in launching._plans.values() if plan.encoded)
        x, *others = cases[0]
        bad = torch.zeros(40, dtype=torch.bfloat16)[1 : 1 + x.numel()].view(x.shape)
        with pytest.raises(AssertionError, match="16-byte aligned"):
            linear_forward.launch(bad, *others)


def main() -> None:
    failed = dict.fromkeys(CHECKS, "")
    for name, function in CHECKS.items():
        try:
            function()
        except pytest.skip.Exception as reason:
            failed[name] = f"skipped: {reason}"
        except BaseException:
            failed[name] = traceback.format_exc()
        made.clear()
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
