"""Loads, stores, asynchronous copies and mbarriers, from the text of the PTX ISA; each fault that must be seen."""

from typing import Any

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.small import aligned, run
from ptx.tensor_maps import TensorMap

U16, U32 = np.uint16, np.uint32
TIMINGS = ("late", "early", "random")
MAKE_BARRIER = "setp.eq.u32 %p15, %r0, 0; @%p15 mbarrier.init.shared::cta.b64 [memory+1024], 1; bar.sync 0;"
WAIT = "W{0}: mbarrier.try_wait.parity.shared::cta.b64 %p14, [memory+1024], {0}; @!%p14 bra W{0};"


def output(count: int, kind: Any = U32) -> Any:
    return aligned(np.zeros(count, kind))


# ---- Data Movement: ld, st


def test_vectors_are_consecutive_elements() -> None:
    source, out = aligned(np.arange(128, dtype=U32)), output(128)
    run(
        "mad.wide.u32 %rd5, %r0, 16, %rd0; mad.wide.u32 %rd6, %r0, 16, %rd1; "
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd5]; st.global.v2.b32 [%rd6+8], {%r1, %r2}; "
        "st.global.v2.b32 [%rd6], {%r3, %r4};",
        [source], [out],
    )  # fmt: skip
    np.testing.assert_array_equal(out.reshape(32, 4), source.reshape(32, 4)[:, [2, 3, 0, 1]])


def test_a_narrow_load_is_extended_by_its_type() -> None:
    source, out = aligned([0xFF80], U16), output(64)
    run(
        "mad.wide.u32 %rd6, %r0, 8, %rd1; ld.global.s8 %r1, [%rd0]; ld.global.u8 %r2, [%rd0+1]; "
        "st.global.v2.b32 [%rd6], {%r1, %r2};",
        [source], [out],
    )  # fmt: skip
    assert out[:2].tolist() == [0xFFFFFF80, 0xFF]


def test_generic_addresses_are_shared_memory_s_too() -> None:
    out = output(32)
    run(
        "mov.b64 %rd5, memory; cvta.shared.u64 %rd5, %rd5; mad.wide.u32 %rd5, %r0, 4, %rd5; st.u32 [%rd5], %r0; "
        "ld.u32 %r1, [%rd5]; mad.wide.u32 %rd6, %r0, 4, %rd0; st.u32 [%rd6], %r1;",
        [], [out], shared=128,
    )  # fmt: skip
    assert out.tolist() == list(range(32))


def test_local_memory_is_a_thread_s_own() -> None:
    out = output(32)
    body = (
        ".local .align 8 .b8 own[16]; mov.u64 %rd5, own; st.local.b32 [%rd5+8], %r0; cvta.local.u64 %rd6, %rd5; "
        "ld.b32 %r1, [%rd6+8]; mad.wide.u32 %rd7, %r0, 4, %rd0; st.global.b32 [%rd7], %r1; "
    )
    run(body, [], [out])
    assert out.tolist() == list(range(32))
    for access, what in (("[%rd5+4]", "unwritten"), ("[%rd5+16]", "out of bounds"), ("[%rd5+2]", "misaligned")):
        with pytest.raises(Fault, match=f"{what}.* local"):
            run(body + f"ld.local.b32 %r2, {access};", [], [output(32)])


@pytest.mark.parametrize(
    ("what", "body"),
    [
        ("out of bounds: global", "mad.wide.u32 %rd5, %r0, 4, %rd0; ld.global.b32 %r1, [%rd5+4];"),
        ("out of bounds: global", "mov.b64 %rd5, 64; ld.global.b32 %r1, [%rd5];"),
        ("out of bounds: writes .* input", "st.global.b32 [%rd0], %r0;"),
        ("out of bounds: writes shared", "mov.u32 %r1, memory; mad.lo.u32 %r1, %r0, 4, %r1; st.shared.b32 [%r1+4], %r0;"),
        ("misaligned: global", "ld.global.b32 %r1, [%rd0+2];"),
        ("misaligned: shared", "st.shared.v2.b32 [memory+4], {%r0, %r0};"),
        ("unwritten: reads shared", "ld.shared.b32 %r1, [memory];"),
        ("unwritten: reads bytes of p1", "ld.global.b32 %r1, [%rd1];"),
        ("race: one instruction writes two values", "st.shared.b32 [memory], %r0;"),
        ("race: one instruction writes two values", "st.global.b32 [%rd1], %r0;"),
        ("trap", "trap;"),
        ("no end", "LOOP: bra.uni LOOP;"),
    ],
)  # fmt: skip
def test_faults_of_accesses(what: str, body: str) -> None:
    with pytest.raises(Fault, match=what) as raised:
        run(body, [aligned(np.arange(32, dtype=U32))], [output(32)], shared=128, limit=1000)
    assert body.split("; ")[-1].rstrip(";").split(": ")[-1] in str(raised.value), "the fault names its instruction"


