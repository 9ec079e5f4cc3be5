"""Matrices of a warp and of a warpgroup, from the figures of the PTX ISA: who holds what, and when it is there."""

from typing import Any

import numpy as np
import pytest

from ptx.faults import Fault
from ptx.formats import from_half, to_half
from ptx.small import aligned, run

U16, U32, F32 = np.uint16, np.uint32, np.float32
KINDS = ("bf16", "f16")


def halves(values: Any, kind: str) -> Any:
    return to_half(np.asarray(values, F32), kind)


# ---- Warp-level matrix instructions: ldmatrix, stmatrix


def fragment(matrix: Any, lane: int) -> int:
    """The word of an 8 x 8 matrix that a lane holds: row lane / 4, columns 2 (lane % 4) and the next."""
    row, column = lane // 4, lane % 4 * 2
    return int(matrix[row, column]) | int(matrix[row, column + 1]) << 16


STAGE = "mad.lo.u32 %r2, %r0, 16, 0; mad.wide.u32 %rd5, %r0, 16, %rd0; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd5]; " \
        "st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7}; bar.sync 0; "  # fmt: skip
RESULT = "mad.wide.u32 %rd6, %r0, 16, %rd1; st.global.v4.b32 [%rd6], {%r10, %r11, %r12, %r13};"


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_deals_rows_that_lanes_point_to(transposed: bool) -> None:
    """Lanes 0 to 7 point to the rows of the first matrix, 8 to 15 of the second: here in reverse, of 32 rows of 8."""
    rows = aligned(np.arange(256, dtype=U16).reshape(32, 8))
    out = aligned(np.zeros((32, 4), U32))
    trans = ".trans" if transposed else ""
    body = STAGE + (
        "sub.u32 %r3, 31, %r0; mad.lo.u32 %r3, %r3, 16, 0; "
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r3]; " + RESULT
    )
    run(body, [rows], [out], shared=512)
    for number in range(4):
        matrix = rows[::-1][8 * number : 8 * number + 8]
        matrix = matrix.T if transposed else matrix
        assert out[:, number].tolist() == [fragment(matrix, lane) for lane in range(32)]


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_the_way_back(transposed: bool) -> None:
    words = aligned(np.arange(32, dtype=U32) * 0x10001 + 0x1000000)
    out = aligned(np.zeros((8, 8), U16))
    trans = ".trans" if transposed else ""
    body = (
        "mad.wide.u32 %rd5, %r0, 4, %rd0; ld.global.b32 %r4, [%rd5]; mad.lo.u32 %r3, %r0, 16, 0; "
        f"stmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 [%r3], {{%r4}}; bar.sync 0; "
        "mad.lo.u32 %r3, %r0, 4, 0; ld.shared.b32 %r4, [%r3]; mad.wide.u32 %rd5, %r0, 4, %rd1; st.global.b32 [%rd5], %r4;"
    )
    run(body, [words], [out], shared=128)
    matrix = out.T if transposed else out
    assert words.tolist() == [fragment(matrix, lane) for lane in range(32)]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r2+8];", "misaligned"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r2+512];", "out of bounds"),
        (
            "setp.lt.u32 %p0, %r0, 5; @%p0 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r2];",
            "divergent: ldmatrix",
        ),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r10}, [%r2];", "unknown instruction"),
    ],
)
def test_faults_of_ldmatrix(body: str, what: str) -> None:
    with pytest.raises(Fault, match=what):
        run(STAGE + body, [aligned(np.zeros(128, U32))], [], shared=512)


# ---- Warp-level matrix instructions: mma.m16n8k16


