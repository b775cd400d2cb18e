"""The machine under the interpreter of PTX: divergence, barriers, bounds, warps, and instructions one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ptx.checker import Checker
from ptx.machine import Options, launch
from ptx.memory import Memory
from ptx.text import DTYPE, UNSIGNED, WIDTH, Fault, Kernel, parse, ranks
from torch import Tensor

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n"
REGISTERS = ".reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<32>; .reg .f32 %f<8>; .reg .f64 %g<8>;"


def kernel(body: str, shared: str = "", params: int = 2) -> Kernel:
    """Return a kernel of 64-bit parameters %d1, %d2, ...; %r1 is the thread, %d9 four times it."""
    names = ", ".join(f".param .u64 p{i}" for i in range(1, params + 1))
    loads = "\n".join(f"ld.param.b64 %d{i}, [p{i}];" for i in range(1, params + 1))
    start = f"{loads}\nmov.u32 %r1, %tid.x;\nmul.wide.u32 %d9, %r1, 4;"
    text = f"{HEAD}.visible .entry k({names})\n{{\n{REGISTERS}\n{shared}\n{start}\n{body}\nret;\n}}\n"
    return parse(text)["k"]


def run(code: Kernel, *tensors: Tensor, grid: int = 1, block: int = 64, **options: Any) -> None:
    """Launch over tensors, which are the parameters."""
    memory = Memory()
    for i, tensor in enumerate(tensors):
        memory.add(tensor, f"tensor {i}")
    addresses = [tensor.data_ptr() for tensor in tensors]
    launch(code, grid, block, addresses, memory=memory, options=Options(**options))


STORE = "add.s64 %d10, %d1, %d9;\nst.global.b32 [%d10], %r2;"


def test_threads_part_and_meet_again() -> None:
    """A loop of as many rounds as the thread's number modulo 8, then a branch, then a barrier for all."""
    body = f"""
    and.b32 %r3, %r1, 7;
    mov.b32 %r2, 0;
$loop:
    setp.eq.s32 %p1, %r3, 0;
    @%p1 bra $done;
    add.s32 %r2, %r2, 10;
    add.s32 %r3, %r3, -1;
    bra $loop;
$done:
    setp.lt.s32 %p2, %r2, 40;
    @!%p2 bra $other;
    add.s32 %r2, %r2, 1;
$other:
    bar.sync 0;
    {STORE}"""
    out = torch.zeros(64, dtype=torch.int32)
    run(kernel(body, params=1), out)
    wanted = [10 * (i & 7) + (10 * (i & 7) < 40) for i in range(64)]
    assert out.tolist() == wanted