def test_a_masked_lane_accesses_nothing() -> None:
    out = output(4)
    run("setp.lt.u32 %p0, %r0, 4; mad.wide.u32 %rd6, %r0, 4, %rd0; @%p0 st.global.b32 [%rd6], %r0;", [], [out])
    assert out.tolist() == [0, 1, 2, 3]


# ---- blocks


def test_two_blocks_that_write_a_byte_are_seen() -> None:
    body = "mov.u32 %r1, %ctaid.x; mad.wide.u32 %rd6, %r1, 2, %rd0; setp.eq.u32 %p0, %r0, 0; @%p0 st.global.b16 [%rd6], %h0;"
    run("mov.b16 %h0, 7;" + body, [], [output(4, U16)], grid=4)
    body = body.replace("%r1, 2", "%r1, 0")
    with pytest.raises(Fault, match="two writers: blocks 0 and 1"):
        run("mov.b16 %h0, 7;" + body, [], [output(4, U16)], grid=4)


def test_a_block_that_reads_what_another_writes_is_seen() -> None:
    body = (
        "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p0, %r1, {}; setp.eq.and.u32 %p0, %r0, 0, %p0; @%p0 st.global.b32 [%rd0], %r0; "
        "setp.ne.u32 %p1, %r1, {}; @%p1 ld.global.b32 %r2, [%rd0];"
    )
    with pytest.raises(Fault, match="race: block 1 reads"):
        run(body.format(0, 0), [], [output(1)], grid=2)


# ---- Parallel Synchronization: bar


def exchange(barrier: str) -> str:
    """Each thread reads what the thread of the other warp wrote."""
    return (
        "mov.u32 %r1, memory; mad.lo.u32 %r2, %r0, 4, %r1; st.shared.b32 [%r2], %r0; " + barrier + " "
        "xor.b32 %r3, %r0, 32; mad.lo.u32 %r2, %r3, 4, %r1; ld.shared.b32 %r4, [%r2]; "
        "mad.wide.u32 %rd6, %r0, 4, %rd0; st.global.b32 [%rd6], %r4;"
    )


@pytest.mark.parametrize("together", [True, False])
def test_a_barrier_orders_the_warps_of_a_block(together: bool) -> None:
    out = output(64)
    run(exchange("bar.sync 0;"), [], [out], threads=64, shared=256, together=together)
    assert out.tolist() == [thread ^ 32 for thread in range(64)]


def test_a_missing_barrier_is_a_race_in_any_order() -> None:
    with pytest.raises(Fault, match=r"race: warp \d reads shared memory .* that warp \d wrote"):
        run(exchange(""), [], [output(64)], threads=64, shared=256)


def test_a_write_after_an_unordered_read_is_a_race() -> None:
    body = exchange("bar.sync 0;") + " {} mad.lo.u32 %r2, %r0, 4, %r1; st.shared.b32 [%r2], %r4;"
    run(body.format("bar.sync 0;"), [], [output(64)], threads=64, shared=256)
    with pytest.raises(Fault, match=r"race: warp \d overwrites shared memory .* that warp \d read"):
        run(body.format(""), [], [output(64)], threads=64, shared=256)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("setp.lt.u32 %p0, %r0, 7; @%p0 bra A; bar.sync 0; A: mov.u32 %r1, 0;", "divergent: a barrier"),
        ("setp.lt.u32 %p0, %r0, 7; @%p0 bar.sync 0;", "divergent: a barrier"),
        (
            "setp.lt.u32 %p0, %r0, 7; @%p0 bra A; vote.sync.ballot.b32 %r1, %p0, -1; A: mov.u32 %r1, 0;",
            "divergent: a lane",
        ),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bra A; bar.sync 0, 64; A: mov.u32 %r1, 0;", "deadlock"),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bar.arrive 1, 64;", "barriers that never completed"),
        ("bar.sync 0, 32;", "64 threads arrived, of 32"),
    ],
)
def test_faults_of_barriers(body: str, what: str) -> None:
    with pytest.raises(Fault, match=what):
        run(body, threads=64)


