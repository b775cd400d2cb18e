"""Rows of the logits' gradient as short lists of entries, with a bound on the rest.

    dz_v = g (1[v = y] - p_v) - h p_v (log p_v + H) + l p_v,    dx_v = dz_v dz_v/dx_v

A row's list holds the label's entry and the entries of largest |dx|. The kernel sums |dx| over the other entries while
it reads the row, relative to the row's scale (|g| + |h| + |l|) |logit_scale| / T. This sum, `left`, is at most
`tail_mass`, or the row is dense. If only the log-prob has a gradient and there is no softcap, it is the probability
outside the list. So with W the head and x the hidden states, in any norm,

    error of dhidden_t <= left_t scale_t max_v |W_v|,    error of dW <= sum_t left_t scale_t |x_t|

docs/sparse-rows.md derives both and measures them.

Legend: C rows of a chunk, L live rows, K places of a row, M candidates of a row, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastrl import checks
from fastrl.ops.rows import backward_rows

# Device type -> (largest tail_mass, places of a row, entries down to which the smallest are dropped) in rising order.
# The last band takes every larger tail_mass. An entry costs a row of D numbers read for dX, and two read and one
# written for dW. A dense row costs two passes over the head. Entries up to the last number had no measurable cost on a
# CPU, and took the error of dW from 2e-5 to 4e-6.
PLACES = {
    "cpu": ((1.0, 1024, 64),),
    "other": ((3e-4, 128, 16), (1.0, 256, 16)),
}
# At most this share of a small vocabulary, and at least so many: beyond it the GEMMs are as fast.
VOCABULARY_PER_PLACE = 32
LEAST_PLACES = 64
# Candidates per place, and the share of the mass to be left out that makes an entry one.
CANDIDATES_PER_PLACE = 4
THRESHOLD_SHARE = 1 / 1024
# Dense rows are held in whole groups of this many, the last filled up with rows of zeros: the CPU's float32 GEMM loses
# digits at other row counts.
HELD_ROWS_MULTIPLE = 8


@dataclass(frozen=True)
class Rule:
    """When a row is sparse, and how many entries it may have."""

    tail_mass: float
    """The largest sum of |gradient| left out, relative to the row's scale."""
    places: int
    """K: a row that takes more entries, the label's included, is dense."""
    threshold: float
    """Entries below this share of `tail_mass` times the scale are left out at sight."""
    candidates: int
    """M: a row with more entries than this above the threshold is dense."""
    min_entries: int
    """The number of entries beside the label's down to which the smallest are dropped."""


class Lists(NamedTuple):
    """The lists of some rows. Places beyond a row's count hold anything."""

    counts: Tensor  # (C,) int32, 0 for rows without a gradient, -1 for dense rows
    indices: Tensor  # (C, K) int32
    values: Tensor  # (C, K)
    left: Tensor  # (C,) float64, sum of |gradient| left out relative to the row's scale, 0 for dense rows


class RowInputs(NamedTuple):
    """The inputs of the gradient of some rows beside their logits: the arguments of `backward_rows`."""

    labels: Tensor  # (C,)
    inv_temperature: Tensor  # (C,)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor]  # (C,) each, the last (0,) where the backend keeps none
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]  # (C,) each

    def at(self, rows: Tensor) -> RowInputs:
        """Return the inputs of some rows."""
        logprobs, entropy, logsumexp, residual = (x[rows] if x.numel() else x for x in self.outputs)
        first, second, third = (None if grad is None else grad[rows] for grad in self.grads)
        outputs, grads = (logprobs, entropy, logsumexp, residual), (first, second, third)
        return RowInputs(self.labels[rows], self.inv_temperature[rows], outputs, grads)


