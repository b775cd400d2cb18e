"""PTX as text: kernels with their parameters, registers, shared arrays, instructions and basic blocks.

Only what compilers write is read: one statement ends at a semicolon, labels stand alone, braces scope nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I8, I16, I32, I64 = np.int8, np.int16, np.int32, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
# bfloat16 and packed pairs are held as bits.
DTYPE: dict[str, Any] = {
    "pred": np.bool_,
    **dict.fromkeys(("b8", "u8"), U8),
    **dict.fromkeys(("b16", "u16", "bf16"), U16),
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2"), U32),
    **dict.fromkeys(("b64", "u64", "f32x2"), U64),
    "s8": I8,
    "s16": I16,
    "s32": I32,
    "s64": I64,
    "f16": F16,
    "f32": F32,
    "f64": F64,
}
WIDTH = {kind: np.dtype(dtype).itemsize for kind, dtype in DTYPE.items()}
UNSIGNED: dict[int, Any] = {1: U8, 2: U16, 4: U32, 8: U64}
SIGNED: dict[int, Any] = {1: I8, 2: I16, 4: I32, 8: I64}
# Instructions that end a basic block: threads leave it, or wait.
ENDS = ("bra", "ret", "exit")
WAITS = ("bar.sync", "barrier")
UNREACHED = 1 << 30

_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:\s*,\s*function_name\s+\S+\s*,\s*inlined_at\s+(\d+)\s+(\d+))?")
_INSTRUCTION = re.compile(r"(?:@(!?[%\w]+)\s+)?([a-z]\w*(?:[.:]+\w+)*)\s*(.*)", re.DOTALL)


class Fault(Exception):
    """A device would trap here, or the result would be undefined."""


@dataclass
class Instruction:
    """One instruction; `loc` are its source lines, the innermost first."""

    op: str
    operands: list[str]
    guard: str | None
    loc: tuple[str, ...]
    index: int = -1
    target: int = -1

    @property
    def base(self) -> str:
        """The operation without its modifiers."""
        return self.op.split(".")[0]

    @property
    def ends_block(self) -> bool:
        """Whether threads leave the basic block here, or wait."""
        return self.base in ENDS or self.op.startswith(WAITS)


@dataclass
class Kernel:
    """An entry of a PTX module."""

    name: str
    params: list[tuple[str, int, int]]  # name, offset, bytes
    param_bytes: int
    registers: dict[str, str]  # name -> type
    static_shared: dict[str, int]  # name -> offset
    static_bytes: int
    code: list[Instruction]
    leaders: list[int]
    """First instructions of basic blocks, and the end of the code."""
    block_size: int | None
    """Threads of a block, from `.reqntid`."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Machines that have been built for this kernel."""