def test_warps_that_ended_are_not_waited_for() -> None:
    run("setp.lt.u32 %p0, %r0, 32; @%p0 ret; bar.sync 0;", threads=96)


def test_named_barriers_let_a_producer_go_on() -> None:
    out = output(32)
    run(
        "setp.lt.u32 %p0, %r0, 32; @%p0 bra CONSUMER; mad.lo.u32 %r1, %r0, 4, -128; st.shared.b32 [%r1], %r0; "
        "bar.arrive 1, 64; bra.uni END; CONSUMER: bar.sync 1, 64; mad.lo.u32 %r1, %r0, 4, 0; ld.shared.b32 %r2, [%r1]; "
        "mad.wide.u32 %rd6, %r0, 4, %rd0; st.global.b32 [%rd6], %r2; END: mov.u32 %r1, 0;",
        [], [out], threads=64, shared=128,
    )  # fmt: skip
    assert out.tolist() == list(range(32, 64))


# ---- Data Movement, Asynchronous copy: cp.async

COPY = (
    "mov.u32 %r1, memory; mad.lo.u32 %r2, %r0, 16, %r1; mad.wide.u32 %rd5, %r0, 16, %rd0; "
    "cp.async.cg.shared.global [%r2], [%rd5], 16, %r10; cp.async.commit_group; "
)
AFTER_COPY = (
    "mad.wide.u32 %rd6, %r0, 16, %rd1; ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r2]; "
    "st.global.v4.b32 [%rd6], {%r4, %r5, %r6, %r7};"
)


@pytest.mark.parametrize("timing", TIMINGS)
def test_what_an_asynchronous_copy_does_not_read_is_zero(timing: str) -> None:
    source, out = aligned(np.arange(1, 129, dtype=U32)), output(128)
    body = "mov.u32 %r10, 8; " + COPY + "cp.async.wait_group 0; " + AFTER_COPY
    run(body, [source], [out], shared=512, timing=timing)
    expected = source.reshape(32, 4).copy()
    expected[:, 2:] = 0
    np.testing.assert_array_equal(out.reshape(32, 4), expected)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_a_copy_that_is_not_waited_for_is_seen(wait: str, timing: str) -> None:
    with pytest.raises(Fault, match=r"unwritten|cp\.async of warp 0 wrote"):
        run("mov.u32 %r10, 16; " + COPY + wait + AFTER_COPY, [aligned(np.zeros(128, U32))], [output(128)], shared=512,
            timing=timing)  # fmt: skip


def test_a_copy_is_known_to_other_warps_behind_a_barrier() -> None:
    given = [aligned(np.zeros(256, U32))]
    for barrier in ("bar.sync 0;", ""):
        body = f"mov.u32 %r10, 16; {COPY} cp.async.wait_group 0; {barrier} xor.b32 %r2, %r2, 512; {AFTER_COPY}"
        if barrier:
            run(body, given, [output(256)], shared=1024, threads=64)
        else:
            with pytest.raises(Fault, match=r"cp\.async of warp \d wrote"):
                run(body, given, [output(256)], shared=1024, threads=64)


def test_a_copy_in_flight_at_the_end_is_seen() -> None:
    with pytest.raises(Fault, match=r"exits with a cp\.async in flight"):
        run("mov.u32 %r10, 16; " + COPY, [aligned(np.zeros(128, U32))], [], shared=512)


# ---- Parallel Synchronization: mbarrier


