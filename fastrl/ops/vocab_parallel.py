"""Per-token log-prob, entropy and logsumexp if every rank of a group holds some rows of the LM head.

Rank r holds rows [start_r, stop_r) of the head, in rank order: any number of them, also none. Hidden states and labels
(ids of the whole vocabulary) are the same on every rank. Each rank reduces its part of a row's logits to four numbers.
One collective gathers the numbers of the whole call, and every rank merges them in rank order: all ranks hold the same
bits. The row kernels run unchanged, on the softmax over the part. Let P_r be the share of the probability that the part
holds and q_v the softmax within it. Then p_v = P_r q_v, so that

    g (1[v = y] - p_v) - h p_v (log p_v + H) + l p_v = g 1[v = y] - h' q_v (log q_v + H_r) + l' q_v
    h' = P_r h,    l' = P_r (l - g - h (log P_r + H - H_r)),    H_r the entropy of q

and the label's entry, which needs 1 - p_y to its relative precision, is written by the rank that holds it.

Collectives of a call:

    forward     a dozen integers (sizes, and the values that must be equal on all ranks)
    forward     4 float64 per live token
    backward    an all-to-all and an all-gather that sum dX in rank order, if the hidden states need a gradient

The last two move as many bytes as a ring all-reduce. Unlike there, the sum for a token depends neither on its place in
the batch nor on the algorithm that the communication library picks. The head's gradients stay local.

GEMM units, each of 2 N V_r D flop:

    forward only                                              1
    training                                                  1 + 3
    frozen head, function of the log-probs                    2
    frozen head, any output, with `keep_token_grads=False`    3

The last path cannot take 2: h' and l' need the shares of all parts, which no part knows while its logits are there. dX
takes the logits again, or would take two products, with q_v and with q_v log q_v.

Legend: N tokens, L live tokens, D hidden, V vocabulary, V_r rows of the head on this rank, R ranks, C rows of a chunk.
"""

from __future__ import annotations

import math
import operator
import struct
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice
from fastrl.ops.chunks import Chunks
from fastrl.ops.gradients import Gradients, _times_weight
from fastrl.ops.head import IGNORED, HeadArguments, HeadOptions, LinearRows, check_savable, head_options
from fastrl.ops.rows import TokenLogprobs, backward_rows, forward_rows, once_differentiable

# Label of the rows that the row kernels leave out: labels within a part are never negative.
LEFT_OUT = -1


class Merged(NamedTuple):
    """Rows merged over the parts of their vocabulary, in float64."""

    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,)
    logsumexp: Tensor  # (N,)
    log_share: Tensor  # (R, N) log of the share of the probability that each part holds, -inf if it holds none


class PartRows(NamedTuple):
    """The results of a part of some rows that its backward needs, (N,) each."""

    label: Tensor  # the largest entry, on which the row kernels run, or LEFT_OUT where there is no finite one
    slope: Tensor  # du_y/dx_y where the part holds y, else 0
    logprobs: Tensor  # these four from `forward_rows`
    entropy: Tensor
    logsumexp: Tensor
    residual: Tensor  # (0,) where the backend has none


@dataclass(frozen=True)
class Part:
    """The rows of the head that this rank holds, and the group that holds the others."""

    start: int
    stop: int
    vocabulary: int
    rank: int
    ranks: int
    group: Any  # dist.ProcessGroup