def split_operands(text: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += char in "{["
        depth -= char in "}]"
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def parse(text: str) -> dict[str, Kernel]:
    """Return the kernels of a PTX module by name."""
    files = {int(n): path.rsplit("/", 1)[-1] for n, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
    kernels = {}
    for match in re.finditer(r"\.entry\s+([$\w]+)\s*\((.*?)\)(.*?)\n\{", text, re.DOTALL):
        depth, end = 1, match.end()
        while depth:
            end += 1
            depth += {"{": 1, "}": -1}.get(text[end - 1], 0)
        name, params, directives = match.groups()
        kernels[name] = _kernel(name, params, directives, text[match.end() : end - 1], files)
    return kernels


def _statements(body: str) -> Iterator[tuple[str, Any]]:
    """Yield ("loc", numbers), ("label", name) and ("statement", text) in order."""
    buffer = ""
    for raw in body.splitlines():
        line = raw.split("//")[0].strip()
        if match := _LOC.match(line):
            yield "loc", match.groups()
            continue
        buffer += " " + line
        while True:
            buffer = buffer.lstrip(" \t{}")
            if match := re.match(r"([$\w]+):(?!:)", buffer):
                yield "label", match[1]
                buffer = buffer[match.end() :]
                continue
            head, mark, rest = buffer.partition(";")
            if not mark:
                break
            yield "statement", head.strip()
            buffer = rest


def _parameters(text: str) -> tuple[list[tuple[str, int, int]], int]:
    """Return (name, offset, bytes) of each parameter, and the bytes of all."""
    fields, offset = [], 0
    for line in split_operands(text):
        words = line.replace("[", " [").split()
        is_array = words[-1].startswith("[")
        count = int(words[-1].strip("[]")) if is_array else 1
        size = WIDTH[next(word[1:] for word in words if word[1:] in WIDTH)]
        # `.ptr .align` speaks of the memory behind a pointer, not of the parameter.
        given = re.search(r"\.align (\d+)", line) if ".ptr" not in line else None
        align = int(given[1]) if given else size
        offset = -(-offset // align) * align
        fields.append((words[-2] if is_array else words[-1], offset, size * count))
        offset += size * count
    return fields, offset


def _kernel(name: str, params: str, directives: str, body: str, files: dict[int, str]) -> Kernel:
    fields, param_bytes = _parameters(params)
    registers: dict[str, str] = {}
    shared: dict[str, int] = {}
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    locs: dict[tuple[str, str], tuple[str, ...]] = {}
    used, loc = 0, ("?",)
    for kind, value in _statements(body):
        if kind == "loc":
            file, line, outer_file, outer_line = value
            here = f"{files.get(int(file), file)}:{line}"
            outer: tuple[str, ...] = ()
            if outer_file:
                known = f"{files.get(int(outer_file), '')}:{outer_line}"
                outer = locs.get((outer_file, outer_line), (known,))
            loc = locs[file, line] = (here, *outer)
        elif kind == "label":
            labels[value] = len(code)
        elif value.startswith(".reg"):
            _, dtype, names = value.split(None, 2)
            for item in split_operands(names):
                if bank := re.fullmatch(r"(.+)<(\d+)>", item):
                    registers |= {f"{bank[1]}{i}": dtype[1:] for i in range(int(bank[2]))}
                else:
                    registers[item] = dtype[1:]
        elif value.startswith(".shared"):
            found = re.search(r"\.align (\d+) \.(\w+) ([$\w]+)(?:\[(\d+)\])?", value)
            if found is None:
                raise Fault(f"not understood: {value}")
            used = -(-used // int(found[1])) * int(found[1])
            shared[found[3]] = used
            used += WIDTH[found[2]] * int(found[4] or 1)
        elif not value.startswith("."):
            found = _INSTRUCTION.match(value)
            if found is None:
                raise Fault(f"not understood: {value}")
            code.append(Instruction(found[2], split_operands(found[3]), found[1], loc, len(code)))
    leaders = {0, len(code)}
    for ins in code:
        if ins.base == "bra":
            ins.target = labels[ins.operands[0]]
            leaders |= {ins.target, ins.index + 1}
        elif ins.ends_block:
            leaders |= {ins.index, ins.index + 1}
    size = re.search(r"\.reqntid\s+(\d+)", directives)
    static_bytes = -(-used // 16) * 16
    block_size = int(size[1]) if size else None
    return Kernel(name, fields, param_bytes, registers, shared, static_bytes, code, sorted(leaders), block_size)


Order = tuple[list[int], list[tuple[int, int]]]


def _postorder(following: dict[int, list[int]], key: Callable[[int, int], int]) -> Order:
    """Return the blocks in postorder of a depth-first walk, and its back edges; `key` orders a block's ways out."""
    seen, open_, order, back = {0}, {0}, [], []
    stack = [(0, iter(sorted(following[0], key=lambda t: key(0, t))))]
    while stack:
        block, rest = stack[-1]
        for target in rest:
            if target in open_:
                back.append((block, target))
            elif target not in seen:
                seen.add(target)
                open_.add(target)
                stack.append((target, iter(sorted(following[target], key=lambda t, b=target: key(b, t)))))
                break
        else:
            stack.pop()
            open_.discard(block)
            order.append(block)
    return order, back


def ranks(kernel: Kernel) -> np.ndarray:
    """Return, by the index of a block's first instruction, its place in topological order, loops before their exits.

    The smallest program counter would not do: LLVM puts the latch of some loops before their bodies.
    """
    following: dict[int, list[int]] = {}
    for start, stop in zip(kernel.leaders, kernel.leaders[1:], strict=False):
        last = kernel.code[stop - 1]
        following[start] = [last.target] if last.base == "bra" else []
        if not (last.base in ENDS and last.guard is None) and stop < len(kernel.code):
            following[start].append(stop)
    before: dict[int, list[int]] = {block: [] for block in following}
    for block, targets in following.items():
        for target in targets:
            before[target].append(block)
    loops: list[set[int]] = []
    for latch, head in _postorder(following, lambda block, target: 0)[1]:
        body, todo = {head}, [latch]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before[block]
        loops.append(body)
    order, _ = _postorder(following, lambda block, target: sum(block in loop and target in loop for loop in loops))
    rank = np.full(len(kernel.code) + 1, UNREACHED, I64)
    for place, block in enumerate(reversed(order)):
        rank[block] = place
    return rank
