"""One closure per instruction: a NumPy operation on registers, for all threads of a batch at once.

A closure takes a mask of threads, or None where all of them run. Registers are arrays of one element per thread; an
operand is a view of one, or an array without dimensions for a constant. `FAMILIES` says which method builds what.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.arithmetic import (
    ROUND,
    bf16_to_f32,
    f32_to_bf16,
    flush,
    fma32,
    fma64,
    to_f32,
    to_integer,
    two_sum,
)
from ptx.text import DTYPE, F16, F32, F64, I32, I64, SIGNED, U16, U32, U64, UNSIGNED, WIDTH, Fault, Instruction
from ptx.text import split_operands as split

if TYPE_CHECKING:
    from ptx.machine import Machine

Step = Callable[[Any], None]
# Generic addresses of shared memory: the window, the rank of the block in its cluster, the offset.
SHARED_WINDOW = 1 << 56
RANK_SHIFT = 24
FLOATS = ("f16", "bf16", "f32", "f64")
# Bits compare and combine as unsigned integers.
BITS = {"b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64"}


class WarpIncomplete(Exception):
    """Some lanes of a warp have reached a warp instruction without the others: they wait."""


def assign(dst: np.ndarray, function: Callable[..., Any], *sources: np.ndarray) -> Step:
    """Return a step that writes function(*sources) to `dst`, for the threads of its mask."""
    if isinstance(function, np.ufunc):

        def run(mask: Any) -> None:
            function(*sources, out=dst, where=True if mask is None else mask, casting="unsafe")

    else:

        def run(mask: Any) -> None:
            result = function(*sources)
            if mask is None:
                dst[...] = result
            else:
                np.copyto(dst, result, where=mask, casting="unsafe")

    return run


# Operands that cannot matter here: how long a line stays in the cache, which lanes of a warp wait.
WITHOUT_EFFECT = ("createpolicy", "bar.warp.sync", "fence", "membar", "griddepcontrol")


class _Read(list[str]):
    """The operands of an instruction, which remember the ones that were looked at."""

    def __init__(self, operands: list[str]) -> None:
        super().__init__(operands)
        self.seen: set[int] = set()

    def __getitem__(self, key: Any) -> Any:
        places = range(len(self))[key]
        self.seen.update(places if isinstance(key, slice) else (places,))
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self[:])

    def __reversed__(self) -> Iterator[str]:
        return reversed(self[:])


def rounding_of(mods: list[str]) -> str:
    """Return the rounding mode among the modifiers, "rn" where there is none."""
    return next((mod for mod in mods if mod in ("rz", "rm", "rp")), "rn")


class Builder:
    """Turns the instructions of a kernel into steps over the registers of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.registers = machine.registers
        self.threads = machine.threads

    # --- operands

    def src(self, text: str, kind: str) -> np.ndarray:
        """Return a register's view or a constant, as an array of `kind`."""
        machine, dtype, width = self.machine, DTYPE[kind], WIDTH[kind]
        if text in self.registers:
            register = self.registers[text]
            # A wider register holds a narrower operand: the caller narrows it.
            return register.view(dtype) if register.dtype.itemsize == width else register
        if text in machine.specials:
            special = machine.specials[text]
            if width != 4:
                raise ValueError(text)
            return special.view(dtype)
        if text.startswith("0f"):
            bits = np.array(int(text[2:], 16), U32)
            return bits.view(F32).astype(F64) if dtype == F64 else bits.view(dtype)
        if text.startswith("0d"):
            bits = np.array(int(text[2:], 16), U64)
            return bits.view(F64).astype(F32) if kind == "f32" else bits.view(dtype)
        if text in machine.symbols:
            return np.array(machine.symbols[text], dtype)
        if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+U?", text):
            value = int(text.rstrip("U"), 0)
            return np.array(value & ((1 << 8 * width) - 1), UNSIGNED[width]).view(dtype)
        if text in ("true", "false"):
            return np.array(text == "true")
        # An extern array of shared memory has no size: it begins behind the static arrays.
        return np.array(machine.kernel.static_bytes, dtype)

    def dst(self, text: str, kind: str | None = None) -> np.ndarray:
        """Return the view of a register that results are written to."""
        register = self.registers[text]
        return register if kind is None or register.dtype == np.bool_ else register.view(DTYPE[kind])

    def address(self, text: str, kind: str) -> tuple[np.ndarray, int]:
        """Return the register and the offset of `[register+offset]`."""
        match = re.fullmatch(r"([%$\w.]+?)(?:\+(-?\d+))?", text.strip()[1:-1].replace(" ", ""))
        if match is None:
            raise ValueError(text)
        return self.src(match[1], kind), int(match[2] or 0)

    def compile(self, ins: Instruction) -> Step:
        """Return the step of an instruction, under its guard."""
        read = _Read(ins.operands)
        try:
            run = self.build(dataclasses.replace(ins, operands=read))
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise Fault(f"not implemented: {ins.op} {ins.operands} ({error!r})") from error
        left = [op for i, op in enumerate(ins.operands) if i not in read.seen]
        if left and not ins.op.startswith(WITHOUT_EFFECT) and "cache_hint" not in ins.op:
            raise Fault(f"not implemented: {ins.op} with the operands {', '.join(left)} of {', '.join(ins.operands)}")
        if ins.guard is None:
            return run
        negated = ins.guard.startswith("!")
        guard = self.registers[ins.guard.lstrip("!")]

        def guarded(mask: Any) -> None:
            taken = ~guard if negated else guard
            if mask is not None:
                taken = taken & mask
            if taken.all():
                run(None)
            elif taken.any():
                run(taken.copy() if taken is guard else taken)

        return guarded

    def build(self, ins: Instruction) -> Step:
        """Return the step of an instruction without its guard."""
        base, *mods, kind = ins.op.split(".") if "." in ins.op else (ins.op, "")
        if ins.op.startswith(("bar.warp.sync", "fence", "membar", "griddepcontrol")):
            return lambda mask: None  # lanes of a warp are in step, blocks in order
        if kind == "f32x2":
            return self.pairs(ins.operands, base)
        if base in ("add", "sub", "mul", "min", "max") and kind in ("f32", "f64"):
            return self.float_arithmetic(ins, base, mods, kind)
        if base not in FAMILIES:
            raise Fault(f"not implemented: {ins.op}")
        return FAMILIES[base](self, ins, base, mods, kind)

    # --- arithmetic

    def pairs(self, ops: list[str], base: str) -> Step:
        """sm_100: two float32 numbers in 64 bits."""
        views = []
        for op in ops:
            if op in self.registers:
                views.append(self.registers[op].view(F32))
            else:
                views.append(np.tile(self.src(op, "b64").reshape(1).view(F32), self.threads))
        function: Any = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fma32}[base]
        both = assign(views[0], function, *views[1:])
        return lambda mask: both(None if mask is None else np.repeat(mask, 2))

    def float_arithmetic(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        ops = ins.operands
        d, a, b = self.dst(ops[0], kind), self.src(ops[1], kind), self.src(ops[2], kind)
        mode = rounding_of(mods)
        if mode != "rn" and kind == "f32":
            if base == "mul":
                return assign(d, lambda x, y: to_f32(np.multiply(x, y, dtype=F64), F64(0) * x, mode), a, b)
            sign = -1 if base == "sub" else 1
            return assign(d, lambda x, y: to_f32(*two_sum(x.astype(F64), sign * np.asarray(y, F64)), mode), a, b)
        exact: dict[str, Any] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
        exact |= {"max": np.maximum, "min": np.minimum} if "NaN" in mods else {"max": np.fmax, "min": np.fmin}
        function = exact[base]
        # sm_100 has the max and the min of three numbers.
        rest = [self.src(op, kind) for op in ops[3:]] if base in ("max", "min") else []

        def joined(*values: Any) -> Any:
            return functools.reduce(function, values)

        if "ftz" in mods:
            return assign(d, lambda *values: flush(joined(*map(flush, values))), a, b, *rest)
        return assign(d, joined if rest else function, a, b, *rest)

    def integer_arithmetic(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        ops = ins.operands
        function = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[base]
        return assign(self.dst(ops[0], kind), function, self.src(ops[1], kind), self.src(ops[2], kind))

    def product(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        """Integer mul and mad: the low half, the high half, or the whole product."""
        ops = ins.operands
        a, b = self.src(ops[1], kind), self.src(ops[2], kind)
        if "wide" in mods:
            wide = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}[kind]
            dtype = DTYPE[wide]
            added = (self.src(ops[3], wide),) if base == "mad" else ()
            total = lambda x, y, *z: np.multiply(x, y, dtype=dtype) + (z[0] if z else dtype(0))  # noqa: E731
            return assign(self.dst(ops[0], wide), total, a, b, *added)
        d = self.dst(ops[0], kind)
        if "hi" in mods:
            return assign(d, _high_half(kind), a, b)
        if base == "mad":
            return assign(d, lambda x, y, z: x * y + z, a, b, self.src(ops[3], kind))
        return assign(d, np.multiply, a, b)

    def fused(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        d = self.dst(ins.operands[0], kind)
        a, b, c = (self.src(op, kind) for op in ins.operands[1:4])
        mode = rounding_of(mods)
        if kind == "f64":
            return assign(d, fma64, a, b, c)
        if mode != "rn":
            return assign(
                d, lambda x, y, z: to_f32(*two_sum(np.multiply(x, y, dtype=F64), np.asarray(z, F64)), mode), a, b, c
            )
        if "ftz" in mods:
            return assign(d, lambda x, y, z: flush(fma32(flush(x), flush(y), flush(z))), a, b, c)
        return assign(d, fma32, a, b, c)

    def sign(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        function = np.negative if base == "neg" else np.abs
        d, a = self.dst(ins.operands[0], kind), self.src(ins.operands[1], kind)
        return assign(d, (lambda x: flush(function(x))) if "ftz" in mods else function, a)

    def division(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        d, a, b = (self.dst(ins.operands[0], kind), *(self.src(op, kind) for op in ins.operands[1:3]))
        if "full" in mods or "approx" in mods:
            return assign(d, self.machine.options.approximate.divide, a, b)
        return assign(d, np.divide if kind in ("f32", "f64") else _quotient, a, b)

    def function(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        """ex2, lg2, tanh, rcp, sqrt, rsqrt."""
        d, a = self.dst(ins.operands[0], kind), self.src(ins.operands[1], kind)
        if "approx" not in mods:
            return assign(d, {"sqrt": np.sqrt, "rcp": np.reciprocal}[base], a)
        if kind == "f64":
            if base != "rcp":
                raise Fault(f"not implemented: {ins.op}")
            # The upper half of the bits of the result.
            return assign(d, lambda x: ((1 / x).view(U64) & U64(0xFFFFFFFF00000000)).view(F64), a)
        approximate = getattr(self.machine.options.approximate, base)
        return assign(d, (lambda x: flush(approximate(flush(x)))) if "ftz" in mods else approximate, a)

    # --- bits, comparisons, conversions

    def logic(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        kind = BITS.get(kind, kind)
        names = {"and": "and", "or": "or", "xor": "xor", "not": "not"}
        prefix = "logical_" if kind == "pred" else "bitwise_"
        function = np.invert if base == "not" and kind != "pred" else getattr(np, prefix + names[base])
        return assign(self.dst(ins.operands[0], kind), function, *(self.src(op, kind) for op in ins.operands[1:]))

    def shift(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        """Shifts by the width or more give 0, or the sign."""
        typed = kind if kind[0] == "s" else "u" + kind[1:]
        d, a, b = self.dst(ins.operands[0], typed), self.src(ins.operands[1], typed), self.src(ins.operands[2], "u32")
        dtype, bits = DTYPE[typed], 8 * WIDTH[typed]
        move = np.left_shift if base == "shl" else np.right_shift

        def shifted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            most = np.minimum(y, U32(bits - 1)).astype(dtype)
            result = move(x, most)
            beyond = y >= U32(bits)
            return result if typed[0] == "s" and base == "shr" else np.where(beyond, dtype(0), result)

        return assign(d, shifted, a, b)

    def bit_field(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        ops = ins.operands
        bits, dtype = 8 * WIDTH[kind], DTYPE[kind]

        def extract(x: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
            first = position & U32(255)
            size = np.minimum(length & U32(255), bits).astype(dtype)
            ones = np.where(size < bits, (dtype(1) << size) - dtype(1), ~dtype(0))
            field = np.where(first < bits, x >> np.minimum(first, bits - 1).astype(dtype), dtype(0)) & ones
            if kind[0] == "u":
                return field
            last = np.minimum(first.astype(I64) + size.astype(I64) - 1, bits - 1).clip(0).astype(dtype)
            return np.where(((x >> last) & dtype(1) == 1) & (size > 0), field | ~ones, field)

        sources = (self.src(ops[1], kind), self.src(ops[2], "u32"), self.src(ops[3], "u32"))
        return assign(self.dst(ops[0], kind), extract, *sources)

    def population(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        a = self.src(ins.operands[1], "u" + kind[1:])
        return assign(self.dst(ins.operands[0], "u32"), lambda x: np.bitwise_count(x).astype(U32), a)

    def comparison(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        if len(mods) > 1 and mods[1] in ("and", "or", "xor"):
            raise Fault(f"not implemented: {ins.op}")
        kind = BITS.get(kind, kind)
        function = _compare(mods[0], kind in FLOATS)
        before = bf16_to_f32 if kind == "bf16" else flush if "ftz" in mods else None
        if before is not None:
            plain = function
            function = lambda x, y: plain(before(x), before(y))  # noqa: E731
        a, b = (self.src(op, kind) for op in ins.operands[1:3])
        return assign(self.dst(ins.operands[0]), function, a, b)

    def selection(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        kind, ops = BITS.get(kind, kind), ins.operands
        sources = (self.src(ops[3], "pred"), self.src(ops[1], kind), self.src(ops[2], kind))
        return assign(self.dst(ops[0], kind), np.where, *sources)

    def conversion(self, ins: Instruction, base: str, mods: list[str], source_kind: str) -> Step:
        ops, kind, mods = ins.operands, mods[-1], mods[:-1]
        if kind in ("bf16x2", "f16x2"):
            half = f32_to_bf16 if kind == "bf16x2" else lambda x: np.asarray(x).astype(F16).view(U16)
            both = lambda x, y: (half(x).astype(U32) << U32(16)) | half(y)  # noqa: E731
            return assign(self.dst(ops[0], "u32"), both, *(self.src(op, "f32") for op in ops[1:3]))
        convert, register = _converter(kind, source_kind, mods), self.registers[ops[0]]
        source = self.src(ops[1], source_kind)
        if register.dtype.itemsize == WIDTH[kind]:
            return assign(register.view(DTYPE[kind]), convert, source)
        wide: Any = SIGNED[register.dtype.itemsize] if kind[0] == "s" else register.dtype
        return assign(register.view(wide), lambda x: convert(x).astype(wide), source)

    def address_conversion(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        d, a = self.dst(ins.operands[0], "u64"), self.src(ins.operands[1], "u64")
        if "to" in mods and "global" not in mods:
            raise Fault(f"not implemented: {ins.op}")
        if "shared" in mods:
            own = U64(SHARED_WINDOW) + (self.machine.cluster_rank.astype(U64) << U64(RANK_SHIFT))
            return assign(d, lambda x: x + own, a)
        return assign(d, np.positive, a)

    def remote_address(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        """mapa: the same offset in the shared memory of another block of the cluster."""
        a, rank = self.src(ins.operands[1], "u64"), self.src(ins.operands[2], "u32")
        offset = U64((1 << RANK_SHIFT) - 1)
        place = lambda x, y: U64(SHARED_WINDOW) + (x & offset) + (y.astype(U64) << U64(RANK_SHIFT))  # noqa: E731
        return assign(self.dst(ins.operands[0], "u64"), place, a, rank)

    def move(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        kind, ops = BITS.get(kind, kind), ins.operands
        if ops[0].startswith("{"):
            return self.unpack(split(ops[0][1:-1]), self.src(ops[1], kind), WIDTH[kind])
        if ops[1].startswith("{"):
            return self.pack(self.dst(ops[0], kind), split(ops[1][1:-1]), kind)
        d, a = self.dst(ops[0], kind), self.src(ops[1], kind)
        if d.dtype == np.bool_:
            return assign(d, np.not_equal, a, np.zeros((), a.dtype))
        return lambda mask: np.copyto(d, a, where=True if mask is None else mask)

    def unpack(self, names: list[str], whole: np.ndarray, width: int) -> Step:
        part = width // len(names)
        pieces = [(self.registers[name], i) for i, name in enumerate(names) if name != "_"]

        def run(mask: Any) -> None:
            columns = np.broadcast_to(whole, self.threads).copy().view(UNSIGNED[part]).reshape(self.threads, -1)
            for register, i in pieces:
                np.copyto(register, columns[:, i], where=True if mask is None else mask)

        return run

    def pack(self, dst: np.ndarray, names: list[str], kind: str) -> Step:
        part, dtype = WIDTH[kind] // len(names), DTYPE[kind]

        def whole(*pieces: np.ndarray) -> np.ndarray:
            total = np.asarray(pieces[0]).astype(dtype)
            for i, piece in enumerate(pieces[1:], 1):
                total = total | (np.asarray(piece).astype(dtype) << dtype(8 * part * i))
            return total

        return assign(dst, whole, *(self.src(name, f"u{8 * part}") for name in names))

    def policy(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        """createpolicy: caches are not modelled."""
        return assign(self.dst(ins.operands[0], "u64"), lambda: U64(0))

    # --- warps

    def whole_warps(self, mask: Any) -> None:
        """Raise where lanes of a warp are missing: the kernels name all of them."""
        if mask is not None:
            here = mask.reshape(-1, 32)
            if (here.any(1) & ~here.all(1)).any():
                raise WarpIncomplete

    def all_lanes(self, ins: Instruction, members: np.ndarray, mask: Any) -> None:
        """Refuse an exchange between some lanes of a warp."""
        if not ((members if mask is None or members.ndim == 0 else members[mask]) == -1).all():
            raise Fault(f"not implemented: {ins.op} between some lanes")
        self.whole_warps(mask)

    def shuffle(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        ops, machine = ins.operands, self.machine
        names = [name.strip() for name in ops[0].split("|")]
        d, inside_register = self.dst(names[0], "u32"), self.registers[names[1]] if len(names) > 1 else None
        a, b, c = (self.src(op, "u32") for op in ops[1:4])
        members, mode = self.src(ops[4], "s32"), mods[1]

        def run(mask: Any) -> None:
            self.all_lanes(ins, members, mask)
            by, clamp, segment = (
                (b & U32(31)).astype(I64),
                (c & U32(31)).astype(I64),
                ((c >> U32(8)) & U32(31)).astype(I64),
            )
            lane = machine.lane
            low = lane & segment
            high = low | (clamp & ~segment)
            other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment)}[mode]
            inside = other >= high if mode == "up" else other <= high
            result = np.broadcast_to(a, self.threads)[machine.warp * 32 + np.where(inside, other, lane)]
            where = True if mask is None else mask
            np.copyto(d, result, where=where)
            if inside_register is not None:
                np.copyto(inside_register, inside, where=where)

        return run

    def reduction(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        """redux.sync over the lanes of a warp."""
        d, a, members = (
            self.dst(ins.operands[0], kind),
            self.src(ins.operands[1], kind),
            self.src(ins.operands[2], "s32"),
        )
        if kind == "f32":
            # NaN counts only where it is asked for.
            function: Any = (
                {"min": np.minimum, "max": np.maximum} if "NaN" in mods else {"min": np.fmin, "max": np.fmax}
            )
            function = function["max" if "max" in mods else "min"]
        else:
            table = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
            function = table[mods[-1]]

        def run(mask: Any) -> None:
            self.all_lanes(ins, members, mask)
            values = np.broadcast_to(a, self.threads).reshape(-1, 32)
            values = np.abs(values) if "abs" in mods else values
            result = np.repeat(function.reduce(values, axis=1, dtype=a.dtype), 32)
            np.copyto(d, result, where=True if mask is None else mask)

        return run

    def matrix(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        """ldmatrix and stmatrix: 8 x 8 matrices of 16 bits; lane 8 i + r has the address of row r of matrix i."""
        machine, loads = self.machine, base == "ldmatrix"
        text, place = ins.operands if loads else reversed(ins.operands)
        registers = [self.registers[name] for name in split(text[1:-1])]
        address, offset = self.address(place, "u32")
        lane = machine.lane
        # Lane l holds row l / 4, columns 2 (l % 4) and the next; transposed column l / 4, rows 2 (l % 4) and the next.
        if "trans" in mods:
            pieces = [(2 * (lane % 4) + j, 2 * (lane // 4)) for j in (0, 1)]
        else:
            pieces = [(lane // 4, 4 * (lane % 4) + 2 * j) for j in (0, 1)]

        def run(mask: Any) -> None:
            self.whole_warps(mask)
            taken = np.ones(self.threads, bool) if mask is None else mask
            threads = np.flatnonzero(taken)
            rows = np.broadcast_to(address, self.threads).astype(I64) + offset
            for i, register in enumerate(registers):
                halves = register.view(U16).reshape(-1, 2)
                for j, (row, column) in enumerate(pieces):
                    where = (rows[machine.warp * 32 + 8 * i + row] + column)[taken]
                    values = None if loads else [halves[:, j]]
                    owner = machine.cta[threads]
                    found = machine.accesses.shared(where, owner, threads, 2, 1, ins, mask, values)
                    if loads:
                        halves[taken, j] = found[0]

        return run

    # --- memory

    def memory(self, ins: Instruction, base: str, mods: list[str], kind: str) -> Step:
        loads = base == "ld"
        spaces = ("global", "shared", "shared::cta", "shared::cluster", "param", "local", "const")
        space = next((mod for mod in mods if mod in spaces), "generic").removesuffix("::cta")
        if space in ("shared::cluster", "local", "const"):
            raise Fault(f"not implemented: {ins.op}")
        value, place = ins.operands[:2] if loads else reversed(ins.operands[:2])
        names = split(value[1:-1]) if value.startswith("{") else [value]
        if space == "param":
            return self.parameter(ins, [self.registers[name] for name in names], kind)
        address, offset = self.address(place, "u32" if space == "shared" and self.is_32_bits(place) else "u64")
        width, machine = WIDTH[kind], self.machine
        if not loads:
            sources = [self.src(name, f"u{8 * width}") for name in names]

            def store(mask: Any) -> None:
                where = np.broadcast_to(address, self.threads).astype(I64) + offset
                values = [np.broadcast_to(source, self.threads) for source in sources]
                machine.accesses.access(space, where, width, len(names), mask, ins, values)

            return store
        targets = [None if name == "_" else self.registers[name] for name in names]

        def load(mask: Any) -> None:
            where = np.broadcast_to(address, self.threads).astype(I64) + offset
            columns = machine.accesses.access(space, where, width, len(names), mask, ins, None)
            for target, column in zip(targets, columns, strict=True):
                if target is not None:
                    target[... if mask is None else mask] = _extended(column, kind, target).astype(target.dtype)

        return load

    def is_32_bits(self, place: str) -> bool:
        register = self.registers.get(re.split(r"[+\s]", place.strip()[1:-1].strip())[0])
        return register is None or register.dtype.itemsize == 4

    def parameter(self, ins: Instruction, targets: list[np.ndarray], kind: str) -> Step:
        """ld.param; its address may be computed, as for an array in a structure."""
        address, offset = self.address(ins.operands[1], "u64")
        width, params = WIDTH[kind], self.machine.params

        def load(mask: Any) -> None:
            where = np.broadcast_to(address, self.threads).astype(I64) + offset
            for i, target in enumerate(targets):
                start = where + i * width
                start = start if mask is None else np.where(mask, start, 0)
                if start.min() < 0 or start.max() + width > len(params):
                    raise Fault(f"out of bounds of the parameters: {ins}")
                value = np.stack([params[start + byte] for byte in range(width)], 1).view(UNSIGNED[width])[:, 0]
                value = _extended(value, kind, target)
                np.copyto(target, value, where=True if mask is None else mask, casting="unsafe")

        return load


def _extended(column: np.ndarray, kind: str, target: np.ndarray) -> np.ndarray:
    """Return loaded bits for a register that may be wider, with their sign where they have one."""
    width = WIDTH[kind]
    if kind[0] == "s" and target.dtype.itemsize > width:
        return column.view(SIGNED[width]).astype(I64).view(U64)
    return column


def _high_half(kind: str) -> Callable[..., np.ndarray]:
    if kind == "u32":
        return lambda x, y: (np.multiply(x, y, dtype=U64) >> U64(32)).astype(U32)
    if kind == "s32":
        return lambda x, y: (np.multiply(x, y, dtype=I64) >> I64(32)).astype(I32)
    return lambda x, y: np.array([(int(p) * int(q)) >> 64 for p, q in np.broadcast(x, y)], dtype=DTYPE[kind])


def _quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return x / y toward zero; a division by zero gives some number, as on a device."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    quotient = x // safe
    if np.issubdtype(y.dtype, np.signedinteger):
        quotient = quotient + ((x % safe != 0) & ((x < 0) != (safe < 0)))
    return quotient


def _compare(name: str, floating: bool) -> Callable[..., np.ndarray]:
    """Return a comparison; those of floats with a `u` are true beside a NaN, the others false."""
    table: dict[str, Any] = {
        "eq": np.equal,
        "ne": np.not_equal,
        **dict.fromkeys(("lt", "lo"), np.less),
        **dict.fromkeys(("le", "ls"), np.less_equal),
        **dict.fromkeys(("gt", "hi"), np.greater),
        **dict.fromkeys(("ge", "hs"), np.greater_equal),
    }
    if floating:
        table["ne"] = lambda x, y: (x < y) | (x > y)
        table |= {
            "equ": lambda x, y: ~((x < y) | (x > y)),
            "neu": np.not_equal,
            "ltu": lambda x, y: ~(x >= y),
            "leu": lambda x, y: ~(x > y),
            "gtu": lambda x, y: ~(x <= y),
            "geu": lambda x, y: ~(x < y),
            "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
            "nan": lambda x, y: np.isnan(x) | np.isnan(y),
        }
    return table[name]


def _converter(kind: str, source_kind: str, mods: list[str]) -> Callable[[np.ndarray], np.ndarray]:
    """Return cvt between two types: through rounding, saturation and `.ftz` where they are asked for."""
    rounding = next((mod for mod in mods if mod in ROUND), None)
    dtype, source_dtype = DTYPE[kind], DTYPE[source_kind]

    def to_float(x: np.ndarray) -> np.ndarray:
        if source_kind in FLOATS and rounding:
            x = ROUND[rounding](x)
        y = f32_to_bf16(x) if kind == "bf16" else x.astype(dtype)
        if "sat" in mods:
            y = np.where(np.isnan(y), F32(0), np.clip(y, 0, 1)).astype(dtype)
        return flush(y) if "ftz" in mods and y.dtype == F32 else y

    def convert(x: np.ndarray) -> np.ndarray:
        if x.dtype.itemsize != np.dtype(source_dtype).itemsize:  # a wider register holds the operand
            x = x.astype(UNSIGNED[np.dtype(source_dtype).itemsize]).view(source_dtype)
        x = bf16_to_f32(x) if source_kind == "bf16" else x
        x = flush(x) if "ftz" in mods and x.dtype == F32 else x
        if kind in FLOATS:
            return to_float(x)
        return to_integer(ROUND[rounding or "rzi"](x), kind) if source_kind in FLOATS else x.astype(dtype)

    return convert


FAMILIES: dict[str, Callable[[Builder, Instruction, str, list[str], str], Step]] = {
    **dict.fromkeys(("ld", "st"), Builder.memory),
    **dict.fromkeys(("add", "sub", "min", "max"), Builder.integer_arithmetic),
    **dict.fromkeys(("mul", "mad"), Builder.product),
    **dict.fromkeys(("neg", "abs"), Builder.sign),
    **dict.fromkeys(("ex2", "lg2", "tanh", "rcp", "sqrt", "rsqrt"), Builder.function),
    **dict.fromkeys(("and", "or", "xor", "not"), Builder.logic),
    **dict.fromkeys(("shl", "shr"), Builder.shift),
    **dict.fromkeys(("ldmatrix", "stmatrix"), Builder.matrix),
    "fma": Builder.fused,
    "div": Builder.division,
    "bfe": Builder.bit_field,
    "popc": Builder.population,
    "setp": Builder.comparison,
    "selp": Builder.selection,
    "cvt": Builder.conversion,
    "cvta": Builder.address_conversion,
    "mapa": Builder.remote_address,
    "mov": Builder.move,
    "createpolicy": Builder.policy,
    "shfl": Builder.shuffle,
    "redux": Builder.reduction,
}
