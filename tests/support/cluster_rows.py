"""The CUDA row kernels on a CPU: loops stand for the blocks and threads of a cluster (csrc/cluster_rows.cc)."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import build, choice, cuda

SOURCE = Path(__file__).parent / "csrc" / "cluster_rows.cc"
# As for csrc/cpu: no contraction, NaN and infinities are inputs.
FLAGS = ("-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror")


@functools.cache
def module() -> Any:
    """Return the compiled loops."""
    import tvm_ffi
    import tvm_ffi.cpp

    folder = tempfile.mkdtemp(prefix="fastrl-cluster-rows-")
    built = tvm_ffi.cpp.build(
        "cluster_rows",
        cpp_files=[str(SOURCE)],
        extra_cflags=list(FLAGS),
        extra_include_paths=[str(build.source_folder() / "include")],
        build_directory=folder,
    )
    return tvm_ffi.load_module(built)


class Plan(NamedTuple):
    """How a row is cut."""

    cluster: int
    threads: int
    """Per block; whole warps of 32."""
    slice: int
    """Entries per block; whole vectors of 16 bytes."""
    shared_bytes: int = 0
    resident: int = 1


def plan_of(vocabulary: int, dtype: torch.dtype) -> Plan:
    """Return the plan that a device takes."""
    values = torch.zeros(5, dtype=torch.int64)
    module().plan(vocabulary, dtype.itemsize, values)
    return Plan(*values.tolist())


def cut(vocabulary: int, dtype: torch.dtype, cluster: int, threads: int = 32) -> Plan:
    """Return a plan with another number of blocks or threads."""
    per_vector = 16 // dtype.itemsize
    vectors = -(-vocabulary // per_vector)
    return Plan(cluster, threads, -(-vectors // cluster) * per_vector)


def run(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    grads: tuple[Tensor, Tensor, Tensor],  # (N,) each
    inv_temperature: float | Tensor = 1.0,
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    out: Tensor | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp, residual, gradient), as the kernels of csrc/cuda compute them."""
    n, dtype = logits.shape[0], checks.wide(logits.dtype)
    inverse = torch.as_tensor(inv_temperature, dtype=dtype).expand(n).contiguous()
    results = [torch.full((n,), math.nan, dtype=dtype) for _ in range(4)]
    gradient = torch.full(logits.shape, math.nan, dtype=logits.dtype) if out is None else out
    slope, factor = math.copysign(1.0, logit_scale), abs(logit_scale)
    if softcap:
        slope, factor = logit_scale / softcap, softcap
    chosen = torch.tensor(plan[:3] if plan else [], dtype=torch.int64)
    upstream = [g.to(dtype).contiguous() for g in grads]
    head = (slope, factor, bool(softcap), ignore_index)
    module().token_logprobs_fwd_bwd(logits, labels, inverse, 1.0, *head, *results, *upstream, gradient, chosen)
    return results[0], results[1], results[2], results[3], gradient


class HostModule:
    """Stands for the compiled module of csrc/cuda: the same functions with the same arguments, on a CPU."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "row_is_resident":
                return module().row_is_resident(*arguments)
            *given, stream = arguments
            assert stream == 0
            return getattr(module(), name)(*given, torch.empty(0, dtype=torch.int64))

        return call


@contextmanager
def on_the_host() -> Iterator[HostModule]:
    """Let backend "cuda" run on CPU tensors through the loops; yields what records the kernels called."""
    host = HostModule()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "cuda_module", lambda: host)
        patch.setattr(cuda, "_stream", lambda logits: 0)
        patch.setattr(choice, "cuda_available", lambda device: (True, "loops on a CPU"))
        yield host
