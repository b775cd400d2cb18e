"""Memory for results of the size of the vocabulary.

On a CPU every page of a large fresh buffer costs a fault when it is first written: 201 MB in pages of 4 KiB took 67 ms,
in huge pages of 2 MiB 11 ms, as long as the row kernel that fills them. Linux gives huge pages to who asks
(`madvise`, where /sys/kernel/mm/transparent_hugepage/enabled says "madvise"; under "always" it gives them anyway).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Below some huge pages there is nothing to gain, and the allocator may have the memory at hand already.
HUGE_PAGE_MIN_BYTES = 8 << 20


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return `torch.empty(shape, dtype, device)`, in huge pages where it is large and the system has them."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    ask_for_huge_pages(tensor)
    return tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return `torch.zeros(shape, dtype, device)`, in huge pages where it is large and the system has them."""
    return empty(shape, dtype, device).zero_()


def ask_for_huge_pages(tensor: Tensor) -> bool:
    """Ask for huge pages under a large tensor on a Linux CPU, and return whether the system agreed; never raises.

    Only pages that lie wholly inside the tensor are asked for, and only those not yet written profit. Anything that is
    not plain memory of this process (another device, a fake tensor) is left alone.
    """
    if tensor.device.type != "cpu" or type(tensor) is not Tensor or not tensor.is_contiguous():
        return False
    size = tensor.numel() * tensor.element_size()
    madvise = _madvise() if size >= HUGE_PAGE_MIN_BYTES else None
    if madvise is None:
        return False
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
    return madvise(start, stop - start, mmap.MADV_HUGEPAGE) == 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's `madvise`, or None where there is none that knows huge pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        function.restype = ctypes.c_int
    return function