def test_an_mbarrier_completes_a_phase_of_all_arrivals() -> None:
    """Each warp's lane 0 arrives; what it wrote is known to those that wait for the phase of parity 0."""
    out = output(64)
    body = exchange("ARRIVE").replace(
        "ARRIVE",
        "and.b32 %r5, %r0, 31; setp.eq.u32 %p0, %r5, 0; @%p0 mbarrier.arrive.shared::cta.b64 _, [memory+1024]; "
        + WAIT.format(0),
    )
    make = MAKE_BARRIER.replace("1024], 1", "1024], 2")
    run(make + body, [], [out], threads=64, shared=1032)
    assert out.tolist() == [thread ^ 32 for thread in range(64)]
    with pytest.raises(Fault, match="race"):  # a fresh mbarrier's phase of parity 1 counts as complete
        run(
            make + body.replace("%p14, [memory+1024], 0", "%p14, [memory+1024], 1"),
            [],
            [output(64)],
            threads=64,
            shared=1032,
        )
    with pytest.raises(Fault, match="deadlock"):
        run(make.replace("], 2", "], 3") + body, [], [output(64)], threads=64, shared=1032)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("mbarrier.arrive.shared::cta.b64 _, [memory];", "no mbarrier at 0x0"),
        (MAKE_BARRIER + "@%p15 mbarrier.arrive.shared::cta.b64 _, [memory+1024], 2;", "more arrivals than its count"),
        (MAKE_BARRIER + "@%p15 mbarrier.init.shared::cta.b64 [memory+1024], 1;", "where there is one"),
        (MAKE_BARRIER + "@%p15 st.shared.b32 [memory+1028], %r0;", "writes over an mbarrier"),
        (MAKE_BARRIER.replace("+1024", "+1028"), "misaligned"),
        (MAKE_BARRIER.replace("bar.sync 0;", "") + WAIT.format(1), "race|no mbarrier"),
    ],
)
def test_faults_of_mbarriers(body: str, what: str) -> None:
    with pytest.raises(Fault, match=what):
        run(body, threads=64, shared=1040)


# ---- Data Movement, Tensor copy: cp.async.bulk.tensor


def tensor(
    rows: int = 16, columns: int = 64, box: tuple[int, int] = (8, 64), swizzle: int = 3
) -> tuple[Any, TensorMap]:
    """A matrix of 16 bits, each element its number, and its map."""
    data = aligned(np.arange(rows * columns, dtype=U16).reshape(rows, columns))
    return data, TensorMap(data.ctypes.data, 2, [columns, rows], [2 * columns], box[::-1], swizzle)


def load(x: int = 0, y: int = 0, expected: int = 1024, before: str = "", wait: str = WAIT.format(0)) -> str:
    """A box to address 0, waited for; thread t stores its t-th word."""
    return (
        f"mov.u32 %r8, {x}; mov.u32 %r9, {y}; " + before + MAKE_BARRIER +
        f"@%p15 mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+1024], {expected}; "
        "@%p15 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [memory], [%rd2, {%r8, %r9}], "
        "[memory+1024]; " + wait + " mad.lo.u32 %r2, %r0, 4, 0; ld.shared.b32 %r4, [%r2]; "
        "mad.wide.u32 %rd6, %r0, 4, %rd1; st.global.b32 [%rd6], %r4; "
    )  # fmt: skip


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(("x", "y"), [(0, 0), (16, 12), (-8, -3)])
def test_a_box_is_swizzled_and_zero_outside_of_the_tensor(x: int, y: int, timing: str) -> None:
    """Tensors, swizzling modes: of 128-byte rows the 16-byte units are permuted by the row's number modulo 8."""
    data, tensor_map = tensor()
    out = output(256)
    run(load(x, y), [data], [out], maps=[tensor_map], threads=256, shared=1032, timing=timing)
    found = out.view(U16).reshape(8, 8, 8)
    padded = np.zeros((40, 200), U16)
    padded[12:28, 64:128] = data
    box = padded[12 + y : 20 + y, 64 + x : 128 + x].reshape(8, 8, 8)
    for row in range(8):
        for unit in range(8):
            np.testing.assert_array_equal(found[row, unit ^ row], box[row, unit])


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"wait": ""}, "unwritten|a TMA load wrote"),
        ({"expected": 1008}, "deadlock|unwritten|TMA load"),
        ({"expected": 1040}, "deadlock"),
        ({"before": "st.shared.b32 [memory], 7; bar.sync 0; "}, r"missing fence\.proxy\.async"),
    ],
)
def test_faults_of_loads(options: dict[str, Any], what: str, timing: str) -> None:
    data, tensor_map = tensor()
    with pytest.raises(Fault, match=what):
        run(load(**options), [data], [output(256)], maps=[tensor_map], threads=256, shared=1032, timing=timing)


