"""Scalar and warp instructions, a case each from the text of the PTX ISA, whose section names head the groups."""

import struct
from typing import Any

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.small import by_lane

# as functions of lists, which numpy has no annotations of
U32: Any = np.uint32
S32: Any = np.int32
F32: Any = np.float32
U64: Any = np.uint64
S64: Any = np.int64
NAN, INF = float("nan"), float("inf")


def bits(value: float) -> str:
    """An fp32 constant as PTX writes it."""
    return "0f" + struct.pack(">f", value).hex().upper()


# (instruction, inputs in %r10.. or %rd10.., the results in %r20 or %rd20, their type)
INTEGER_ARITHMETIC = [
    ("add.s32 %r20, %r10, %r11;", [U32([1, 0xFFFFFFFF]), U32([2, 1])], U32([3, 0])),
    ("sub.s32 %r20, %r10, %r11;", [U32([1, 0]), U32([2, 1])], S32([-1, -1])),
    ("add.s64 %rd20, %rd10, %rd11;", [U64([1 << 40, 2**64 - 1]), U64([1, 1])], U64([(1 << 40) + 1, 0])),
    # the low half, whatever the sign; the high half; all of it
    ("mul.lo.s32 %r20, %r10, %r11;", [S32([-3, 1 << 20]), S32([5, 1 << 12])], S32([-15, 0])),
    ("mul.hi.u32 %r20, %r10, %r11;", [U32([1 << 31, 3]), U32([4, 5])], U32([2, 0])),
    ("mul.hi.s32 %r20, %r10, %r11;", [S32([-1, 1 << 30]), S32([1, 4])], S32([-1, 1])),
    ("mul.hi.u64 %rd20, %rd10, %rd11;", [U64([1 << 63, 2**64 - 1]), U64([4, 2**64 - 1])], U64([2, 2**64 - 2])),
    ("mul.wide.s32 %rd20, %r10, %r11;", [S32([-3, 1 << 20]), S32([5, 1 << 12])], S64([-15, 1 << 32])),
    ("mul.wide.u32 %rd20, %r10, %r11;", [U32([0xFFFFFFFF, 2]), U32([2, 3])], U64([0x1FFFFFFFE, 6])),
    ("mad.lo.s32 %r20, %r10, %r11, -7;", [S32([-3, 2]), S32([5, 3])], S32([-22, -1])),
    ("mad.wide.s32 %rd20, %r10, 4, %rd11;", [S32([-3, 5]), S64([100, 1 << 33])], S64([88, (1 << 33) + 20])),
    # towards zero; a remainder has the sign of the dividend
    ("div.s32 %r20, %r10, %r11;", [S32([-7, 7, -8]), S32([2, -2, 8])], S32([-3, -3, -1])),
    ("rem.s32 %r20, %r10, %r11;", [S32([-7, 7, -8]), S32([2, -2, 8])], S32([-1, 1, 0])),
    ("div.u32 %r20, %r10, %r11;", [U32([0xFFFFFFFE, 7]), U32([2, 8])], U32([0x7FFFFFFF, 0])),
    ("rem.u64 %rd20, %rd10, %rd11;", [U64([1 << 40, 7]), U64([10, 8])], U64([6, 7])),
    ("min.s32 %r20, %r10, %r11;", [S32([-1, 3]), S32([2, 2])], S32([-1, 2])),
    ("max.u32 %r20, %r10, %r11;", [U32([0xFFFFFFFF, 3]), U32([2, 4])], U32([0xFFFFFFFF, 4])),
    ("neg.s32 %r20, %r10;", [S32([5, -(2**31)])], S32([-5, -(2**31)])),
    ("abs.s32 %r20, %r10;", [S32([5, -6])], S32([5, 6])),
    ("popc.b32 %r20, %r10;", [U32([0, 0xF0F0])], U32([0, 8])),
    ("clz.b32 %r20, %r10;", [U32([0, 1, 0x80000000])], U32([32, 31, 0])),
    ("brev.b32 %r20, %r10;", [U32([1, 0x80000001])], U32([0x80000000, 0x80000001])),
    # a field of 8 bits from bit 4, without a sign and with one; bits past the end are the sign's
    ("bfe.u32 %r20, %r10, 4, 8;", [U32([0xABCDE, 0xFF0])], U32([0xCD, 0xFF])),
    ("bfe.s32 %r20, %r10, 4, 8;", [U32([0xABCDE, 0x7F0])], S32([0xCD - 256, 0x7F])),
    ("bfe.s32 %r20, %r10, 28, 8;", [U32([0x90000000, 0x70000000])], S32([-7, 7])),
    ("bfe.u32 %r20, %r10, 3, 0;", [U32([0xFF])], U32([0])),
    ("bfi.b32 %r20, %r10, %r11, 8, 4;", [U32([0xFF, 0x5]), U32([0, 0xFFFFFFFF])], U32([0xF00, 0xFFFFF5FF])),
]

