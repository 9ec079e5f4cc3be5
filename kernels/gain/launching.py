"""Launches by plan: Triton binds, specialises and looks up a kernel once for each kind of call, and later calls repeat it.

``launch`` makes a call's key out of all that Triton specialises a launch on. The first call of a key goes through
``kernel[grid](...)``, and the kernel that Triton compiled or found becomes the key's plan. Later calls of the key launch this
kernel with their own arguments, as JITFunction.run would. A key is exact, or finer than Triton's own:

    schedule      itself: the compile-time arguments, the compiler's options, the blocks of the descriptors
    tensors       what Triton's own function says of each: the dtype and whether the pointer is a multiple of 16 bytes, on AMD
                  also whether it is within 2 GB; of a descriptor's, the dtype
    rows          nothing: the kernel is not specialised on it. Only 32-bit values have plans
    numbers       their values
    elsewhere     the driver, the device, and the knobs that JITFunction.run reads

No plan is made or used under the interpreter, for a kernel with hooks of its own, where the compiler's stages are inspected,
where JITFunction.run is replaced, or with a version of Triton where it reads a name that is unknown here. The hooks of launches
are called and the stream is asked for at every launch, as Triton does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver
from triton.runtime.jit import native_specialize_impl

from gain_ops.kernels.descriptors import Block, Encoded, descriptor, encoded
from gain_ops.kernels.devices import is_ready, on_device_of

LIMIT = 4096
"""Plans that are kept; all are dropped when one more comes."""

_NAMES = (
    "RuntimeError _do_compile _pack_args active add_stages_inspection_hook append callable compilation "
    "compute_cache_key debug device_caches driver fpsan_homomorphic_casts function get get_current_device "
    "get_current_stream hasattr instrumentation_mode items knobs launch_enter_hook launch_exit_hook "
    "launch_metadata len object packed_metadata pre_run_hooks result run runtime used_global_vals values"
)
"""The names in JITFunction.run of Triton 3.6 and 3.9: all that a launch depends on."""

_READ = JITFunction.run.__code__.co_names
_READS_FPSAN = "fpsan_homomorphic_casts" in _READ
RUN = JITFunction.run if set(_NAMES.split()).issuperset(_READ) else None
"""JITFunction.run, where plans do what it does."""


@dataclass(frozen=True, eq=False, slots=True)
class Schedule:
    """What a launcher decides for a kind of call. Plans belong to the object, so a launcher makes it once and keeps it."""

    constants: dict[str, Any]
    """The compile-time arguments and the compiler's options by name, and any argument that ``launch`` is not given."""
    blocks: tuple[Block | None, ...] | None = None
    """For each tensor the block of the TMA descriptor that the kernel gets in its place, or None for a pointer."""


@dataclass(frozen=True, slots=True)
class _Plan:
    kernel: Any  # kept, since the key has its id
    compiled: CompiledKernel
    constants: tuple[Any, ...]
    """The arguments after those that ``launch`` is given."""
    encoded: Encoded | None
    """Launches it with descriptors that are kept, where it has descriptors."""
    globals: tuple[tuple[dict[str, Any], str, Any], ...]
    """Places, names and values of the global variables that the kernel was compiled with."""

    def is_fresh(self) -> bool:
        """Whether they are the same; if not, Triton says so."""
        for place, name, value in self.globals:  # noqa: SIM110 (all() makes a generator, which takes longer)
            if place.get(name) is not value:
                return False
        return True