def test_a_fence_hands_generic_writes_to_the_asynchronous_proxy() -> None:
    data, tensor_map = tensor()
    before = "st.shared.b32 [memory], 7; fence.proxy.async.shared::cta; bar.sync 0; "
    run(load(before=before), [data], [output(256)], maps=[tensor_map], threads=256, shared=1032)


STORE = (
    "mad.lo.u32 %r2, %r0, 4, 0; st.shared.b32 [%r2], %r0; mov.u32 %r8, {x}; mov.u32 %r9, {y}; {fence} bar.sync 0; "
    "setp.eq.u32 %p15, %r0, 0; @%p15 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {{%r8, %r9}}], [memory]; "
    "cp.async.bulk.commit_group; {wait} bar.sync 0; {after}"
)
FENCE, READ = "fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group.read 0;"


@pytest.mark.parametrize("timing", TIMINGS)
def test_a_bulk_store_writes_what_is_inside(timing: str) -> None:
    data, tensor_map = tensor(swizzle=0)
    data[...] = 0
    body = STORE.format(x=48, y=12, fence=FENCE, wait=READ, after="")
    run(body, [], [data], maps=[tensor_map], threads=256, shared=1024, timing=timing)
    words = np.arange(256, dtype=U32).view(U16).reshape(8, 64)
    np.testing.assert_array_equal(data[12:, 48:], words[:4, :16])
    assert not data[:12].any()
    assert not data[:, :48].any()


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    ("fence", "wait", "after", "what"),
    [
        ("", READ, "", r"missing fence\.proxy\.async"),
        (FENCE, "", "", "exits while a bulk store still reads"),
        (FENCE, "cp.async.bulk.wait_group.read 1;", "", "exits while a bulk store still reads"),
        (FENCE, "", "st.shared.b32 [%r2], 7; " + READ, "race: warp .* overwrites .* that a bulk store of warp 0 read"),
    ],
)
def test_faults_of_bulk_stores(fence: str, wait: str, after: str, what: str, timing: str) -> None:
    data, tensor_map = tensor(swizzle=0)
    with pytest.raises(Fault, match=what):
        run(STORE.format(x=0, y=0, fence=fence, wait=wait, after=after), [], [data], maps=[tensor_map], threads=256,
            shared=1024, timing=timing)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"address": 8}, "no multiple of 16"),
        ({"strides": [72]}, "strides"),
        ({"box": [64, 257]}, "a box"),
        ({"box": [4, 8]}, "rows of a box of 8 bytes"),
        ({"box": [128, 8]}, "rows of a box of 256 bytes, swizzled in 128"),
        ({"extents": [0, 16]}, "extents"),
    ],
)
def test_maps_that_the_driver_refuses(changes: dict[str, Any], what: str) -> None:
    fields: dict[str, Any] = {
        "address": 0,
        "element": 2,
        "extents": [64, 16],
        "strides": [128],
        "box": [64, 8],
        "swizzle": 3,
    } | changes
    with pytest.raises(Fault, match=what):
        TensorMap.unpack(TensorMap(**fields).pack())