@torch.compiler.disable
def linear_token_logprobs_parallel(
    hidden: Tensor,  # (..., D), the same on every rank
    weight: Tensor,  # (V_r, D)
    labels: Tensor,  # (...), the same on every rank
    *,
    group: Any,
    bias: Tensor | None = None,  # (V_r,)
    temperature: float | Tensor | None = 1.0,
    keep_token_grads: bool = True,
    **arguments: Unpack[HeadArguments],
) -> TokenLogprobs:
    """Return the results of `linear_token_logprobs` for a head whose rows the ranks of `group` hold in rank order.

    Every rank of the group must call this, and run the backward through it, with the same hidden states, labels and
    options. If ranks disagree, all of them raise, as far as this shows without a comparison of the hidden states. The
    gradient of `hidden` is complete on every rank, with the same bits: do not reduce it again. Under
    sequence parallelism gather the hidden states first, and let the backward of that gather keep each rank's slice.

    Args:
        hidden: (..., D) hidden states.
        weight: (V_r, D) rows of the head on this rank. V_r may differ between ranks and be 0. A DTensor must be sharded
            along dimension 0 over a 1-D mesh of the ranks of `group`.
        labels: (...) ids of the whole vocabulary, V = sum of V_r.
        group: the `torch.distributed` process group.
        bias: (V_r,) the entries of the bias that belong to `weight`, on every rank or on none.
        temperature: as `linear_token_logprobs`.
        arguments: `logit_scale`, `softcap`, `ignore_index`, `chunk_tokens`, `backend`: as `linear_token_logprobs`.
            For `tail_mass`, 0.0, the exact gradient, is the only value offered.
        keep_token_grads: as `linear_token_logprobs`.

    Returns:
        `TokenLogprobs` with the same bits on every rank, differentiable once with respect to `hidden`, `weight` and
        `bias`. Extra memory in bytes: one chunk of logits, C V_r 4. The head's gradient, V_r D 4 until it is cast. In
        the backward two copies of dX, 2 N D 4. With `keep_token_grads` and a frozen head the forward keeps N D 4.

    Raises:
        ValueError, TypeError, RuntimeError: as `linear_token_logprobs`. If one rank raises, all do.
    """
    rank, ranks = _place(group)
    refused: Exception | None = None
    rows = None
    try:
        rows = _checked(group, (hidden, weight, labels, bias), temperature, arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        refused = error
    # Also with a refused argument: the other ranks wait in this collective.
    device = _collective_device(group, hidden, weight, labels)
    sizes = _agree(rows, refused, group, device)
    assert rows is not None
    start, vocabulary = sum(sizes[:rank]), sum(sizes)
    if vocabulary == 0:
        raise ValueError("weight is empty on every rank of tp_group: the parts of the head must add up to V >= 1 rows")
    checks.labels("labels", labels, labels.shape, rows.hidden.device, vocabulary, rows.options.ignore_index)
    part = Part(start, start + sizes[rank], vocabulary, rank, ranks, group)
    keep = keep_token_grads and torch.is_grad_enabled() and rows.hidden.requires_grad and not rows.trains_head
    plan = _Plan(rows.options, part, keep)
    outputs = _VocabParallel.apply(rows.hidden, rows.weight, rows.bias, rows.labels, rows.inv_temperature, plan)
    return TokenLogprobs(*(rows.restored(x) for x in outputs))


def _place(group: Any) -> tuple[int, int]:
    """Return (rank, number of ranks) of this process in the group, or raise."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("tp_group needs torch.distributed: call torch.distributed.init_process_group first")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"tp_group must be a torch.distributed.ProcessGroup that holds this process, got {type(group).__name__}; "
            "of a 1-D DeviceMesh pass mesh.get_group()"
        )
    return dist.get_rank(group), dist.get_world_size(group)


def _checked(
    group: Any,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],  # hidden, weight, labels, bias
    temperature: Any,
    arguments: HeadArguments,
) -> LinearRows:
    """Return the rows of this rank, or raise. Label values are checked once the size of the vocabulary is known."""
    hidden, weight, labels, bias = tensors
    if (tail_mass := arguments.get("tail_mass", 0.0)) != 0.0:
        raise ValueError(f"tail_mass must be 0.0 (the exact gradient) with tp_group, got {tail_mass!r}")
    checks.vocabulary_tensor("hidden", hidden)
    weight = checks.vocabulary_tensor("weight", _local("weight", weight, group))
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (V_r, D={hidden.shape[-1] if hidden.dim() else '?'}), this rank's rows of the head, got "
            f"{tuple(weight.shape)}; a head that ZeRO-3 or FSDP has partitioned must be gathered first (ZeRO-3: "
            "GatheredParameters; FSDP: call through the wrapped module's forward)"
        )
    checks.same_device("weight", weight, hidden.device)
    if bias is not None:
        bias = checks.vocabulary_tensor("bias", _local("bias", bias, group))
        checks.same_shape("bias", bias, weight.shape[:1])
        checks.same_device("bias", bias, hidden.device)
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be an int64 or int32 tensor, got {getattr(labels, 'dtype', type(labels))}")
    checks.same_shape("labels", labels, hidden.shape[:-1])
    checks.same_device("labels", labels, hidden.device)
    check_savable(hidden, weight)
    ignored = operator.index(arguments.get("ignore_index", IGNORED))
    chosen = head_options(hidden.device, **{**arguments, "ignore_index": ignored})
    return LinearRows.of(hidden, weight, labels, bias, temperature, chosen)


def _local(name: str, value: Any, group: Any) -> Any:
    """Return the rows of a DTensor that this rank holds, or `value` itself. Raise unless they lie in group order."""
    if type(value).__name__ != "DTensor":
        return value
    mesh, placements = value.device_mesh, value.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise TypeError(
            f"{name} is a DTensor with placements {tuple(placements)} on a {mesh.ndim}-D mesh; with tp_group it must "
            f"be Shard(0) on a 1-D mesh of the group's ranks: redistribute it, or pass the plain tensor of this rank's "
            "rows (FSDP: call through the wrapped module's forward, which gathers it)"
        )
    here, there = dist.get_process_group_ranks(group), dist.get_process_group_ranks(mesh.get_group())
    if here != there:
        raise ValueError(f"{name} is a DTensor sharded over ranks {there}, tp_group has ranks {here}")
    return value.to_local()


_SHARED = (
    "number of tokens",
    "hidden size",
    "dtype",
    "gradient mode (torch.no_grad, hidden.requires_grad)",
    "presence of a bias",
    "logit_scale",
    "softcap",
    "ignore_index",
    "labels",
    "temperature",
)


def _agree(rows: LinearRows | None, refused: Exception | None, group: Any, device: torch.device) -> list[int]:
    """Return the number of rows of the head on every rank. Raise on all ranks if one was refused or they differ.

    Without this a rank that raises, or that needs a collective which the others do not, would leave them waiting.
    """
    size, shared = 0, [0] * len(_SHARED)
    if rows is not None:
        size, shared = rows.weight.shape[0], _shared_values(rows)
    rank, ranks = _place(group)
    mine = torch.tensor([int(rows is not None), size, *shared], dtype=torch.int64, device=device)
    every = _gathered(mine, group, ranks).tolist()
    if refused is not None:
        raise refused
    failed = [r for r in range(ranks) if not every[r][0]]
    if failed:
        raise ValueError(f"ranks {failed} of tp_group refused their arguments; their own errors say why")
    for i, name in enumerate(_SHARED, start=2):
        differ = [r for r in range(ranks) if every[r][i] != every[0][i]]
        if differ:
            raise ValueError(
                f"the ranks of tp_group must be given the same tokens and options: {name} of ranks {differ} differs "
                f"from that of rank 0 (here, rank {rank})"
            )
    return [row[1] for row in every]


def _shared_values(rows: LinearRows) -> list[int]:
    """Return one integer for each of `_SHARED`. Tensors of numbers per token go in as a checksum."""
    trains = torch.is_grad_enabled() and rows.hidden.requires_grad
    flat = rows.labels.long()
    position = torch.arange(1, 2 * flat.numel(), 2, device=flat.device) if flat.numel() else flat
    temperature = rows.inv_temperature.double().view(torch.int64)
    sums = torch.stack(((flat * position).sum(), (temperature * position).sum())).tolist()
    return [
        flat.numel(),
        rows.hidden.shape[-1],
        checks.FLOAT_DTYPES.index(rows.hidden.dtype),
        int(trains),
        int(rows.bias is not None),
        _bits(rows.options.logit_scale),
        _bits(rows.options.softcap),
        rows.options.ignore_index,
        *sums,
    ]


def _bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _collective_device(group: Any, *arguments: Any) -> torch.device:
    """Return the device on which the ranks exchange integers, also where an argument was refused."""
    for x in arguments:
        if isinstance(x, Tensor) and x.device.type not in ("cpu", "meta"):
            return x.device
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def merge_shards(
    statistics: Tensor,  # (R, N, 4)
    inv_temperature: Tensor | None = None,  # (N,)
) -> Merged:
    """Return log-prob, entropy and logsumexp of rows from the statistics of the parts of their vocabulary.

    With u the logits before 1/T, m their maximum over the part and the sums over the part's entries, the columns are

        m
        sum_{v != y} e^((u_v - m)/T)
        sum_v e^((u_v - m)/T) (u_v - m)/T
        u_y if the part holds y, else -inf

    The label stays out of the first sum, so that log p_y = -log(1 + others / e_y) keeps its relative precision as
    p_y -> 1. A part without a finite entry is (-inf, 0, 0, -inf). Parts are added in their order, row by row: the bits
    of a row depend on nothing but its statistics. A row without a finite entry in any part is NaN.

    Args:
        statistics: of the R parts. The arithmetic is in float64.
        inv_temperature: 1/T per row, 1 unless given.
    """
    maximum, others, weighted, target = statistics.double().unbind(-1)
    factor = torch.ones_like(maximum[0]) if inv_temperature is None else inv_temperature.double()
    top, label = maximum.amax(0), target.amax(0)
    # Not where all parts are -inf: there -inf - -inf makes the NaN that such a row is.
    absent = maximum.isneginf() & ~top.isneginf()
    shift = torch.where(absent, 0.0, (maximum - top) * factor)
    scale = torch.where(absent, 0.0, shift.exp())
    own_label = torch.where(target.isneginf(), 0.0, ((target - maximum) * factor).exp())
    whole = others + own_label
    rest, first_moment = torch.zeros_like(top), torch.zeros_like(top)
    for r in range(statistics.shape[0]):
        rest = rest + scale[r] * others[r]
        first_moment = first_moment + scale[r] * (weighted[r] + whole[r] * shift[r])
    e_label = ((label - top) * factor).exp()
    log_sum = torch.where(e_label == 1.0, rest.log1p(), (rest + e_label).log())
    logprobs = torch.where(e_label > rest, -torch.log1p(rest / e_label), (label - top) * factor - log_sum)
    return Merged(
        logprobs,
        log_sum - first_moment / (rest + e_label),
        top * factor + log_sum,
        torch.where(absent, -math.inf, shift + whole.log() - log_sum),
    )


def part_statistics(
    logits: Tensor,  # (C, V_r)
    target: Tensor,  # (C,) label minus the part's first row, outside [0, V_r) if another part holds it
    inv_temperature: Tensor,  # (C,)
    head: HeadOptions,
) -> tuple[Tensor, PartRows]:
    """Return the statistics (C, 4) of one part of some rows, and the results that its backward needs.

    The row kernels run with the largest entry as the label: its log-prob is -log of the part's sum, to relative
    precision.
    """
    extreme, label = logits.max(-1) if head.logit_scale > 0 else logits.min(-1)
    top, _ = _before_temperature(extreme, head)
    label = torch.where(top.isneginf(), LEFT_OUT, label)
    outputs = forward_rows(head.backend, logits, label, inv_temperature, **_scalars(head))
    held = (target >= 0) & (target < logits.shape[1])
    entry, slope = _before_temperature(logits.gather(-1, _index(target, held)).squeeze(-1), head)
    log_sum = -outputs[0].double()
    e_label = ((entry - top) * inv_temperature.double()).exp()
    # Where the label is the largest entry, S - 1 has the precision of the kernel's sum of the other entries.
    without = torch.where(entry == top, log_sum.expm1(), log_sum.exp() - e_label)
    others = torch.where(held, without, log_sum.exp())
    weighted = log_sum.exp() * (log_sum - outputs[1].double())
    empty = label == LEFT_OUT
    statistics = (
        top,
        torch.where(empty, 0.0, others),
        torch.where(empty, 0.0, weighted),
        torch.where(held, entry, -math.inf),
    )
    return torch.stack(statistics, -1), PartRows(label, torch.where(held, slope, 0.0), *outputs)


def _before_temperature(x: Tensor, head: HeadOptions) -> tuple[Tensor, Tensor]:
    """Return (u, du/dx) of some logits in float64, where u / T is the logit after scale and softcap."""
    u = x.double() * head.logit_scale
    if head.softcap == 0.0:
        return u, torch.full_like(u, head.logit_scale)
    squashed = torch.tanh(u / head.softcap)
    return head.softcap * squashed, (1.0 - squashed.square()) * head.logit_scale


def _index(target: Tensor, held: Tensor) -> Tensor:
    return torch.where(held, target, 0).long().unsqueeze(-1)


def _scalars(head: HeadOptions) -> dict[str, Any]:
    return {"logit_scale": head.logit_scale, "softcap": head.softcap, "ignore_index": LEFT_OUT}


@dataclass(frozen=True)
class _Plan:
    """The arguments of `_VocabParallel` that are not tensors."""

    options: HeadOptions
    part: Part
    keep_token_grads: bool


class _Rows(NamedTuple):
    """Live rows as the part sees them, (L,) each."""

    target: Tensor  # label minus the part's first row
    inv_temperature: Tensor
    part: PartRows
    logprobs: Tensor
    entropy: Tensor
    log_share: Tensor

    @classmethod
    def of(cls, tensors: list[Tensor]) -> _Rows:
        """Return the rows from the tuple of `tensors`."""
        target, inv_temperature, logprobs, entropy, log_share, *part = tensors
        return cls(target, inv_temperature, PartRows(*part), logprobs, entropy, log_share)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors, in an order of its own."""
        return self.target, self.inv_temperature, self.logprobs, self.entropy, self.log_share, *self.part

    def at(self, index: Tensor | slice) -> _Rows:
        """Return some of the rows."""
        part = PartRows(*(x[index] if x.numel() else x for x in self.part))
        merged = (x[index] for x in (self.logprobs, self.entropy, self.log_share))
        return _Rows(self.target[index], self.inv_temperature[index], part, *merged)

    def upstream(self, g: Tensor | None, h: Tensor | None, ell: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return (h', l', dL/dx_y) of the module's formula from the gradients of the three outputs."""
        share, p = self.log_share.exp(), self.logprobs.exp()
        constant, entry = torch.zeros_like(share), torch.zeros_like(share)
        if g is not None:
            constant, entry = constant - g, entry - g * torch.expm1(self.logprobs)
        if ell is not None:
            constant, entry = constant + ell, entry + ell * p
        if h is not None:
            within = self.log_share + self.entropy - self.part.entropy.double()
            constant = constant - torch.where(share == 0, 0.0, h * within)
            entry = entry - torch.where(p == 0, 0.0, h * p * (self.logprobs + self.entropy))
        return (
            None if h is None else h * share,
            constant * share,
            entry * self.part.slope * self.inv_temperature.double(),
        )

    def dlogits(self, logits: Tensor, head: HeadOptions, h: Tensor | None, ell: Tensor, entry: Tensor) -> Tensor:
        """Turn the logits (C, V_r) into their gradient, in place, from h', l' and the label's entry, (C,) each."""
        dtype = logits.dtype
        outputs = (self.part.logprobs, self.part.entropy, self.part.logsumexp, self.part.residual)
        grads = (None, None if h is None else h.to(dtype), ell.to(dtype))
        result = backward_rows(
            head.backend, logits, self.part.label, self.inv_temperature, outputs, grads, **_scalars(head), out=logits
        )
        held = (self.target >= 0) & (self.target < logits.shape[1])
        index = _index(self.target, held)
        held, entry = held.unsqueeze(-1), entry.to(dtype).unsqueeze(-1)
        return result.scatter_(-1, index, torch.where(held, entry, result.gather(-1, index)))


class _VocabParallel(torch.autograd.Function):
    """(hidden, weight, bias) -> (logprobs, entropy, logsumexp), (N,) each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        inv_temperature: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options, part = plan.options, plan.part
        with choice.autocast_disabled(hidden.device):
            chunks = Chunks.of(LinearRows(hidden, weight, bias, labels, inv_temperature, options))
            target, row_inv_temperature = labels[chunks.live].long() - part.start, inv_temperature[chunks.live]
            statistics, local, token_grads = _scan(chunks, target, row_inv_temperature, plan)
        merged = merge_shards(_gathered(statistics, part.group, part.ranks), row_inv_temperature)
        label = target + part.start
        # Reached only where values are not checked: an id that no rank holds.
        unheld = (label < 0) | (label >= part.vocabulary)
        merged = Merged(*(torch.where(unheld, math.nan, x) for x in merged))
        rows = _Rows(target, row_inv_temperature, local, merged.logprobs, merged.entropy, merged.log_share[part.rank])
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels, inv_temperature, chunks.live, token_grads, *rows.tensors())
        logprobs, entropy, logsumexp = (chunks.scattered(x.to(checks.wide(hidden.dtype))) for x in merged[:3])
        return logprobs, entropy, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        once_differentiable()
        needs = tuple(bool(x) for x in ctx.needs_input_grad[:3])
        if not any(needs) or all(g is None for g in grads):
            return (None,) * 6
        hidden, weight, bias, labels, inv_temperature, live, token_grads, *saved = ctx.saved_tensors
        plan, rows = ctx.plan, _Rows.of(saved)
        chunks = Chunks(LinearRows(hidden, weight, bias, labels, inv_temperature, plan.options), live)
        g, h, ell = (None if x is None else x[live].double() for x in grads)
        with choice.autocast_disabled(hidden.device):
            partial = _room(chunks, plan.part.ranks) if needs[0] else None
            if plan.keep_token_grads and g is not None and h is None and ell is None and partial is not None:
                _scale_token_grads(partial, token_grads, weight, rows, g)
                dweight = dbias = None
            else:
                dweight, dbias = _accumulate(chunks, rows, (g, h, ell), (needs[1], needs[2]), partial)
        dhidden = None
        if partial is not None:
            dhidden = chunks.scattered(_summed(partial, plan.part, hidden.dtype)[: live.numel()])
        return dhidden, dweight, dbias, None, None, None


def _scan(chunks: Chunks, target: Tensor, inv_temperature: Tensor, plan: _Plan) -> tuple[Tensor, PartRows, Tensor]:
    """Return the statistics (L, 4) of this part, its `PartRows`, and the token gradients (L, D).

    A token gradient is d log q_y / d hidden if the part holds y, else minus the gradient of the part's logsumexp.
    """
    n, dtype, device = chunks.live.numel(), chunks.dtype, chunks.rows.hidden.device
    statistics = torch.zeros((n, 4), dtype=torch.float64, device=device)
    statistics[:, 0] = statistics[:, 3] = -math.inf
    label = torch.full((n,), LEFT_OUT, device=device)
    slope = torch.zeros(n, dtype=torch.float64, device=device)
    first, second, third = (torch.zeros(n, dtype=dtype, device=device) for _ in range(3))
    residual = torch.zeros(n if choice.needs_lse_residual(plan.options.backend) else 0, dtype=dtype, device=device)
    kept = PartRows(label, slope, first, second, third, residual)
    token_grads = torch.zeros(
        (n if plan.keep_token_grads else 0, chunks.rows.hidden.shape[1]), dtype=dtype, device=device
    )
    if chunks.rows.weight.shape[0] == 0:
        return statistics, kept, token_grads
    for at, _, logits in chunks:
        found, values = part_statistics(logits, target[at], inv_temperature[at], plan.options)
        statistics[at] = found
        for out, value in zip(kept, values, strict=True):
            if out.numel():
                out[at] = value
        if plan.keep_token_grads:
            # Within the part alone the label's entry is 1 - q_y = others / S, and P_r = 1.
            e_label = torch.where(
                found[:, 3].isneginf(), 0.0, ((found[:, 3] - found[:, 0]) * inv_temperature[at]).exp()
            )
            entry = found[:, 1] / (found[:, 1] + e_label) * values.slope * inv_temperature[at]
            entry = torch.where(values.label == LEFT_OUT, 0.0, entry)
            nothing = torch.zeros_like(entry)
            rows = _Rows(target[at], inv_temperature[at], values, nothing, nothing, nothing)
            token_grads[at] = _times_weight(
                rows.dlogits(logits, plan.options, None, nothing - 1.0, entry), chunks.rows.weight
            )
    return statistics, kept, token_grads


def _scale_token_grads(partial: Tensor, token_grads: Tensor, weight: Tensor, rows: _Rows, g: Tensor) -> None:
    """Write this part's share of dX from the token gradients.

    1[v = y] - P q_v = P (1[v = y] - q_v) + (1 - P) 1[v = y], of which no term loses precision as p_y -> 1.
    """
    n = token_grads.shape[0]
    share = rows.log_share.exp()
    partial[:n] = (g * share).to(token_grads.dtype).unsqueeze(-1) * token_grads
    if weight.shape[0] == 0:
        return
    held = (rows.target >= 0) & (rows.target < weight.shape[0])
    missing = torch.where(held, -torch.expm1(rows.log_share) * g * rows.part.slope * rows.inv_temperature.double(), 0.0)
    partial[:n].addcmul_(
        missing.to(token_grads.dtype).unsqueeze(-1), weight[_index(rows.target, held).squeeze(-1)].to(token_grads.dtype)
    )


def _accumulate(
    chunks: Chunks,
    rows: _Rows,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: tuple[bool, bool],
    partial: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Form the logits again, return (dweight, dbias) of this part and add its share of dX to `partial`."""
    nonzero = torch.stack([x != 0 for x in grads if x is not None]).any(0)
    # Rows without a gradient are left out here, and only here: the collectives see all live rows on every rank.
    active = nonzero.nonzero().squeeze(-1)
    chosen, some = replace(chunks, live=chunks.live[active]), rows.at(active)
    h, ell, entry = some.upstream(*(None if x is None else x[active] for x in grads))
    gradients = Gradients(chosen, (False, *needs))
    for at, states, logits in chosen if chunks.rows.weight.shape[0] else ():
        dlogits = some.at(at).dlogits(logits, chunks.rows.options, None if h is None else h[at], ell[at], entry[at])
        if partial is not None:
            partial[active[at]] = _times_weight(dlogits, chunks.rows.weight)
        gradients.add(at, states, dlogits)
    _, dweight, dbias = gradients.cast()
    return dweight, dbias


def _gathered(
    mine: Tensor,  # (...)
    group: Any,
    ranks: int,
) -> Tensor:  # (R, ...)
    """Return the tensors of all ranks, which have one shape, in rank order."""
    every = torch.empty((ranks, *mine.shape), dtype=mine.dtype, device=mine.device)
    # `all_gather_into_tensor` is called `all_gather_single` since PyTorch 2.13, and the old name warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    if mine.numel():
        gather(every.view(-1), mine.contiguous().view(-1), group=group)
    return every


def _room(chunks: Chunks, ranks: int) -> Tensor:
    """Return zeros for the gradient of the live rows, (L, D) padded to a number of rows that the ranks can share."""
    rows = -(-chunks.live.numel() // ranks) * ranks
    return torch.zeros((rows, chunks.rows.hidden.shape[1]), dtype=chunks.dtype, device=chunks.rows.hidden.device)


def _summed(partial: Tensor, part: Part, dtype: torch.dtype) -> Tensor:
    """Return the sum of `partial` over the ranks, added in rank order and cast: the same bits on every rank.

    Every rank adds up its share of the rows, and the sums are gathered.
    """
    if partial.numel() == 0:
        return partial.to(dtype)
    received = torch.empty_like(partial)
    dist.all_to_all_single(received, partial, group=part.group)
    shares = received.view(part.ranks, -1, partial.shape[1])
    total = shares[0]
    for r in range(1, part.ranks):
        total += shares[r]
    return _gathered(total.to(dtype), part.group, part.ranks).view(partial.shape)