@pytest.mark.parametrize("order", [None, 0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_barrier_orders_shared_memory(order: int | None, seed: int) -> None:
    """Each thread reads the number of the thread on the other end of its block."""
    body = f"""
    mov.b32 %r4, buffer;
    shl.b32 %r5, %r1, 2;
    add.s32 %r6, %r4, %r5;
    st.shared.b32 [%r6], %r1;
    bar.sync 0;
    sub.s32 %r7, 63, %r1;
    mad.lo.s32 %r8, %r7, 4, %r4;
    ld.shared.b32 %r2, [%r8];
    {STORE}"""
    code = kernel(body, ".shared .align 16 .b8 buffer[256];", params=1)
    out, checker = torch.zeros(64, dtype=torch.int32), Checker()
    run(code, out, order=order, seed=seed, watchers=[checker])
    assert out.tolist() == list(range(63, -1, -1))
    assert checker.accesses > 0
    assert not checker.found


def test_a_missing_barrier_is_a_race() -> None:
    body = f"""
    mov.b32 %r4, buffer;
    shl.b32 %r5, %r1, 2;
    add.s32 %r6, %r4, %r5;
    st.shared.b32 [%r6], %r1;
    sub.s32 %r7, 63, %r1;
    mad.lo.s32 %r8, %r7, 4, %r4;
    ld.shared.b32 %r2, [%r8];
    {STORE}"""
    code = kernel(body, ".shared .align 16 .b8 buffer[256];", params=1)
    checker = Checker()
    run(code, torch.zeros(64, dtype=torch.int32), watchers=[checker])
    assert {kind for kind, *_ in checker.found} == {"race in shared memory: read after write"}


def test_unwritten_shared_memory_is_found() -> None:
    body = f"mov.b32 %r4, buffer;\nld.shared.b32 %r2, [%r4+128];\n{STORE}"
    checker = Checker()
    code = kernel(body, ".shared .align 16 .b8 buffer[256];", params=1)
    run(code, torch.zeros(64, dtype=torch.int32), watchers=[checker])
    assert {kind for kind, *_ in checker.found} == {"shared memory read before it was written"}


def test_two_blocks_that_write_one_place_race() -> None:
    body = "mov.u32 %r2, %ctaid.x;\nst.global.b32 [%d1], %r2;"
    checker = Checker()
    run(kernel(body, params=1), torch.zeros(1, dtype=torch.int32), grid=2, block=32, watchers=[checker])
    assert "race in global memory: two threads write" in {kind for kind, *_ in checker.found}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r2, [%d10+256];", r"out of bounds: ld.global.b32 .* 64 threads"),
        ("ld.global.b32 %r2, [%d10+-4];", "out of bounds: ld.global.b32"),
        ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d10];", "misaligned: ld.global.v4.b32"),
        ("mov.b32 %r4, 60;\nld.shared.b64 %d11, [%r4];", "misaligned: ld.shared.b64"),
        ("mov.b32 %r4, 64;\nld.shared.b32 %r2, [%r4];", "out of bounds: ld.shared.b32 .* 68 of 64 bytes"),
        ("vote.sync.all.pred %p1, %p2, -1;", "not implemented: vote.sync"),
    ],
)
def test_what_a_device_would_trap_on_is_a_fault(body: str, message: str) -> None:
    code = kernel(f"add.s64 %d10, %d1, %d9;\n{body}", ".shared .align 16 .b8 buffer[64];", params=1)
    with pytest.raises(Fault, match=message):
        run(code, torch.zeros(64, dtype=torch.int32))


def test_a_barrier_in_one_branch_is_a_fault() -> None:
    body = "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $skip;\nbar.sync 0;\n$skip:"
    with pytest.raises(Fault, match="a barrier that some threads of a block passed by returning"):
        run(kernel(body, params=1), torch.zeros(1, dtype=torch.int32))