LOGIC_AND_SHIFT = [
    ("and.b32 %r20, %r10, %r11;", [U32([0xFF00]), U32([0x0FF0])], U32([0x0F00])),
    ("or.b32 %r20, %r10, -8;", [U32([1])], U32([0xFFFFFFF9])),
    ("xor.b64 %rd20, %rd10, %rd11;", [U64([0xFF << 40]), U64([0xF0 << 40])], U64([0x0F << 40])),
    ("not.b32 %r20, %r10;", [U32([0])], U32([0xFFFFFFFF])),
    # a shift by more than the width gives zero, or the sign
    ("shl.b32 %r20, %r10, %r11;", [U32([3, 3, 3]), U32([4, 31, 32])], U32([48, 0x80000000, 0])),
    ("shr.u32 %r20, %r10, %r11;", [U32([0x80000000] * 3), U32([4, 31, 40])], U32([0x8000000, 1, 0])),
    ("shr.s32 %r20, %r10, %r11;", [S32([-16, -16, 16]), U32([2, 40, 40])], S32([-4, -1, 0])),
    ("shl.b64 %rd20, %rd10, 36;", [U64([1])], U64([1 << 36])),
    # the pair {%r11, %r10} shifted: its upper word to the left, its lower to the right
    ("shf.l.wrap.b32 %r20, %r10, %r11, 8;", [U32([0xAABBCCDD]), U32([0x11223344])], U32([0x223344AA])),
    ("shf.r.wrap.b32 %r20, %r10, %r11, 40;", [U32([0xAABBCCDD]), U32([0x11223344])], U32([0x44AABBCC])),
    ("shf.r.clamp.b32 %r20, %r10, %r11, 40;", [U32([0xAABBCCDD]), U32([0x11223344])], U32([0x11223344])),
    # 0xC0 is a & b, 0x96 a ^ b ^ c
    ("lop3.b32 %r20, %r10, %r11, %r12, 0xC0;", [U32([0xF0]), U32([0xCC]), U32([0xAA])], U32([0xC0])),
    ("lop3.b32 %r20, %r10, %r11, %r12, 0x96;", [U32([0xF0]), U32([0xCC]), U32([0xAA])], U32([0x96])),
    # bytes 7 6 5 4 are %r11's; with 8 a byte's sign in all its bits
    ("prmt.b32 %r20, %r10, %r11, 0x7531;", [U32([0x33221100]), U32([0x77665544])], U32([0x77553311])),
    ("prmt.b32 %r20, %r10, %r11, 0xC980;", [U32([0x000080FF]), U32([0x7F])], U32([0x00FFFFFF])),
]

