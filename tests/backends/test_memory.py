"""Large buffers lie in huge pages where the system has them, and memory that nothing uses is used again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrl.backends import memory

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_HUGE_PAGES = sys.platform == "linux" and THP.exists()
LARGE = (memory.HUGE_PAGE_MIN_BYTES // 4,)


def flags_of(tensor: Tensor) -> set[str]:
    """Return the kernel's flags of the mapping that holds the middle of the tensor."""
    address = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError("the tensor is in no mapping")


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="this system has no transparent huge pages")
def test_large_buffers_ask_for_huge_pages_and_small_ones_do_not() -> None:
    large = memory.empty((64 << 20,), torch.uint8)
    assert "hg" in flags_of(large)
    assert "hg" not in flags_of(torch.empty(64 << 20, dtype=torch.uint8))
    assert not memory.ask_for_huge_pages(torch.empty(16))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 7), (5,), LARGE, (3, *LARGE)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_buffers_are_those_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    want = torch.empty(shape, dtype=dtype)
    for got in (memory.empty(shape, dtype), memory.zeros(shape, dtype)):
        assert (got.shape, got.dtype, got.stride(), got.device) == (want.shape, dtype, want.stride(), want.device)
    assert not memory.zeros(shape, dtype).any()


@pytest.fixture
def no_scratch() -> Iterator[None]:
    """Begin and end without memory that is kept."""
    memory.release()
    yield
    memory.release()


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.mark.usefixtures("no_scratch")
def test_scratch_is_handed_out_again_when_nothing_uses_it() -> None:
    first = memory.scratch((64, 100), torch.float32)
    assert (first.shape, first.dtype, first.is_contiguous()) == ((64, 100), torch.float32, True)
    kept = memory_of(first)
    assert memory_of(memory.scratch((64, 100), torch.float32)) != kept, "two users share memory"
    del first
    second = memory.scratch((10, 3), torch.float64)
    view = second[2:].t()
    kept = memory_of(second)
    del second
    assert memory_of(memory.scratch((10, 3), torch.float64)) != kept, "a view still uses it"
    del view
    again = memory.scratch((10, 3), torch.float64)
    kept = memory_of(again)
    del again
    assert memory_of(memory.scratch((5, 6), torch.float64)) == kept


@pytest.mark.usefixtures("no_scratch")
def test_scratch_that_autograd_saved_is_not_handed_out() -> None:
    room = memory.scratch((8,), torch.float32).fill_(2.0)
    x = torch.ones(8, requires_grad=True)
    product = (x * room).sum()
    del room
    memory.scratch((8,), torch.float32).fill_(7.0)
    product.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0] * 8


@pytest.mark.usefixtures("no_scratch")
def test_scratch_keeps_no_more_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SCRATCH_MAX_BYTES", 4096)
    memory.scratch((1024,), torch.float32)
    assert [x.numel() for x in memory._kept] == [4096]
    memory.scratch((1025,), torch.float32)
    assert [x.numel() for x in memory._kept] == [4096]
    memory.release()
    assert not memory._kept
    assert memory.scratch((0, 5), torch.float32).shape == (0, 5)
    assert not memory._kept


@pytest.mark.usefixtures("no_scratch")
def test_scratch_of_inference_mode_and_of_threads() -> None:
    with torch.inference_mode():
        memory.scratch((16,), torch.float32)
    assert not memory.scratch((16,), torch.float32).add_(1).is_inference()
    with ThreadPoolExecutor(8) as pool:
        alive = list(pool.map(lambda _: memory.scratch((1000,), torch.float32), range(64)))
    assert len({memory_of(x) for x in alive}) == 64


@pytest.mark.usefixtures("no_scratch")
def test_scratch_without_a_count_of_users_is_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    memory._counts_users.cache_clear()
    try:
        assert memory.scratch((16,), torch.float32).shape == (16,)
        assert not memory._kept
    finally:
        memory._counts_users.cache_clear()


def test_what_is_not_plain_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.empty(LARGE, torch.float32, "meta").device.type == "meta"
    kept = memory.scratch(LARGE, torch.float32)
    del kept
    with torch._subclasses.FakeTensorMode():
        assert memory.empty(LARGE, torch.float32).shape == LARGE
        assert isinstance(memory.scratch(LARGE, torch.float32), torch._subclasses.FakeTensor)
    assert memory.scratch(LARGE, torch.float32, "meta").device.type == "meta"
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    memory._madvise.cache_clear()
    try:
        assert not memory.ask_for_huge_pages(torch.empty(LARGE))
    finally:
        memory._madvise.cache_clear()


def test_a_fork_while_another_thread_takes_scratch_does_not_hang() -> None:
    stop: list[int] = []

    def churn() -> None:
        while not stop:
            memory.release()
            memory.scratch((1000,), torch.float32)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                memory.scratch((10,), torch.float32)
                os._exit(0)
            deadline = time.monotonic() + 5.0
            while os.waitpid(child, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    pytest.fail("the forked child waits for a lock that nobody holds")
                time.sleep(0.001)
    finally:
        stop.append(1)
        thread.join()
