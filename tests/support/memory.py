"""Follow what PyTorch's CPU allocator hands out during a computation, inside custom operators too."""

from __future__ import annotations

import gc
from types import TracebackType

import torch

from fastrl.backends import memory


class MemoryWatch:
    """Record the largest single allocation and the peak of allocated minus freed bytes inside the context.

    The profiler reports every allocation of PyTorch's allocator, whoever asks for it: eager code, autograd or the body
    of a custom operator. What fastrl keeps for reuse is given back first, so that who uses it is seen to allocate it.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.largest = 0
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> MemoryWatch:
        """Start watching."""
        memory.release()
        gc.collect()  # what is freed inside for others would be taken off the peak
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching and add up."""
        self._profile.__exit__(kind, error, trace)
        results = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
        held = 0
        for _, size in sorted(changes, key=lambda change: change[0]):
            held += size
            self.peak = max(self.peak, held)
            self.largest = max(self.largest, size)