FLOATING_POINT = [
    ("add.f32 %r20, %r10, %r11;", [F32([1, 2**24]), F32([2, 1])], F32([3, 2**24])),
    ("mul.f32 %r20, %r10, %r11;", [F32([1.5, INF]), F32([2, 0])], F32([3, NAN])),
    # one rounding: (1 + 2^-12)^2 - 1 keeps 2^-24; a tie that only the exact product tells
    ("fma.rn.f32 %r20, %r10, %r10, 0fBF800000;", [F32([1 + 2**-12])], F32([2**-11 + 2**-24])),
    (f"fma.rn.f32 %r20, %r10, %r11, {bits(2**24)};", [F32([1 + 2**-23]), F32([1])], F32([2**24 + 2])),
    (f"fma.rm.f32 %r20, %r10, %r11, {bits(-1)};", [F32([2**-30, 2**-30]), F32([1, -1])], F32([-1, -1 - 2**-23])),
    ("fma.rn.ftz.f32 %r20, %r10, %r11, 0f00000000;", [F32([2**-70, 2**-140]), F32([2**-70, 1])], F32([0, 0])),
    ("fma.rn.f32 %r20, %r10, %r11, 0f00000000;", [F32([2**-70]), F32([2**-70])], F32([2**-140])),
    ("div.full.f32 %r20, %r10, %r11;", [F32([1, 1]), F32([4, 0])], F32([0.25, INF])),
    ("sqrt.rn.f32 %r20, %r10;", [F32([9, -1])], F32([3, NAN])),
    ("rcp.approx.f32 %r20, %r10;", [F32([4, 0])], F32([0.25, INF])),
    ("rsqrt.approx.f32 %r20, %r10;", [F32([16])], F32([0.25])),
    ("ex2.approx.f32 %r20, %r10;", [F32([3, -INF])], F32([8, 0])),
    ("ex2.approx.ftz.f32 %r20, %r10;", [F32([-140, 1])], F32([0, 2])),
    ("lg2.approx.f32 %r20, %r10;", [F32([8, 0])], F32([3, -INF])),
    ("tanh.approx.f32 %r20, %r10;", [F32([0, INF])], F32([0, 1])),
    ("neg.f32 %r20, %r10;", [F32([0, -2])], F32([-0.0, 2])),
    ("abs.ftz.f32 %r20, %r10;", [F32([-(2.0**-140), -2])], F32([0, 2])),
    # a NaN is dropped, unless .NaN asks for it
    ("min.f32 %r20, %r10, %r11;", [F32([NAN, 1]), F32([2, -1])], F32([2, -1])),
    ("max.NaN.f32 %r20, %r10, %r11;", [F32([NAN, 1]), F32([2, -1])], F32([NAN, 1])),
    ("add.sat.f32 %r20, %r10, %r11;", [F32([0.75, -1]), F32([0.5, 0.5])], F32([1, 0])),
    # the sign of the first on the second
    ("copysign.f32 %r20, %r10, %r11;", [F32([-1, 1]), F32([3, -3])], F32([-3, 3])),
    ("mul.bf16x2 %r20, %r10, %r11;", [U32([0x40003F80]), U32([0x40404040])], U32([0x40C04040])),
    ("add.f16x2 %r20, %r10, %r11;", [U32([0x40003C00]), U32([0x3C003C00])], U32([0x42004000])),
]

COMPARISON_AND_SELECTION = [
    ("setp.lt.s32 %p0, %r10, %r11; selp.b32 %r20, 1, 0, %p0;", [S32([-1, 2]), S32([1, 2])], U32([1, 0])),
    ("setp.lt.u32 %p0, %r10, %r11; selp.b32 %r20, 1, 0, %p0;", [S32([-1, 2]), S32([1, 3])], U32([0, 1])),
    # false of a NaN; true where the comparison is of the unordered
    ("setp.lt.f32 %p0, %r10, %r11; selp.b32 %r20, 1, 0, %p0;", [F32([NAN, 1]), F32([1, 2])], U32([0, 1])),
    ("setp.ne.f32 %p0, %r10, %r11; selp.b32 %r20, 1, 0, %p0;", [F32([NAN, 1]), F32([1, 2])], U32([0, 1])),
    ("setp.neu.f32 %p0, %r10, %r11; selp.b32 %r20, 1, 0, %p0;", [F32([NAN, 1]), F32([1, 1])], U32([1, 0])),
    ("setp.nan.f32 %p0, %r10, %r11; selp.b32 %r20, 1, 0, %p0;", [F32([NAN, 1]), F32([1, 1])], U32([1, 0])),
    # the second destination is the complement, of a packed comparison the upper half
    ("setp.ge.s32 %p0|%p1, %r10, 0; selp.b32 %r20, 1, 0, %p1;", [S32([-1, 1])], U32([1, 0])),
    ("setp.lt.bf16x2 %p0|%p1, %r10, 0; selp.b32 %r20, 1, 0, %p1;", [U32([0xBF803F80, 0x3F80BF80])], U32([1, 0])),
    ("setp.lt.and.s32 %p0, %r10, 5, %p1; selp.b32 %r20, 1, 0, %p0;", [S32([1, 9])], U32([0, 0])),
    ("mov.pred %p1, -1; setp.lt.and.s32 %p0, %r10, 5, !%p1; selp.b32 %r20, 1, 0, %p0;", [S32([1, 9])], U32([0, 0])),
    ("selp.f32 %r20, 0f3F800000, %r10, %p0;", [F32([7])], F32([7])),
]

