"""Loads and stores of a batch: bounds and alignment, generic addresses, distributed shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.instructions import RANK_SHIFT, SHARED_WINDOW
from ptx.text import I64, UNSIGNED, Fault, Instruction

if TYPE_CHECKING:
    from ptx.machine import Machine

DONE = 4
"""The state of a thread that has returned, as in `ptx.machine`."""


class Accesses:
    """Reads and writes memory for one machine; reads return one array per unit, of the threads that take part."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def threads_of(self, mask: Any) -> np.ndarray:
        """Return the indices of the threads that take part."""
        return np.arange(self.machine.threads) if mask is None else np.flatnonzero(mask)

    def access(
        self, space: str, where: np.ndarray, width: int, count: int, mask: Any, ins: Instruction, values: Any
    ) -> list[np.ndarray]:
        """Read, or write where there are `values`, `count` units of `width` bytes for each thread that takes part."""
        taken = where if mask is None else where[mask]
        if space == "generic":
            inside = taken >= SHARED_WINDOW
            if inside.any() and not inside.all():
                raise Fault(f"a generic access to two spaces at once: {ins}")
            if inside.all():
                return self.distributed(taken, width, count, mask, ins, values)
        if (taken % (width * count)).any():
            raise Fault(f"misaligned: {ins.op} at {' < '.join(ins.loc)}")
        if space == "shared":
            threads = self.threads_of(mask)
            return self.shared(taken, self.machine.cta[threads], threads, width, count, ins, mask, values)
        return self.of_tensors(where, taken, width, count, mask, ins, values)

    def of_tensors(
        self, where: np.ndarray, taken: np.ndarray, width: int, count: int, mask: Any, ins: Instruction, values: Any
    ) -> list[np.ndarray]:
        machine, bytes_ = self.machine, width * count
        buffer = machine.memory.find(int(taken.min()), int(taken.max()) + bytes_)
        if buffer is None:
            return self.scattered(taken, width, count, mask, ins, values)
        for watcher in machine.watchers:
            watcher.global_access(machine, buffer, taken, bytes_, mask, ins, values)
        view, index = buffer.views[width], (taken - buffer.base) // width
        if values is None:
            return [view[index + i] for i in range(count)]
        for i, value in enumerate(values):
            view[index + i] = value if mask is None else value[mask]
        return []

    def scattered(
        self, taken: np.ndarray, width: int, count: int, mask: Any, ins: Instruction, values: Any
    ) -> list[np.ndarray]:
        """An access to several tensors at once, or outside of all."""
        machine = self.machine
        order = sorted(machine.memory.buffers, key=lambda buffer: buffer.start)
        which = np.searchsorted(np.array([buffer.start for buffer in order]), taken, "right") - 1
        stops = np.array([buffer.stop for buffer in order])
        outside = (which < 0) | (taken + width * count > stops[which])
        threads = self.threads_of(mask)
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            near = order[max(int(which[first]), 0)]
            raise Fault(
                f"out of bounds: {ins.op} at {' < '.join(ins.loc)}, {int(outside.sum())} threads, the first is thread "
                f"{int(machine.tid[threads[first]])}, {int(taken[first]) - near.start} bytes into {near.name!r} of "
                f"{near.stop - near.start}"
            )
        columns = [np.empty(taken.size, UNSIGNED[width]) for _ in range(count)]
        where = np.zeros(machine.threads, I64)
        where[threads] = taken
        for i in np.unique(which):
            part = np.zeros(machine.threads, bool)
            part[threads[which == i]] = True
            found = self.of_tensors(where, where[part], width, count, part, ins, values)
            for column, piece in zip(columns, found, strict=False):
                column[which == i] = piece
        return columns if values is None else []

    def distributed(
        self, taken: np.ndarray, width: int, count: int, mask: Any, ins: Instruction, values: Any
    ) -> list[np.ndarray]:
        """An access by generic address to the shared memory of a block of the cluster."""
        machine, threads = self.machine, self.threads_of(mask)
        rank, offset = (taken - SHARED_WINDOW) >> RANK_SHIFT, taken & ((1 << RANK_SHIFT) - 1)
        if (rank >= machine.cluster).any():
            raise Fault(f"shared memory of a block outside of the cluster: {ins}")
        owner = machine.cta[threads] // machine.cluster * machine.cluster + rank
        remote = owner != machine.cta[threads]
        if (remote & (machine.waits[threads] == 0)).any():
            raise Fault(f"shared memory of a block that may not run yet: {ins}")
        if (remote & (machine.state.reshape(machine.ctas, -1)[owner] == DONE).all(1)).any():
            raise Fault(f"shared memory of a block that has returned: {ins}")
        return self.shared(offset, owner, threads, width, count, ins, mask, values)

    def shared(
        self,
        offset: np.ndarray,  # in the shared memory of the owner
        owner: np.ndarray,  # the block, in the batch
        threads: np.ndarray,
        width: int,
        count: int,
        ins: Instruction,
        mask: Any,
        values: Any,
    ) -> list[np.ndarray]:
        """Read or write shared memory."""
        machine, bytes_ = self.machine, width * count
        if offset.size and (offset.min() < 0 or offset.max() + bytes_ > machine.shared_bytes):
            reached = int(offset.max()) + bytes_
            raise Fault(
                f"out of bounds: {ins.op} at {' < '.join(ins.loc)} reaches {reached} of "
                f"{machine.shared_bytes} bytes of shared memory"
            )
        if (offset % bytes_).any():
            raise Fault(f"misaligned: {ins.op} at {' < '.join(ins.loc)}")
        place = offset + owner * machine.shared_stride
        for watcher in machine.watchers:
            watcher.shared_access(machine, place, threads, bytes_, ins, mask, values)
        view, index = machine.shared_views[width], place // width
        if values is None:
            return [view[index + i] for i in range(count)]
        for i, value in enumerate(values):
            view[index + i] = value if mask is None else value[mask]
        return []
