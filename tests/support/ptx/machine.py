"""A batch of blocks of one kernel: who runs next, barriers, clusters; `launch` runs a grid in batches.

Every thread has a program counter. Of the basic blocks in which threads stand, the first in topological order runs
next, for all threads there: they meet again at the earliest common point. Lanes that reach a warp instruction without
the rest of their warp wait for it, as on Volta and later.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.accesses import DONE, Accesses
from ptx.arithmetic import Approximate
from ptx.instructions import Builder, Step, WarpIncomplete
from ptx.memory import Memory
from ptx.text import DTYPE, I64, U8, U32, UNREACHED, UNSIGNED, WIDTH, Fault, Instruction, Kernel, ranks

RUN, AT_BARRIER, AT_CLUSTER, AT_WARP = range(4)


@dataclass
class Options:
    """What a device leaves open, and who watches."""

    approximate: Approximate = field(default_factory=Approximate)
    seed: int = 0
    """Of the garbage in registers and shared memory."""
    order: int | None = None
    """None: all warps in step. A seed: one warp of the batch at a time runs to its next barrier, drawn at random."""
    watchers: Sequence[Any] = ()
    """`Checker` and `Traffic`: they see every access."""
    batch_threads: int = 4096
    most_steps: int = 10_000_000


class Machine:
    """Registers, shared memory and program counters of a batch of blocks."""

    def __init__(
        self, kernel: Kernel, block: int, ctas: int, cluster: int, shared_bytes: int, options: Options
    ) -> None:
        if block % 32:
            raise Fault(f"a block must be whole warps, got {block} threads")
        self.kernel, self.block, self.ctas, self.cluster = kernel, block, ctas, cluster
        self.options, self.watchers = options, options.watchers
        n = self.threads = block * ctas
        threads = np.arange(n, dtype=I64)
        self.lane, self.tid, self.cta, self.warp = threads % 32, threads % block, threads // block, threads // 32
        self.cluster_rank = self.cta % cluster
        self.registers: dict[str, np.ndarray] = {
            name: np.zeros(n, DTYPE[kind] if kind == "pred" else UNSIGNED[WIDTH[kind]])
            for name, kind in kernel.registers.items()
        }
        self.shared_bytes = kernel.static_bytes + shared_bytes
        self.shared_stride = -(-max(self.shared_bytes, 16) // 16) * 16
        self.shared_memory = np.zeros(self.shared_stride * ctas, U8)
        self.shared_views = {width: self.shared_memory.view(UNSIGNED[width]) for width in (1, 2, 4, 8)}
        self.params = np.zeros(max(kernel.param_bytes, 1), U8)
        self.symbols = {**kernel.static_shared, **{name: offset for name, offset, _ in kernel.params}}
        self.memory = Memory()
        self.specials = self.special_registers()
        self.accesses = Accesses(self)
        self.rank = ranks(kernel)
        self.blocks: dict[int, tuple[list[Step], int, Instruction | None]] = {}
        builder = Builder(self)
        for start, stop in zip(kernel.leaders, kernel.leaders[1:], strict=False):
            last = kernel.code[stop - 1]
            body = kernel.code[start : stop - 1 if last.ends_block else stop]
            self.blocks[start] = ([builder.compile(ins) for ins in body], stop, last if last.ends_block else None)
        self.reset(0, ctas, ctas)

    def special_registers(self) -> dict[str, np.ndarray]:
        """Return %tid, %ctaid, ... of grids and blocks of one dimension."""
        values: dict[str, Any] = {"tid.x": self.tid, "ntid.x": self.block, "ctaid.x": 0, "nctaid.x": 0}
        values |= {"laneid": self.lane, "cluster_ctarank": self.cluster_rank, "cluster_ctaid.x": self.cluster_rank}
        values |= {"cluster_nctarank": self.cluster, "cluster_nctaid.x": self.cluster}
        for axis in "yz":
            values |= {f"{name}.{axis}": 0 for name in ("tid", "ctaid", "cluster_ctaid")}
            values |= {f"{name}.{axis}": 1 for name in ("ntid", "nctaid", "cluster_nctaid")}
        return {"%" + name: np.full(self.threads, value).astype(U32) for name, value in values.items()}

    def reset(self, first_cta: int, live: int, grid: int) -> None:
        """Begin a batch: the first block, how many of the batch exist; registers and shared memory hold garbage."""
        rng = np.random.default_rng(self.options.seed + first_cta)
        for register in self.registers.values():
            if register.dtype == np.bool_:
                register[...] = rng.integers(0, 2, self.threads).astype(bool)
            else:
                register[...] = np.frombuffer(rng.bytes(register.nbytes), register.dtype)
        self.shared_memory[...] = np.frombuffer(rng.bytes(self.shared_memory.nbytes), U8)
        self.specials["%ctaid.x"][...] = first_cta + self.cta
        self.specials["%nctaid.x"][...] = grid
        self.first_cta = first_cta
        self.pc = np.zeros(self.threads, I64)
        self.state = np.where(self.cta < live, RUN, DONE)
        self.epoch = np.zeros(self.ctas, I64)  # barriers that a block has passed
        # Cluster barriers that a thread has arrived at, and waited for.
        self.arrivals, self.waits = np.zeros(self.threads, I64), np.zeros(self.threads, I64)
        for watcher in self.watchers:
            watcher.begin(self)

    # --- who runs

    def run(self) -> None:
        """Run the batch to its end."""
        order = self.options.order
        rng = None if order is None else np.random.default_rng(order)
        for _ in range(self.options.most_steps):
            runnable = self.state == RUN
            if not runnable.any():
                if (self.state == DONE).all():
                    return
                self.release()
                continue
            if rng is not None:
                chosen = rng.choice(np.flatnonzero(runnable.reshape(-1, 32).any(1)))
                runnable = runnable & (self.warp == chosen)
            self.until_blocked(runnable)
        raise Fault(f"{self.kernel.name} does not end within {self.options.most_steps} steps")

    def until_blocked(self, group: np.ndarray) -> None:
        """Run the threads of a group until none of them can go on."""
        pc: int | None = None
        mask: Any = None
        while True:
            if pc is None:
                active = group & (self.state == RUN)
                if not active.any():
                    return
                places = self.rank[self.pc]
                mask = active & (places == places[active].min())
                pc = int(self.pc[mask][0])
                mask = self.with_waiting(mask, pc)
                mask = None if mask.all() else mask
            if pc not in self.blocks:
                raise Fault(f"{self.kernel.name} runs beyond its end, at {pc}")
            body, stop, last = self.blocks[pc]
            done = 0
            try:
                for step in body:
                    step(mask)
                    done += 1
            except WarpIncomplete:
                self.split(pc, done, mask)
                pc = None
                continue
            pc = self.end_of_block(last, stop, mask)

    def with_waiting(self, mask: np.ndarray, pc: int) -> np.ndarray:
        """Let lanes that wait at a warp instruction join the rest of their warp."""
        waiting = (self.state == AT_WARP) & (self.pc == pc)
        if waiting.any():
            here = (mask | waiting).reshape(-1, 32)
            gone = self.state.reshape(-1, 32) == DONE
            whole = np.repeat((here | gone).all(1), 32) & waiting
            self.state[whole] = RUN
            mask = mask | whole
        return mask

    def split(self, pc: int, done: int, mask: np.ndarray) -> None:
        """Cut a basic block before a warp instruction that lanes of some warps have not reached; they wait there."""
        body, stop, last = self.blocks[pc]
        if done:
            self.blocks[pc] = (body[:done], pc + done, None)
            self.blocks[pc + done] = (body[done:], stop, last)
            later = self.rank > self.rank[pc]
            self.rank[later & (self.rank < UNREACHED)] += 1
            self.rank[pc + done] = self.rank[pc] + 1
        self.pc[mask] = pc + done
        incomplete = ~mask.reshape(-1, 32).all(1)
        self.state[np.repeat(incomplete, 32) & mask] = AT_WARP

    def end_of_block(self, last: Instruction | None, stop: int, mask: Any) -> int | None:
        """Return where all threads go, or None once their program counters and states are stored."""
        if last is None:
            return self.go(np.full(self.threads, stop), mask)
        taken: Any = np.ones(self.threads, bool)
        if last.guard is not None:
            guard = self.registers[last.guard.lstrip("!")]
            taken = ~guard if last.guard.startswith("!") else guard
        if last.base == "bra":
            return self.go(np.where(taken, last.target, stop), mask)
        everyone = np.ones(self.threads, bool) if mask is None else mask
        self.pc[everyone] = stop
        self.wait_or_return(last, everyone & taken)
        return None

    def go(self, target: np.ndarray, mask: Any) -> int | None:
        """Send threads to their targets; return the target where it is one for all threads of the batch."""
        if mask is None:
            if (target == target[0]).all():
                return int(target[0])
            self.pc[...] = target
        else:
            self.pc[mask] = target[mask]
        return None

    # --- barriers

    def wait_or_return(self, last: Instruction, hit: np.ndarray) -> None:
        if last.base in ("ret", "exit"):
            self.state[hit] = DONE
        elif last.op.startswith("bar.sync"):
            self.state[hit] = AT_BARRIER
            self.release_blocks()
        elif last.op.startswith("barrier.cluster.arrive"):
            if (self.arrivals[hit] != self.waits[hit]).any():
                raise Fault(f"a cluster barrier is arrived at twice: {last}")
            self.arrivals[hit] += 1
            self.release_clusters()
        elif last.op.startswith("barrier.cluster.wait"):
            if (self.arrivals[hit] == self.waits[hit]).any():
                raise Fault(f"a cluster barrier is waited for without an arrival: {last}")
            self.state[hit] = AT_CLUSTER
            self.release_clusters()
        else:
            raise Fault(f"not implemented: {last.op}")

    def release_blocks(self) -> None:
        """Let blocks go on whose threads have all arrived."""
        state = self.state.reshape(self.ctas, self.block)
        waiting = state == AT_BARRIER
        complete = (waiting | (state == DONE)).all(1) & waiting.any(1)
        if (waiting[complete].any(1) & (state[complete] == DONE).any(1)).any():
            raise Fault(f"{self.kernel.name} has a barrier that some threads of a block passed by returning")
        if complete.any():
            state[complete[:, None] & waiting] = RUN
            self.epoch[complete] += 1

    def release_clusters(self) -> None:
        """Let threads go on that wait for arrivals which all threads of their cluster have made."""
        state = self.state.reshape(-1, self.cluster * self.block)
        arrivals = self.arrivals.reshape(state.shape)
        least = np.where(state == DONE, np.iinfo(I64).max, arrivals).min(1, keepdims=True)
        free = (state == AT_CLUSTER) & (least >= arrivals)
        if free.any():
            state[free] = RUN
            self.waits.reshape(state.shape)[free] = arrivals[free]

    def release(self) -> None:
        """Nothing can run: release whoever waits for nothing any more, or say that it is a deadlock."""
        before = self.state.copy()
        self.release_blocks()
        self.release_clusters()
        for pc in np.unique(self.pc[self.state == AT_WARP]):
            self.with_waiting(np.zeros(self.threads, bool), int(pc))
        if (before == self.state).all():
            stuck = np.flatnonzero(self.state != DONE)
            place = self.kernel.code[int(self.pc[stuck[0]]) - 1]
            raise Fault(f"deadlock in {self.kernel.name}: {stuck.size} threads wait, the first at {place}")


def pack_params(kernel: Kernel, arguments: Sequence[Any]) -> np.ndarray:
    """Return the parameter space: ints, floats (of the parameter's bytes) and bytes, one per parameter."""
    out = np.zeros(max(kernel.param_bytes, 1), U8)
    for (name, offset, size), value in zip(kernel.params, arguments, strict=True):
        if isinstance(value, bytes):
            raw = value
        elif isinstance(value, float):
            raw = struct.pack("<d" if size == 8 else "<f", value)
        else:
            raw = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if len(raw) != size:
            raise ValueError(f"parameter {name} of {kernel.name} has {size} bytes, got {len(raw)}")
        out[offset : offset + size] = np.frombuffer(raw, U8)
    return out


def launch(
    kernel: Kernel,
    grid: int,
    block: int,
    arguments: Sequence[Any],
    *,
    memory: Memory,
    shared_bytes: int = 0,
    cluster: int = 1,
    options: Options | None = None,
) -> None:
    """Run a grid of one dimension.

    Args:
        kernel: from `parse`.
        grid, block, cluster: blocks, threads of a block, blocks of a cluster.
        arguments: as `pack_params` takes them; pointers are addresses.
        memory: the tensors that the kernel may touch.
        shared_bytes: dynamic shared memory.
        options: None: nominal approximations, all warps in step, nobody watches.

    Raises:
        Fault: an access out of bounds or misaligned, a deadlock, an instruction that is not implemented.
    """
    options = options or Options()
    most = max(cluster, options.batch_threads // block // cluster * cluster)
    batch = min(most, grid)
    key = (block, batch, cluster, shared_bytes)
    with np.errstate(all="ignore"):
        machine = kernel.cache.get(key)
        # Steps hold the options that they were built with.
        if machine is None or machine.options is not options:
            machine = kernel.cache[key] = Machine(kernel, block, batch, cluster, shared_bytes, options)
        machine.params[...] = pack_params(kernel, arguments)
        machine.memory = memory
        for first in range(0, grid, batch):
            machine.reset(first, min(batch, grid - first), grid)
            machine.run()