MOVE_AND_CONVERT = [
    ("mov.b32 {%h0, %h1}, %r10; mov.b32 %r20, {%h1, %h0};", [U32([0x11112222])], U32([0x22221111])),
    ("mov.b64 %rd20, {%r10, %r11};", [U32([1]), U32([2])], U64([2 << 32 | 1])),
    ("cvt.s64.s32 %rd20, %r10;", [S32([-5])], S64([-5])),
    ("cvt.u64.u32 %rd20, %r10;", [S32([-5])], U64([2**32 - 5])),
    ("cvt.u32.u64 %r20, %rd10;", [U64([(7 << 32) + 9])], U32([9])),
    # sign-extended to the register, of 32 bits
    ("cvt.s8.s32 %r20, %r10;", [S32([0x1FF, 0x7F])], S32([-1, 0x7F])),
    ("cvt.rn.f32.s32 %r20, %r10;", [S32([-3, 2**24 + 1])], F32([-3, 2**24])),
    ("cvt.rzi.s32.f32 %r20, %r10;", [F32([-2.7, 1e20, NAN])], S32([-2, 2**31 - 1, 0])),
    ("cvt.rni.s32.f32 %r20, %r10;", [F32([2.5, 3.5])], S32([2, 4])),
    ("cvt.rmi.f32.f32 %r20, %r10;", [F32([-2.5, 3.5])], F32([-3, 3])),
    # the first source goes to the upper half; to nearest even
    ("cvt.rn.bf16x2.f32 %r20, %r10, %r11;", [F32([1]), F32([1 + 2**-8])], U32([0x3F803F80])),
    ("cvt.rn.bf16x2.f32 %r20, %r10, %r11;", [F32([NAN]), F32([1 + 3 * 2**-8])], U32([0x7FFF3F82])),
    ("cvt.rn.f16x2.f32 %r20, %r10, %r11;", [F32([2]), F32([1e6])], U32([0x40007C00])),
    ("mov.b32 {%h0, %h1}, %r10; cvt.f32.bf16 %r20, %h1;", [U32([0x3FC00000])], F32([1.5])),
    ("mov.b32 {%h0, %h1}, %r10; cvt.f32.f16 %r20, %h0;", [U32([0x00003E00])], F32([1.5])),
]

CASES = [
    *INTEGER_ARITHMETIC, *LOGIC_AND_SHIFT, *FLOATING_POINT, *COMPARISON_AND_SELECTION, *MOVE_AND_CONVERT,
]  # fmt: skip