def ring(empty_wait: str = "@!%p2 bra WE;", arrival: str = "@%p4", rows: int = 8) -> str:
    """Thread 0 loads four boxes through two buffers; warp 1 takes each and gives its buffer back."""
    place = (
        "and.b32 %r21, %r20, 1; shr.u32 %r22, %r20, 1; and.b32 %r22, %r22, 1; xor.b32 %r23, %r22, 1; "
        "mad.lo.u32 %r24, %r21, 8, 4096; mad.lo.u32 %r25, %r21, 1024, 0; "
    )
    again = "add.u32 %r20, %r20, 1; setp.lt.u32 %p3, %r20, 4; @%p3 bra "
    barriers = "".join(f"@%p15 mbarrier.init.shared::cta.b64 [memory+{4096 + 8 * i}], 1; " for i in range(4))
    words = "".join(f"ld.shared.b32 %r28, [%r27+{128 * k}]; st.global.b32 [%rd6+{128 * k}], %r28; " for k in range(8))
    return (
        "setp.eq.u32 %p15, %r0, 0; " + barriers + "bar.sync 0; mov.u32 %r20, 0; mov.u32 %r8, 0; "
        "setp.ge.u32 %p0, %r0, 32; @%p0 bra CONSUME; setp.ne.u32 %p1, %r0, 0; @%p1 bra END; "
        "PRODUCE: " + place + "WE: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r24+16], %r23; " + empty_wait +
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r24], 1024; mad.lo.u32 %r9, %r20, {rows}, 0; "
        "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r25], [%rd2, {%r8, %r9}], [%r24]; "
        + again + "PRODUCE; bra.uni END; "
        "CONSUME: " + place + "WF: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r24], %r22; @!%p2 bra WF; "
        "sub.u32 %r26, %r0, 32; mad.lo.u32 %r27, %r26, 4, %r25; mad.lo.u32 %r29, %r20, 256, %r26; "
        "mad.wide.u32 %rd6, %r29, 4, %rd1; " + words + "setp.eq.u32 %p4, %r26, 0; " + arrival +
        " mbarrier.arrive.shared::cta.b64 _, [%r24+16]; " + again + "CONSUME; END: mov.u32 %r1, 0;"
    )  # fmt: skip


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("timing", TIMINGS)
def test_a_ring_of_buffers_between_a_thread_and_a_warp(timing: str, together: bool) -> None:
    data, tensor_map = tensor(rows=32, swizzle=0)
    for seed in range(3):
        out = output(1024)
        run(
            ring(),
            [data],
            [out],
            maps=[tensor_map],
            threads=64,
            shared=4128,
            timing=timing,
            together=together,
            seed=seed,
        )
        np.testing.assert_array_equal(out.view(U16).reshape(32, 64), data)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"empty_wait": ""}, "overwrites .* read|TMA load wrote|more arrivals than its count"),
        ({"arrival": ""}, "deadlock"),  # 32 arrivals are 32 phases
        ({"arrival": "@%p15"}, "deadlock"),
    ],
)
def test_faults_of_a_ring(changes: dict[str, Any], what: str, timing: str) -> None:
    data, tensor_map = tensor(rows=32, swizzle=0)
    with pytest.raises(Fault, match=what):
        run(ring(**changes), [data], [output(1024)], maps=[tensor_map], threads=64, shared=4128, timing=timing)


# ---- clusters


def test_a_multicast_load_reaches_every_block_of_the_cluster() -> None:
    """Block 0 loads for both; each waits on its own mbarrier, which it made before the cluster's barrier."""
    data, tensor_map = tensor(swizzle=0)
    out = output(512)
    body = (
        "mov.u32 %r8, 0; mov.u32 %r9, 0; mov.u32 %r10, %cluster_ctarank; mov.b16 %h0, 3; " + MAKE_BARRIER +
        "@%p15 mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory+1024], 1024; "
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; "
        "setp.eq.and.u32 %p0, %r10, 0, %p15; "
        "@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [memory], "
        "[%rd2, {%r8, %r9}], [memory+1024], %h0; " + WAIT.format(0) +
        "mad.lo.u32 %r2, %r0, 4, 0; ld.shared.b32 %r4, [%r2]; mad.lo.u32 %r5, %r10, 256, %r0; "
        "mad.wide.u32 %rd6, %r5, 4, %rd1; st.global.b32 [%rd6], %r4;"
    )  # fmt: skip
    run(body, [data], [out], maps=[tensor_map], threads=256, grid=2, cluster=2, shared=1032)
    np.testing.assert_array_equal(out.view(U16).reshape(2, 8, 64), np.stack([data[:8]] * 2))


def test_another_block_s_shared_memory_by_mapa() -> None:
    out = output(64)
    body = (
        "mov.u32 %r1, %cluster_ctarank; mad.lo.u32 %r2, %r0, 4, 0; mad.lo.u32 %r3, %r1, 100, %r0; st.shared.b32 [%r2], %r3; "
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; xor.b32 %r4, %r1, 1; "
        "mapa.shared::cluster.u32 %r5, %r2, %r4; ld.shared::cluster.b32 %r6, [%r5]; mad.lo.u32 %r7, %r1, 32, %r0; "
        "mad.wide.u32 %rd6, %r7, 4, %rd0; st.global.b32 [%rd6], %r6; "
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
    )
    run(body, [], [out], grid=2, cluster=2, shared=128)
    assert out.tolist() == [100 + lane for lane in range(32)] + list(range(32))