class SparseStats:
    """Counts over the rows that have a gradient, as tensors on the device that change as rows are counted."""

    def __init__(self, device: torch.device) -> None:
        self.sparse = torch.zeros((), dtype=torch.float64, device=device)
        self.rows = torch.zeros((), dtype=torch.float64, device=device)
        self.left = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def dense(self) -> Tensor:
        """Rows that took the GEMMs, so far."""
        return self.rows - self.sparse

    def add(self, lists: Lists) -> None:
        """Count the rows of a chunk."""
        self.sparse += (lists.counts > 0).sum()
        self.rows += (lists.counts != 0).sum()
        if lists.left.numel():
            torch.maximum(self.left, lists.left.max(), out=self.left)

    def metrics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return name -> (sum, count): the share of sparse rows, and the largest mass that one left out.

        These are the tensors of the object itself: they show the rows that a later backward counts.
        """
        return {"sparse/rows": (self.sparse, self.rows), "sparse/left_max": (self.left, torch.ones_like(self.left))}


_current_stats: ContextVar[SparseStats | None] = ContextVar("fastrl_sparse_stats", default=None)


def current_sparse_stats() -> SparseStats | None:
    """Return the statistics that collect here, or None."""
    return _current_stats.get()


@contextmanager
def collect_sparse_stats(stats: SparseStats | None) -> Iterator[None]:
    """Count the rows of every gradient that is formed inside, also later, by the backward of an operation inside."""
    before = _current_stats.set(stats)
    try:
        yield
    finally:
        _current_stats.reset(before)


def check_tail_mass(tail_mass: Any) -> float:
    """Return `tail_mass` as a float in [0, 1), or raise."""
    value = checks.plain_float("tail_mass", tail_mass, low=0.0)
    if value >= 1.0:
        raise ValueError(f"tail_mass must be in [0, 1), 0 for the exact gradient, got {tail_mass!r}")
    return value


def rule_for(tail_mass: float, vocabulary: int, device: torch.device) -> Rule:
    """Return the rule of a `tail_mass` in (0, 1)."""
    bands = PLACES["cpu" if device.type == "cpu" else "other"]
    places, min_entries = next(row[1:] for row in bands if tail_mass <= row[0])
    places = min(places, max(vocabulary // VOCABULARY_PER_PLACE, LEAST_PLACES), vocabulary)
    return Rule(tail_mass, places, THRESHOLD_SHARE, CANDIDATES_PER_PLACE * places, min(min_entries, places // 2))


class _Kernels(NamedTuple):
    """The functions of a backend."""

    list_entries: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    times_matrix: Callable[..., Tensor]
    accumulate: Callable[..., None]


def _kernels(backend: str) -> _Kernels:
    if backend == "cpu":
        from fastrl.backends import cpu

        return _Kernels(cpu.sparse_rows, cpu.sparse_times_matrix, cpu.sparse_accumulate)
    if backend in ("triton", "cuda"):  # CUDA has no lists: Triton's come with PyTorch for the device
        from fastrl_kernels import sparse_rows as module
    else:
        from fastrl.backends import torch_rows as module
    return _Kernels(module.list_entries, module.times_matrix, module.accumulate)


def find(
    backend: str,
    logits: Tensor,  # (C, V) float32 or float64
    inputs: RowInputs,
    rule: Rule,
    **scalars: Any,
) -> Lists:
    """Return the entries of each row's gradient that matter, or that the row is dense. Only reads the logits.

    `scalars`: logit_scale, softcap and ignore_index, as for `backward_rows`.
    """
    found = _kernels(backend).list_entries(
        logits,
        inputs.labels,
        inputs.inv_temperature,
        inputs.outputs,
        inputs.grads,
        tail_mass=rule.tail_mass,
        places=rule.places,
        threshold=rule.threshold,
        candidates=rule.candidates,
        min_entries=rule.min_entries,
        **scalars,
    )
    return Lists(*found)


def times_matrix(backend: str, lists: Lists, matrix: Tensor) -> Tensor:
    """Return dlogits (C, V) @ matrix (V, D) of the sparse rows, 0 elsewhere, in the dtype of the values."""
    return _kernels(backend).times_matrix(*lists[:3], matrix)


def accumulate(
    backend: str,
    lists: Lists,
    states: Tensor,  # (C, D)
    total: Tensor | None,  # (V, D), the dtype of the values
    sums: Tensor | None,  # (V,), the dtype of the values
) -> None:
    """Add dlogits^T @ states of the sparse rows to `total`, and their sum over rows to `sums`, in a fixed order."""
    if total is not None or sums is not None:
        _kernels(backend).accumulate(*lists[:3], states, total, sums)


class Accumulators(Protocol):
    """The sums that `Collector` adds to, None for a gradient that is not asked for."""

    hidden: Tensor | None  # (rows, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)

    def add_rows(self, places: Tensor, states: Tensor, dlogits: Tensor) -> None:
        """Add rows dlogits (C, V), which may be followed by rows of zeros, at their places in `hidden`."""
        ...


class Collector:
    """Takes chunks of logits with the gradients of their outputs, and adds to the gradients of hidden, head and bias.

    Sparse rows go by their lists. Dense rows are gathered over the chunks until they fill one, so that a few of them
    cost a few rows of the two GEMMs. The order of all sums is fixed: the same input gives the same bits.
    """

    def __init__(self, rule: Rule, backend: str, room: int, weight: Tensor, scalars: dict[str, Any]) -> None:
        self.rule = rule
        self.backend = backend
        self.weight = weight  # (V, D)
        self.scalars = scalars
        self.stats = current_sparse_stats() or SparseStats(weight.device)
        self._room = -(-room // HELD_ROWS_MULTIPLE) * HELD_ROWS_MULTIPLE
        self._count = 0
        self._buffer: Tensor | None = None
        self._held: list[tuple[Tensor, Tensor]] = []

    def take(self, sums: Accumulators, places: Tensor, states: Tensor, logits: Tensor, inputs: RowInputs) -> None:
        """Add some chunks: their hidden states (C, D) and logits (C, V), which may be overwritten."""
        lists = find(self.backend, logits, inputs, self.rule, **self.scalars)
        self.stats.add(lists)
        # The one host synchronisation of a chunk on a GPU: the GEMMs of the dense rows have a size.
        dense = (lists.counts < 0).nonzero().squeeze(-1)
        if dense.numel() == places.numel():
            sums.add_rows(places, states, self._gradient(logits, inputs))
            return
        if sums.hidden is not None:
            sums.hidden[places] = times_matrix(self.backend, lists, self.weight).to(sums.hidden.dtype)
        accumulate(self.backend, lists, states, sums.weight, sums.bias)
        # A loss that couples the tokens of a sequence hands over several chunks at once, the room holds one.
        for some in dense.split(self._room) if dense.numel() else ():
            if self._count + some.numel() > self._room:
                self.flush(sums)
            self._hold(places[some], states[some], logits, some, inputs.at(some))

    def flush(self, sums: Accumulators) -> None:
        """Add the dense rows that are held."""
        if self._count == 0:
            return
        assert self._buffer is not None
        places, states = (torch.cat(column) for column in zip(*self._held, strict=True))
        whole = -(-self._count // HELD_ROWS_MULTIPLE) * HELD_ROWS_MULTIPLE
        self._buffer[self._count : whole] = 0.0
        if whole > self._count:
            states = torch.cat((states, states.new_zeros(whole - self._count, states.shape[1])))
        sums.add_rows(places, states, self._buffer[:whole])
        self._count, self._held = 0, []

    def _hold(self, places: Tensor, states: Tensor, logits: Tensor, dense: Tensor, inputs: RowInputs) -> None:
        if self._buffer is None:
            self._buffer = torch.empty((self._room, logits.shape[1]), dtype=logits.dtype, device=logits.device)
        rows = self._buffer[self._count : self._count + dense.numel()]
        torch.index_select(logits, 0, dense, out=rows)
        self._gradient(rows, inputs)
        self._held.append((places, states))
        self._count += dense.numel()

    def _gradient(self, logits: Tensor, inputs: RowInputs) -> Tensor:
        """Turn logits into their gradient, in place."""
        labels, inv_temperature, outputs, grads = inputs
        return backward_rows(self.backend, logits, labels, inv_temperature, outputs, grads, **self.scalars, out=logits)
