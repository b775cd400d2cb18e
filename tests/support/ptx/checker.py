"""Races and reads of unwritten shared memory, from a record of the last accesses to each byte."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.text import I64, U8, UNSIGNED, Instruction

if TYPE_CHECKING:
    from ptx.machine import Machine
    from ptx.memory import Buffer

NOBODY, SEVERAL = -1, -2


class Shadow:
    """Who wrote and who read each byte last: the warp, its block, the barriers that it had passed."""

    def __init__(self, size: int) -> None:
        self.writer, self.reader = np.full(size, NOBODY, I64), np.full(size, NOBODY, I64)
        self.write_cta, self.read_cta = np.zeros(size, I64), np.zeros(size, I64)
        self.write_epoch, self.read_epoch = np.zeros(size, I64), np.zeros(size, I64)
        self.write_arrivals, self.read_arrivals = np.zeros(size, I64), np.zeros(size, I64)


class Checker:
    """Two accesses to a byte by different warps, one of them a write, need a barrier between them.

    A barrier of the block orders them (the block has passed more barriers since), or one of the cluster (the first had
    not yet arrived at the barrier that the second has waited for). Blocks of different clusters are never ordered
    within a launch. Lanes of a warp count as ordered: a race inside a warp is not found.
    """

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
        """(kind, operation, source lines) -> bytes."""
        self.accesses = 0

    def lines(self, most: int = 20) -> list[str]:
        """Return the findings in words, the most frequent first."""
        return [
            f"{count} x {kind}: {op} at {' < '.join(loc)}" for (kind, op, loc), count in self.found.most_common(most)
        ]

    def begin(self, machine: Machine) -> None:
        """Forget the shared memory of the batch before."""
        self.shadow = Shadow(machine.shared_memory.size)

    def shared_access(
        self,
        machine: Machine,
        place: np.ndarray,
        threads: np.ndarray,
        width: int,
        ins: Instruction,
        mask: Any,
        values: Any,
    ) -> None:
        """See an access to shared memory."""
        if values is None:
            bytes_ = (place[:, None] + np.arange(width)).ravel()
            unwritten = self.shadow.writer[bytes_] == NOBODY
            if unwritten.any():
                self.report("shared memory read before it was written", ins, unwritten)
        new = written_bytes(values, mask, width)
        self.check(machine, self.shadow, machine.shared_memory, place, threads, width, ins, new, "shared")

    def global_access(
        self, machine: Machine, buffer: Buffer, where: np.ndarray, width: int, mask: Any, ins: Instruction, values: Any
    ) -> None:
        """See an access to a tensor."""
        threads = np.arange(machine.threads) if mask is None else np.flatnonzero(mask)
        if buffer.shadow is None:
            buffer.shadow = Shadow(buffer.stop - buffer.base)
        place, new = where - buffer.base, written_bytes(values, mask, width)
        self.check(machine, buffer.shadow, buffer.views[1], place, threads, width, ins, new, "global")

    def report(self, kind: str, ins: Instruction, bad: np.ndarray) -> None:
        """Count a finding."""
        self.found[kind, ins.op, ins.loc] += int(bad.sum())

    def check(
        self,
        machine: Machine,
        shadow: Shadow,
        memory: np.ndarray,
        where: np.ndarray,
        threads: np.ndarray,
        width: int,
        ins: Instruction,
        new: np.ndarray | None,
        space: str,
    ) -> None:
        """Compare an access with the last ones to the same bytes, and record it."""
        self.accesses += 1
        places = (where[:, None] + np.arange(width)).ravel()
        thread = np.repeat(threads, width)
        cta = machine.first_cta + machine.cta[thread]
        warp = machine.warp[thread] + machine.first_cta * (machine.block // 32)
        epoch, waits = machine.epoch[machine.cta[thread]], machine.waits[thread]
        arrivals = machine.arrivals[thread]

        def unordered(who: np.ndarray, other_cta: np.ndarray, other_epoch: np.ndarray, other: np.ndarray) -> np.ndarray:
            by_block = (other_cta == cta) & (other_epoch < epoch)
            by_cluster = (other_cta // machine.cluster == cta // machine.cluster) & (other < waits)
            return (who != NOBODY) & (who != warp) & ~(by_block | by_cluster)

        s = shadow
        after_write = unordered(s.writer[places], s.write_cta[places], s.write_epoch[places], s.write_arrivals[places])
        after_read = unordered(s.reader[places], s.read_cta[places], s.read_epoch[places], s.read_arrivals[places])
        if new is None:
            if after_write.any():
                self.report(f"race in {space} memory: read after write", ins, after_write)
            reader = np.where(after_read, SEVERAL, warp)
            s.reader[places] = reader
            clash = s.reader[places] != reader  # warps that read the same byte in this very instruction
            s.reader[places[clash]] = SEVERAL
            s.read_cta[places], s.read_epoch[places], s.read_arrivals[places] = cta, epoch, arrivals
            return
        after_write &= memory[places] != new  # warps that hold copies of one number all write it
        if after_write.any():
            self.report(f"race in {space} memory: write after write", ins, after_write)
        if after_read.any():
            self.report(f"race in {space} memory: write after read", ins, after_read)
        first = int(places.min())
        last = np.zeros(int(places.max()) + 1 - first, U8)
        last[places - first] = new
        clash = last[places - first] != new
        if clash.any():
            self.report(f"race in {space} memory: two threads write", ins, clash)
        s.writer[places], s.reader[places] = warp, NOBODY
        s.write_cta[places], s.write_epoch[places], s.write_arrivals[places] = cta, epoch, arrivals


def written_bytes(values: Any, mask: Any, width: int) -> np.ndarray | None:
    """Return the bytes that an access writes, thread by thread, or None for a read."""
    if values is None:
        return None
    unit = UNSIGNED[width // len(values)]
    taken = [np.ascontiguousarray((value if mask is None else value[mask]).astype(unit)) for value in values]
    return np.concatenate([value.view(U8).reshape(len(value), -1) for value in taken], 1).ravel()