@pytest.mark.parametrize("kind", KINDS)
def test_mma_multiplies_fragments(kind: str) -> None:
    generator = np.random.default_rng(0)
    a, b = halves(generator.standard_normal((16, 16)), kind), halves(generator.standard_normal((16, 8)), kind)
    c = generator.standard_normal((16, 8)).astype(F32)
    registers = np.zeros((32, 12), U32)
    for lane in range(32):
        group, pair = lane // 4, lane % 4 * 2
        for number, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
            element = a[group + row, pair + column : pair + column + 2]
            registers[lane, number] = int(element[0]) | int(element[1]) << 16
        for number, row in enumerate([0, 8]):
            registers[lane, 4 + number] = int(b[pair + row, group]) | int(b[pair + row + 1, group]) << 16
        for number, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
            registers[lane, 6 + number] = c[group + row, pair + column].view(U32)
    out = aligned(np.zeros((32, 4), F32))
    body = (
        "mad.wide.u32 %rd5, %r0, 48, %rd0; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd5]; "
        "ld.global.v4.b32 {%r14, %r15, %r16, %r17}, [%rd5+16]; ld.global.v2.b32 {%r18, %r19}, [%rd5+32]; "
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}}, "
        "{%r14, %r15}, {%r16, %r17, %r18, %r19}; mad.wide.u32 %rd6, %r0, 16, %rd1; "
        "st.global.v4.b32 [%rd6], {%r20, %r21, %r22, %r23};"
    )
    counts = run(body, [aligned(registers)], [out])
    expected = from_half(a, kind).astype(np.float64) @ from_half(b, kind) + c
    found = np.zeros((16, 8), F32)
    for lane in range(32):
        for number, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
            found[lane // 4 + row, lane % 4 * 2 + column] = out[lane, number]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert counts["mma.sync"] == 1


# ---- Asynchronous warpgroup-level matrix instructions: wgmma

N, K = 16, 16
A_AT, B_AT = 0, 8192
SWIZZLES = {0: 0, 128: 1, 64: 2, 32: 3}
"""A matrix descriptor's number of a swizzle, by the bytes of its rows."""


def canonical(matrix: Any, span: int, across: bool) -> tuple[Any, int, int]:
    """A [rows, K] matrix of 16 bits as bytes in shared memory, and the leading and the stride byte offset.

    As the figures of the section "Shared memory matrix layout" draw it, element by element; swizzles permute 16-byte units
    by the number of the 128-byte line that they are in.
    """
    rows, depth = matrix.shape
    place = np.zeros(4096, U16)
    wide = (span or 16) // 2
    if across:  # MN-major: `wide` rows are neighbours; 8 of k are one atom
        leading = depth // 8 * wide * 16 if span else 128 * (rows // 8)
        stride = wide * 16 if span else 128
    else:  # K-major: 8 rows of `wide` are one atom
        leading, stride = (16, 8 * span) if span else (128, 256)
    for row in range(rows):
        for k in range(depth):
            if across and span:
                byte = row // wide * leading + k // 8 * stride + k % 8 * span + row % wide * 2
            elif across:
                byte = row // 8 * stride + k // 8 * leading + k % 8 * 16 + row % 8 * 2
            elif span:
                byte = row // 8 * stride + row % 8 * span + k * 2
            else:
                byte = row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
            if span:
                byte ^= (byte >> 7 & (span // 16 - 1)) << 4
            place[byte // 2] = matrix[row, k]
    return place, leading, stride


def descriptor(at: int, leading: int, stride: int, span: int) -> int:
    return at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[span] << 62


def product(
    a: str,
    b: int,
    *,
    kind: str = "bf16",
    across: str = "0, 0",
    adds: int = 0,
    fence: str = "fence.proxy.async.shared::cta;",
    wait: str = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
    after: str = "",
) -> str:
    """8192 bytes of A and B go to shared memory, 64 a thread; the accumulators of each thread come out."""
    stage = "".join(
        f"ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd5+{16 * i}]; st.shared.v4.b32 [%r2+{16 * i}], {{%r4, %r5, %r6, %r7}}; "
        for i in range(8)
    )
    registers = ", ".join(f"%f{i}" for i in range(N // 2))
    return (
        "mad.lo.u32 %r2, %r0, 128, 0; mad.wide.u32 %rd5, %r0, 128, %rd0; " + stage + fence + " bar.sync 0; "
        + "".join(f"mov.b32 %f{i}, 0f3F800000; " for i in range(N // 2))
        + "mad.wide.u32 %rd6, %r0, 32, %rd2; mad.wide.u32 %rd7, %r0, 16, %rd1; "
        "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd7]; "
        f"mov.b64 %rd8, {b}; setp.ne.u32 %p0, {adds}, 0; wgmma.fence.sync.aligned; {a} "
        f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.{kind}.{kind} {{{registers}}}, "
        + ("{%r10, %r11, %r12, %r13}" if not a else "%rd9") + f", %rd8, %p0, 1, 1, {across}; {wait} "
        + "".join(f"st.global.v4.b32 [%rd6+{16 * i}], {{%f{4 * i}, %f{4 * i + 1}, %f{4 * i + 2}, %f{4 * i + 3}}}; "
                  for i in range(N // 8)) + after
    )  # fmt: skip


def operands(span: int = 128, a_across: bool = False, b_across: bool = False, kind: str = "bf16") -> tuple[Any, ...]:
    generator = np.random.default_rng(1)
    a, b = (halves(generator.standard_normal((rows, K)), kind) for rows in (64, N))
    # a row of B across the sum has N elements
    b_span = min(span, 2 * N) if b_across else span
    place_a, leading_a, stride_a = canonical(a, span, a_across)
    place_b, leading_b, stride_b = canonical(b, b_span, b_across)
    memory = aligned(np.concatenate([place_a, place_b]))
    return a, b, memory, descriptor(A_AT, leading_a, stride_a, span), descriptor(B_AT, leading_b, stride_b, b_span)


def gathered(out: Any) -> Any:
    """Accumulators of 128 threads -> [64, N]: warp w has the rows from 16 w; of 8 columns a lane has two, in two rows."""
    found = np.zeros((64, N), F32)
    for thread in range(128):
        for number in range(N // 2):
            row = thread // 32 * 16 + thread % 32 // 4 + 8 * (number // 2 % 2)
            found[row, number // 4 * 8 + thread % 4 * 2 + number % 2] = out[thread, number]
    return found


def registers_of(a: Any) -> Any:
    """The fragment of A of each of 128 threads: a warp's 16 rows as in mma.m16n8k16."""
    words = np.zeros((128, 4), U32)
    for thread in range(128):
        row, pair = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        for number, (down, right) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
            element = a[row + down, pair + right : pair + right + 2]
            words[thread, number] = int(element[0]) | int(element[1]) << 16
    return words


def outputs() -> Any:
    return aligned(np.zeros((128, N // 2), F32))


@pytest.mark.parametrize("timing", ["late", "early", "random"])
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("across", [(False, False), (True, False), (False, True)])
def test_wgmma_multiplies_what_descriptors_name(span: int, across: tuple[bool, bool], timing: str) -> None:
    kind = "f16" if span == 64 else "bf16"
    a, b, memory, da, db = operands(span, *across, kind=kind)
    out, unused = outputs(), aligned(np.zeros((128, 4), U32))
    flags = ", ".join(str(int(one)) for one in across)
    body = product(f"mov.b64 %rd9, {da};", db, kind=kind, across=flags, adds=1)
    launch(body, memory, unused, out, timing=timing)
    expected = from_half(a, kind).astype(np.float64) @ from_half(b, kind).T + 1
    np.testing.assert_allclose(gathered(out), expected, atol=1e-4)


def launch(body: str, memory: Any, words: Any, out: Any, **options: Any) -> Any:
    return run(body, [memory, words], [out], threads=128, shared=16384, **options)


@pytest.mark.parametrize("together", [True, False])
def test_wgmma_takes_a_from_registers(together: bool) -> None:
    a, b, memory, _, db = operands()
    out = outputs()
    counts = launch(product("", db, across="0"), memory, aligned(registers_of(a)), out, together=together)
    np.testing.assert_allclose(gathered(out), from_half(a, "bf16").astype(float) @ from_half(b, "bf16").T, atol=1e-4)
    assert counts["wgmma"] == 1


@pytest.mark.parametrize("timing", ["late", "early"])
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"wait": "wgmma.commit_group.sync.aligned;"}, r"wgmma\.wait_group is missing"),
        (
            {"wait": "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"},
            r"wgmma\.wait_group is missing",
        ),
        ({"wait": "wgmma.wait_group.sync.aligned 0;"}, r"wgmma\.wait_group is missing"),
        ({"fence": ""}, r"missing fence\.proxy\.async"),
        (
            {"wait": "st.shared.b32 [%r2], 0; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"},
            "race: warp .* overwrites .* that a wgmma of warpgroup 0 read",
        ),
        (
            {
                "after": "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd8, %rd8, 0, 1, 1, 0, 0;"
            },
            "exits with a wgmma in flight",
        ),
        ({"after": "setp.lt.u32 %p1, %r0, 32; @%p1 bra E; wgmma.fence.sync.aligned; E: mov.u32 %r1, 0;"}, "deadlock"),
    ],
)
def test_faults_of_wgmma(options: dict[str, Any], what: str, timing: str) -> None:
    a, _, memory, _, db = operands()
    with pytest.raises(Fault, match=what):
        launch(product("", db, across="0", **options), memory, aligned(registers_of(a)), outputs(), timing=timing)


def test_products_of_a_group_follow_each_other() -> None:
    a, b, memory, _, db = operands()
    out = outputs()
    registers = ", ".join(f"%f{i}" for i in range(N // 2))
    again = (
        f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {{{registers}}}, "
        "{%r10, %r11, %r12, %r13}, %rd8, 1, 1, 1, 0; "
    )
    wait = again + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    for timing in ("late", "early"):
        launch(product("", db, across="0", wait=wait), memory, aligned(registers_of(a)), out, timing=timing)
        expected = 2 * from_half(a, "bf16").astype(float) @ from_half(b, "bf16").T
        np.testing.assert_allclose(gathered(out), expected, atol=1e-4)
