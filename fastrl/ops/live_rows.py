"""Which rows to compute, where a device knows their number before the host does.

The number of rows sets the shape of a matrix product, so the host has to know it. `nonzero` or `item` would stop the
host until the device has finished its queue, and the device would then idle until the host wakes up. Instead the device
copies the number into pinned memory without blocking. The host first queues more work and then waits for that copy: the
device goes on with the work while the host reads the number.

On a CPU nothing is queued, and the host looks the rows up. docs/engine.md lists every wait.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_asynchronous(device: torch.device) -> bool:
    """Return whether the host runs ahead of the device, with events to wait for."""
    return device.type == "cuda"


def refuse_capture(device: torch.device) -> None:
    """Raise inside the capture of a CUDA graph, where the host cannot wait."""
    if device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "operations on hidden states cannot be captured in a CUDA graph: the host must learn how many rows take "
            "part. Leave them outside the graph. token_logprobs and from_logits can be captured"
        )


class PendingCount:
    """A number on its way from a CUDA or ROCm device to the host."""

    def __init__(self, number: Tensor) -> None:
        refuse_capture(number.device)
        # A copy into memory that is not pinned would block.
        self._host = torch.empty((), dtype=torch.int64, pin_memory=True)
        self._host.copy_(number, non_blocking=True)
        # The event fires after this copy, whatever is queued behind it.
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(number.device))

    def wait(self) -> int:
        """Return the number once it has arrived. Work queued after it need not have run."""
        self._event.synchronize()
        return int(self._host)


class ActiveRows:
    """The indices of the rows that a mask keeps, in ascending order."""

    def __init__(self, keep: Tensor) -> None:  # (N,) bool
        self._number: PendingCount | None = None
        if is_asynchronous(keep.device):
            self._number = PendingCount(keep.sum())
            self.order = kept_first(keep)
        else:
            self.order = keep.nonzero().squeeze(-1)

    @property
    def is_pending(self) -> bool:
        """Whether the number of rows may not have arrived. `order` then holds all N rows, the kept ones first."""
        return self._number is not None

    def indices(self) -> Tensor:
        """Return the indices (K,), waiting for their number where it is on its way."""
        return self.order if self._number is None else self.order[: self._number.wait()]


def kept_first(keep: Tensor) -> Tensor:
    """Return all indices (N,), first the rows that `keep` (N,) marks, then the others, each part ascending."""
    # A stable sort by one bit needs no count, so the host does not wait.
    return (~keep).to(torch.uint8).argsort(stable=True)