@pytest.mark.parametrize(("body", "inputs", "expected"), CASES, ids=[case[0] for case in CASES])
def test_a_lane_by_itself(body: str, inputs: list[Any], expected: Any) -> None:
    result = by_lane(body, *inputs, kind=expected.dtype)[: len(expected)]
    np.testing.assert_array_equal(result, expected)
    if expected.dtype == F32:
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(result[number]), np.signbit(expected[number]))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # Data Movement: shfl.sync. By 31 limits of a segment of 32; a lane out of it keeps its own
        ("shfl.sync.bfly.b32 %r20, %r0, 2, 31, -1;", [lane ^ 2 for lane in range(32)]),
        ("shfl.sync.down.b32 %r20, %r0, 4, 31, -1;", [lane + 4 if lane < 28 else lane for lane in range(32)]),
        ("shfl.sync.up.b32 %r20, %r0, 4, 0, -1;", [lane - 4 if lane >= 4 else lane for lane in range(32)]),
        ("shfl.sync.idx.b32 %r20, %r0, 5, 31, -1;", [5] * 32),
        # segments of 8: their mask is 0b11000
        ("shfl.sync.idx.b32 %r20, %r0, 5, 0x181F, -1;", [lane // 8 * 8 + 5 for lane in range(32)]),
        (
            "shfl.sync.down.b32 %r1|%p0, %r0, 4, 31, -1; selp.b32 %r20, 1, 0, %p0;",
            [int(lane < 28) for lane in range(32)],
        ),
        # Parallel Synchronization: vote.sync, redux.sync, elect.sync
        ("setp.lt.u32 %p0, %r0, 5; vote.sync.ballot.b32 %r20, %p0, -1;", [0x1F] * 32),
        ("setp.lt.u32 %p0, %r0, 5; vote.sync.any.pred %p1, %p0, -1; selp.b32 %r20, 1, 0, %p1;", [1] * 32),
        ("setp.lt.u32 %p0, %r0, 5; vote.sync.all.pred %p1, %p0, -1; selp.b32 %r20, 1, 0, %p1;", [0] * 32),
        ("redux.sync.add.u32 %r20, %r0, -1;", [496] * 32),
        ("redux.sync.max.u32 %r20, %r0, -1;", [31] * 32),
        ("elect.sync %r1|%p0, -1; selp.b32 %r20, 1, 0, %p0;", [1] + [0] * 31),
        ("mov.u32 %r20, %laneid;", list(range(32))),
        ("mov.u32 %r20, %lanemask_lt;", [(1 << lane) - 1 for lane in range(32)]),
    ],
)
def test_a_warp_together(body: str, expected: list[int]) -> None:
    assert by_lane(body).tolist() == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # a branch that parts the lanes of a warp: both sides run, and meet behind
        (
            "setp.lt.u32 %p0, %r0, 7; @%p0 bra ONE; mov.u32 %r20, 20; bra.uni MEET; ONE: mov.u32 %r20, 10; "
            "MEET: add.u32 %r20, %r20, %r0;",
            [10 + lane if lane < 7 else 20 + lane for lane in range(40)],
        ),
        # as many rounds as the lane's number
        (
            "mov.u32 %r1, 0; mov.u32 %r20, 0; LOOP: add.u32 %r20, %r20, %r1; add.u32 %r1, %r1, 1; "
            "setp.le.u32 %p0, %r1, %r0; @%p0 bra LOOP;",
            [lane * (lane + 1) // 2 for lane in range(40)],
        ),
        # a loop in a branch in a loop; all lanes meet for the vote
        (
            "mov.u32 %r1, 0; mov.u32 %r20, 0; OUTER: and.b32 %r2, %r0, 1; setp.eq.u32 %p1, %r2, 0; @%p1 bra NEXT; "
            "mov.u32 %r3, 0; INNER: add.u32 %r20, %r20, 1; add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, %r1; @%p2 bra INNER; "
            "NEXT: vote.sync.ballot.b32 %r4, %p1, -1; add.u32 %r1, %r1, 1; setp.lt.u32 %p3, %r1, 3; @%p3 bra OUTER;",
            [(1 + 1 + 2) * (lane % 2) for lane in range(32)],
        ),
        # lanes that return early are not waited for
        ("mov.u32 %r20, %r0;", list(range(32))),
        # a scope's own register and label, inside braces
        ("mov.u32 %r20, 1; { .reg .b32 t; mov.u32 t, 2; bra.uni L; L: add.u32 %r20, %r20, t; } ", [3] * 32),
    ],
)
def test_control_flow(body: str, expected: list[int]) -> None:
    threads = -(-len(expected) // 32) * 32
    assert by_lane(body, threads=threads).tolist()[: len(expected)] == expected


def test_a_guard_keeps_the_other_lanes_as_they_are() -> None:
    body = "mov.u32 %r20, 5; setp.eq.u32 %p0, %r0, 3; @%p0 mov.u32 %r20, 6; @!%p0 add.u32 %r20, %r20, 0;"
    assert by_lane(body).tolist() == [6 if lane == 3 else 5 for lane in range(32)]


def test_special_registers_of_a_thread() -> None:
    assert by_lane("mov.u32 %r20, %warpid;", threads=64).tolist() == [0] * 32 + [1] * 32
    assert by_lane("mov.u32 %r20, %ntid.x;", threads=64).tolist() == [64] * 64


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.b32 %r20, %r0;",
        "add.cc.u32 %r20, %r0, %r0;",
        "cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f0;",
        "mov.u32 %r20, %clock;",
        "fma.rn.f64 %rd10, %rd10, %rd10, %rd10;",
        "atom.global.add.u32 %r20, [%rd0], %r0;",
        "shfl.sync.bfly.b64 %rd20, %rd0, 1, 31, -1;",
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd1, %rd2, 0, 0, %p0, 1, 1, 0, 0;",
    ],
)
def test_what_is_not_known_is_raised_with_its_text(body: str) -> None:
    with pytest.raises(Fault) as raised:
        by_lane(body)
    assert body.rstrip(";")[:40] in str(raised.value)
