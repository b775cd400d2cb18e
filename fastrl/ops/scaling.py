"""Gradients that were formed in the forward, multiplied by the upstream factor in the backward.

They are the largest tensors of a step: where they may be used up they are scaled in place, and left alone by a factor
of 1, which `loss.backward()` passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrl.ops import buffers
from fastrl.ops.token_logprobs import row_blocks

# Rows scaled at a time where a half-precision gradient needs a float32 factor.
SCALE_ROWS = 32
# Rows rounded at a time, as PyTorch takes a copy of them on a CPU.
ROUNDED_ROWS = 1024


def graph_is_kept() -> bool:
    """Return whether the backward that is running leaves its graph for another one; True where PyTorch cannot tell."""
    query = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if query is None else bool(query())


def scaled(gradient: Tensor, factor: Tensor, backend: str, *, keep: bool) -> Tensor:
    """Return gradient * factor in the gradient's dtype; its own memory unless `keep`.

    Nothing is read where the factor is 1 and the memory may be used: on a CPU the host looks, under Triton the kernel
    does, so that the host does not wait.
    """
    out = buffers.empty(gradient.shape, gradient.dtype, gradient.device) if keep else gradient
    if backend == "triton":
        from fastrl_kernels import policy_logits as kernels

        targets = out.view(-1, out.shape[-1]) if keep else None
        for rows, part in parts(row_blocks(gradient)):
            kernels.scale_rows(rows[0], factor, out=rows[0] if targets is None else targets[part])
        return out
    if gradient.device.type == "cpu":
        value = float(factor)
        return out if value == 1.0 and not keep else torch.mul(gradient, value, out=out)
    if gradient.dtype == factor.dtype:
        return torch.mul(gradient, factor, out=out)
    # A factor without dimensions would be rounded to the gradient's dtype first.
    for source, target in zip(gradient.split(SCALE_ROWS), out.split(SCALE_ROWS), strict=True):
        target.copy_(source.to(factor.dtype) * factor)
    return out


def handed_out(
    gradient: Tensor | None, dtype: torch.dtype | None, factor: Tensor, backend: str, *, keep: bool = False
) -> Tensor | None:
    """Return gradient * factor in `dtype`: as `scaled` where it has that dtype, else in new memory.

    Where the dtypes differ the gradient waited in float32 for the factor, and is rounded behind it: 1e-9 is nothing in
    float16, but not under a loss scale of 65536.
    """
    if gradient is None or dtype is None:
        return None
    if gradient.dtype == dtype:
        return scaled(gradient, factor, backend, keep=keep)
    rounded = torch.empty_like(gradient, dtype=dtype)
    for source, target in zip(gradient.split(ROUNDED_ROWS), rounded.split(ROUNDED_ROWS), strict=True):
        torch.mul(source, factor, out=target)
    return rounded


def parts(blocks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], slice]]:
    """Yield what `row_blocks` yields, each with the place of its rows among all rows."""
    done = 0
    for block in blocks:
        part = slice(done, done + block[0].shape[0])
        yield block, part
        done = part.stop