class _Plans(dict[tuple[Any, ...], _Plan]):
    """The plans of one driver."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of = of


_plans = _Plans(None)


def launch(
    kernel: Any,
    grid: int,
    tensors: tuple[Tensor | None, ...],
    rows: int | None,
    numbers: tuple[int | float, ...],
    schedule: Schedule,
) -> None:
    """Launch ``kernel[(grid,)](*tensors, rows, *numbers, **schedule.constants)``.

    On the first tensor's device and its current stream.

    Args:
        kernel: a function of @triton.jit.
        grid: the number of programs.
        tensors: the kernel's first arguments.
        rows: the next argument, which the kernel is not specialised on; None for a kernel that has no such argument.
        numbers: the arguments after it. One argument always has one type.
        schedule: the rest, and which tensors go as descriptors.

    """
    like = tensors[0]
    assert like is not None
    if like.is_cuda and not is_ready(like.get_device()):
        with on_device_of(like):
            launch(kernel, grid, tensors, rows, numbers, schedule)
        return
    after = numbers if rows is None else (rows, *numbers)
    if not _has_plans(kernel, rows):
        kernel[(grid,)](*_given(tensors, schedule.blocks), *after, **schedule.constants)
        return
    active = driver.active
    plans = _plans_of(active)
    device = active.get_current_device()
    runtime, compilation = triton.knobs.runtime, triton.knobs.compilation
    key = (
        id(kernel),
        schedule,
        device,
        numbers,
        kernel.debug or runtime.debug,
        compilation.instrumentation_mode,
        _READS_FPSAN and compilation.fpsan_homomorphic_casts,
        *_kinds(kernel.device_caches[device][3], tensors, schedule.blocks),
    )
    plan = plans.get(key)
    if plan is None or not plan.is_fresh():
        compiled = kernel[(grid,)](*_given(tensors, schedule.blocks), *after, **schedule.constants)
        if isinstance(compiled, CompiledKernel):
            if len(plans) >= LIMIT:
                plans.clear()
            plans[key] = _plan(kernel, compiled, len(tensors), rows, len(numbers), schedule)
        return
    compiled, stream = plan.compiled, active.get_current_stream(device)
    enter, leave, metadata = runtime.launch_enter_hook, runtime.launch_exit_hook, None
    hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    if hooked or plan.encoded is None:
        run, given = compiled.run, (*_given(tensors, schedule.blocks), *after, *plan.constants)
    else:
        assert schedule.blocks is not None
        run, given = plan.encoded.run, (*plan.encoded.expand(tensors, schedule.blocks), *after, *plan.constants)
    if hooked:
        metadata = compiled.launch_metadata((grid,), stream, *given)
    else:
        enter = leave = None  # calling chains of no hooks takes a tenth of a launch
    run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *given)


def forget() -> None:
    """Drop all plans."""
    global _plans
    _plans = _Plans(None)


def _has_plans(kernel: Any, rows: int | None) -> bool:
    return (
        type(kernel) is JITFunction
        and JITFunction.run is RUN
        and not kernel.pre_run_hooks
        and triton.knobs.runtime.add_stages_inspection_hook is None
        and (rows is None or -(2**31) <= rows < 2**31)
    )


def _plans_of(active: Any) -> _Plans:
    """The plans of the active driver; those of another are dropped."""
    global _plans
    plans = _plans
    if plans.of is not active:
        plans = _plans = _Plans(active)
    return plans


def _kinds(backend: Any, tensors: tuple[Tensor | None, ...], blocks: tuple[Block | None, ...] | None) -> list[Any]:
    """What Triton specialises on in each tensor; in a descriptor's, all but the block."""
    if blocks is None:
        return [native_specialize_impl(backend, t, False, True, True) for t in tensors]
    return [
        native_specialize_impl(backend, t, False, True, True) if t is None or block is None else t.dtype
        for t, block in zip(tensors, blocks, strict=True)
    ]


def _given(tensors: tuple[Tensor | None, ...], blocks: tuple[Block | None, ...] | None) -> tuple[Any, ...]:
    """What a kernel is given of the tensors."""
    if blocks is None:
        return tensors
    pairs = zip(tensors, blocks, strict=True)
    return tuple([t if t is None or block is None else descriptor(t, block) for t, block in pairs])


def _plan(
    kernel: Any, compiled: CompiledKernel, tensors: int, rows: int | None, numbers: int, schedule: Schedule
) -> _Plan:
    if rows is not None:
        assert kernel.params[tensors].do_not_specialize, f"{kernel.params[tensors].name}: not in do_not_specialize"
    given = tensors + (rows is not None) + numbers
    return _Plan(
        kernel,
        compiled,
        tuple(schedule.constants[parameter.name] for parameter in kernel.params[given:]),
        None if schedule.blocks is None else encoded(compiled),
        # Triton has just compared them with those that it compiled
        tuple((place, name, place[name]) for (name, _), (_, place) in kernel.used_global_vals.items()),
    )