def test_shuffles_exchange_lanes() -> None:
    for mode, by, clamp, other in (
        ("bfly", 1, 31, lambda lane: lane ^ 1),
        ("up", 3, 0, lambda lane: max(lane - 3, lane if lane < 3 else 0)),
        ("down", 2, 31, lambda lane: lane + 2 if lane < 30 else lane),
        ("idx", 5, 31, lambda lane: 5),
    ):
        out = torch.zeros(64, dtype=torch.int32)
        body = f"shfl.sync.{mode}.b32 %r2|%p1, %r1, {by}, {clamp}, -1;\n{STORE}"
        run(kernel(body, params=1), out)
        assert out.tolist() == [i // 32 * 32 + other(i % 32) for i in range(64)], mode


def test_a_shuffle_waits_for_the_lanes_of_its_warp() -> None:
    """Half of a warp takes a longer way to the same shuffle."""
    body = f"""
    mov.b32 %r3, %r1;
    setp.lt.s32 %p1, %r1, 16;
    @%p1 bra $meet;
    add.s32 %r3, %r3, 100;
$meet:
    shfl.sync.bfly.b32 %r2, %r3, 16, 31, -1;
    {STORE}"""
    out = torch.zeros(32, dtype=torch.int32)
    run(kernel(body, params=1), out, block=32)
    assert out.tolist() == [i + 16 + 100 for i in range(16)] + list(range(16))


def test_parameters_have_their_offsets() -> None:
    params = ".param .u64 .ptr .align 16 a, .param .f32 b, .param .align 8 .b8 c[24], .param .u8 d"
    code = parse(f"{HEAD}.visible .entry k({params})\n{{\nret;\n}}\n")["k"]
    assert code.params == [("a", 0, 8), ("b", 8, 4), ("c", 16, 24), ("d", 40, 1)]


def test_blocks_are_ordered_with_loops_before_their_exits() -> None:
    """The latch of the loop stands before its body, as LLVM writes it."""
    code = kernel("bra $body;\n$latch:\nadd.s32 %r2, %r2, 1;\n$body:\nsetp.lt.s32 %p1, %r2, 3;\n@%p1 bra $latch;")
    rank = ranks(code)
    labels = {ins.op: ins.index for ins in code.code}
    assert rank[labels["add.s32"]] < rank[labels["ret"]]


# --- instructions one by one ------------------------------------------------------------------------------------------

SHIFTED = ("b32", "b64", "s32", "u32", "s64", "u64")  # shl takes bits alone
INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
EDGES = [
    0,
    1,
    2,
    3,
    7,
    31,
    32,
    63,
    64,
    -1,
    -2,
    -32,
    1 << 15,
    (1 << 15) - 1,
    1 << 31,
    (1 << 31) - 1,
    1 << 62,
    -(1 << 63),
]


def wrap(value: int, kind: str) -> int:
    """Return an integer as the type holds it."""
    bits = 8 * WIDTH[kind]
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def results(ops: str, kinds: tuple[str, ...], columns: list[list[int]], out: str) -> list[int]:
    """Return the bits that an instruction gives for rows of operands; `ops` names %o, %a, %b, %c."""
    n = -(-len(columns[0]) // 32) * 32
    bank = {1: "%b8_", 2: "%h", 4: "%r1", 8: "%d1"}
    places, text = {}, []
    tensors = [torch.zeros(n * 8, dtype=torch.uint8)]
    for i, (kind, column) in enumerate(zip(kinds, columns, strict=True)):
        width = WIDTH[kind]
        bits = np.array([value & ((1 << 8 * width) - 1) for value in column] + [1] * (n - len(column)), UNSIGNED[width])
        tensors.append(torch.from_numpy(bits.view(np.uint8).copy()))
        places["%" + "abc"[i]] = f"{bank[width]}{i + 1}"
        text.append(
            f"mad.wide.u32 %d20, %r1, {width}, %d{i + 2};\nld.global.b{8 * width} {places['%' + 'abc'[i]]}, [%d20];"
        )
    places["%o"] = "%p1" if out == "pred" else f"{bank[WIDTH[out]]}7"
    for name, register in places.items():
        ops = ops.replace(name, register)
    if out == "pred":
        ops += "\nselp.b32 %r17, 1, 0, %p1;"
    stored = "b32 [%d21], %r17" if out == "pred" else f"b{8 * WIDTH[out]} [%d21], {places['%o']}"
    body = "\n".join([*text, ops, "mad.wide.u32 %d21, %r1, 8, %d1;", f"st.global.{stored};"])
    run(kernel(body, params=len(tensors)), *tensors, block=n)
    width = 4 if out == "pred" else WIDTH[out]
    rows = tensors[0].numpy().reshape(n, 8)[: len(columns[0]), :width].copy()
    return rows.view(UNSIGNED[width])[:, 0].tolist()


def toward_zero(x: int, y: int) -> int:
    """Return x / y as C divides."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


BINARY: dict[str, Callable[[int, int, str], int]] = {
    "add": lambda x, y, kind: x + y,
    "sub": lambda x, y, kind: x - y,
    "mul.lo": lambda x, y, kind: x * y,
    "mul.hi": lambda x, y, kind: (x * y) >> (8 * WIDTH[kind]),
    "min": lambda x, y, kind: min(x, y),
    "max": lambda x, y, kind: max(x, y),
    "div": lambda x, y, kind: toward_zero(x, y),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in BINARY for kind in INTEGERS if name != "mul.hi" or WIDTH[kind] > 2]
)
def test_integer_arithmetic(name: str, kind: str) -> None:
    pairs = [(wrap(x, kind), wrap(y, kind)) for x in EDGES for y in EDGES]
    pairs = [(x, y) for x, y in pairs if name != "div" or (y != 0 and (x, y) != (wrap(-(1 << 63), kind), -1))]
    found = results(f"{name}.{kind} %o, %a, %b;", (kind, kind), [list(c) for c in zip(*pairs, strict=True)], kind)
    assert found == [BINARY[name](x, y, kind) & ((1 << 8 * WIDTH[kind]) - 1) for x, y in pairs]


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_products(kind: str) -> None:
    wide = kind[0] + "64"
    rows = [(wrap(x, kind), wrap(y, kind), wrap(z, wide)) for x in EDGES[::2] for y in EDGES[1::2] for z in EDGES[::5]]
    columns = [list(column) for column in zip(*rows, strict=True)]
    found = results(f"mad.wide.{kind} %o, %a, %b, %c;", (kind, kind, wide), columns, wide)
    assert found == [(x * y + z) & ((1 << 64) - 1) for x, y, z in rows]


@pytest.mark.parametrize(
    ("name", "kind"), [(f"sh{way}", kind) for way in "lr" for kind in SHIFTED if way == "r" or kind[0] == "b"]
)
def test_shifts_beyond_the_width_are_0_or_the_sign(name: str, kind: str) -> None:
    bits, typed = 8 * WIDTH[kind], kind if kind[0] == "s" else "u" + kind[1:]
    pairs = [(wrap(x, typed), y) for x in EDGES for y in (0, 1, 5, bits - 1, bits, bits + 1, 200, 2**32 - 1)]
    found = results(f"{name}.{kind} %o, %a, %b;", (typed, "u32"), [list(c) for c in zip(*pairs, strict=True)], typed)
    wanted = [x << y if name == "shl" and y < bits else 0 if name == "shl" else x >> min(y, bits) for x, y in pairs]
    assert found == [value & ((1 << bits) - 1) for value in wanted]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind: str) -> None:
    bits = 8 * WIDTH[kind]
    rows = [(wrap(x, kind), p, n) for x in EDGES for p in (0, 1, 4, bits - 1) for n in (0, 1, 8, bits - 4, bits)]
    found = results(
        f"bfe.{kind} %o, %a, %b, %c;", (kind, "u32", "u32"), [list(c) for c in zip(*rows, strict=True)], kind
    )

    def field(x: int, position: int, length: int) -> int:
        """The manual's definition, bit by bit: beyond the field, and beyond the operand, stands the sign."""
        sign = (x >> min(position + length - 1, bits - 1)) & 1 if kind[0] == "s" and length else 0
        inside = [i < length and position + i < bits for i in range(bits)]
        return sum(((x >> (position + i)) & 1 if inside[i] else sign) << i for i in range(bits))

    assert found == [field(*row) for row in rows]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16"])
@pytest.mark.parametrize("name", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_integer_comparisons(name: str, kind: str) -> None:
    pairs = [(wrap(x, kind), wrap(y, kind)) for x in EDGES for y in EDGES]
    found = results(
        f"setp.{name}.{kind} %o, %a, %b;", (kind, kind), [list(c) for c in zip(*pairs, strict=True)], "pred"
    )
    assert found == [int(getattr(x, f"__{name}__")(y)) for x, y in pairs]


FLOATS = np.array([0.0, -0.0, 1.0, -1.5, 3e38, 1e-40, -1e-45, np.inf, -np.inf, np.nan, 2.0**-126], np.float32)


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_float_comparisons_beside_nan(name: str) -> None:
    pairs = [(x, y) for x in FLOATS for y in FLOATS]
    columns = [[int(v.view(np.uint32)) for v in column] for column in zip(*pairs, strict=True)]
    found = results(f"setp.{name}.f32 %o, %a, %b;", ("f32", "f32"), columns, "pred")
    unordered = [bool(np.isnan(x) or np.isnan(y)) for x, y in pairs]
    if name in ("num", "nan"):
        assert found == [int(u == (name == "nan")) for u in unordered]
        return
    ordered = [bool(getattr(float(x), f"__{name[:2]}__")(float(y))) for x, y in pairs]
    assert found == [int(name.endswith("u") if u else o) for u, o in zip(unordered, ordered, strict=True)]


@pytest.mark.parametrize("name", ["max", "min", "max.NaN", "min.NaN"])
def test_maxima_beside_nan(name: str) -> None:
    pairs = [(x, y) for x in FLOATS for y in FLOATS]
    columns = [[int(v.view(np.uint32)) for v in column] for column in zip(*pairs, strict=True)]
    found = np.array(results(f"{name}.f32 %o, %a, %b;", ("f32", "f32"), columns, "f32"), np.uint32).view(np.float32)
    function = {"max": np.fmax, "min": np.fmin, "max.NaN": np.maximum, "min.NaN": np.minimum}[name]
    np.testing.assert_array_equal(found, [function(x, y) for x, y in pairs])


@pytest.mark.parametrize("name", ["max", "min", "max.NaN", "min.NaN"])
def test_maxima_of_three(name: str) -> None:
    triples = [(x, y, z) for x in FLOATS for y in FLOATS for z in FLOATS]
    columns = [[int(v.view(np.uint32)) for v in column] for column in zip(*triples, strict=True)]
    kinds = ("f32", "f32", "f32")
    found = np.array(results(f"{name}.f32 %o, %a, %b, %c;", kinds, columns, "f32"), np.uint32).view(np.float32)
    function = {"max": np.fmax, "min": np.fmin, "max.NaN": np.maximum, "min.NaN": np.minimum}[name]
    np.testing.assert_array_equal(found, [function(function(x, y), z) for x, y, z in triples])


def test_an_operand_that_nothing_reads_is_a_fault() -> None:
    with pytest.raises(Fault, match=r"not implemented: add\.rn\.f32 with the operands %r13 of"):
        results("add.rn.f32 %o, %a, %b, %c;", ("f32", "f32", "f32"), [[0], [0], [0]], "f32")
    with pytest.raises(Fault, match=r"not implemented: add\.s32 with the operands %r13 of"):
        results("add.s32 %o, %a, %b, %c;", ("u32", "u32", "u32"), [[0], [0], [0]], "u32")


@pytest.mark.parametrize("target", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("source", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_conversions_of_integers(source: str, target: str) -> None:
    values = [wrap(x, source) for x in EDGES]
    held = target if WIDTH[target] > 1 else target[0] + "16"  # 8 bits live in registers of 16
    found = results(f"cvt.{target}.{source} %o, %a;", (source,), [values], held)
    wanted = [wrap(value, target) & ((1 << 8 * WIDTH[held]) - 1) for value in values]
    assert found == wanted


@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
def test_conversions_of_floats_to_integers(rounding: str) -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3e9, -3e9, np.nan, np.inf, 7.0], np.float32)
    found = results(f"cvt.{rounding}.s32.f32 %o, %a;", ("f32",), [[int(v.view(np.uint32)) for v in values]], "s32")
    move = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    clipped = np.clip(np.nan_to_num(move(values.astype(np.float64)), nan=0.0), -(2.0**31), 2.0**31 - 1)
    assert found == [int(v) & 0xFFFFFFFF for v in clipped]


def test_packed_halves() -> None:
    values = np.array([1.0, -2.5, 3.14159, 65504.0], np.float32)
    columns = [[int(v.view(np.uint32)) for v in values], [int(v.view(np.uint32)) for v in values[::-1]]]
    for kind, half in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
        found = results(f"cvt.rn.{kind}.f32 %o, %a, %b;", ("f32", "f32"), columns, "b32")
        bits = torch.from_numpy(values).to(half).view(torch.int16).numpy().view(np.uint16).astype(int)
        assert found == [int(high) << 16 | int(low) for high, low in zip(bits, bits[::-1], strict=True)]


def test_moves_pack_and_unpack() -> None:
    numbers = [0x12345678, 0xFFFF0001]
    found = results("mov.b32 {%h3, %h4}, %a;\nmov.b32 %o, {%h4, %h3};", ("u32",), [numbers], "u32")
    assert found == [0x56781234, 0x0001FFFF]


def test_every_kind_of_register_has_a_width() -> None:
    assert {kind: np.dtype(dtype).itemsize for kind, dtype in DTYPE.items()} == WIDTH
