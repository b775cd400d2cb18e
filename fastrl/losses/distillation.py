"""Distillation: the divergence of a student from a teacher over the whole vocabulary, without the logits in memory.

Rows go through both heads in chunks. The forward forms the gradient of a chunk while its logits exist. The backward
only scales it, in place unless the graph is kept. Masked rows are dropped before the first GEMM.

Legend: N tokens, D hidden (S student's, T teacher's), V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice, memory
from fastrl.losses.output import LossOutput
from fastrl.losses.scalars import divisor, result_dtype
from fastrl.ops.chunks import Chunks
from fastrl.ops.fused import graph_is_kept, release_gradient
from fastrl.ops.gradients import Gradients
from fastrl.ops.head import HeadOptions, LinearRows
from fastrl.ops.rows import once_differentiable

IGNORE_INDEX = -100


# Fewer rows than elsewhere: several tiles of C x V live at once, logits, log-probs and probabilities of both models.
CPU_CHUNK_TOKENS = 256


GPU_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Divergence:
    """The choice of divergence: every parameter of the row arithmetic that is not a tensor."""

    beta: float
    temperature: float
    top_k: int | None
    gradient: bool

    def rows(self, student: Tensor, teacher: Tensor) -> Rows:
        """Return the divergence of a chunk of logits (C, V), already divided by the temperature."""
        return divergence_rows(student, teacher, self.beta, self.top_k, self.gradient)


def distillation_loss(
    student_hidden: Tensor,  # (..., DS)
    student_weight: Tensor,  # (V, DS)
    teacher_hidden: Tensor,  # (..., DT)
    teacher_weight: Tensor,  # (V, DT)
    mask: Tensor,  # (...)
    *,
    beta: float,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | None = None,  # (V,)
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    n_tokens: float | Tensor | None = None,
    chunk_tokens: int | None = None,
    top_k: int | None = None,
) -> LossOutput:
    """Return the generalised Jensen-Shannon divergence of two heads, as a mean over live tokens.

        z = softcap tanh(logit_scale (hidden weight^T + bias) / softcap) / temperature        for each model
        beta = 0: KL(T || S)    beta = 1: KL(S || T)    else: beta KL(T || M) + (1 - beta) KL(S || M)
        M = (1 - beta) S + beta T;  loss = sum over live tokens / n_tokens

    in nats, not scaled by temperature^2 (GKD, arXiv 2306.13649). beta = 0 has the gradient of the cross-entropy with
    the teacher's probabilities, which is larger by the teacher's entropy.

    The gradient is with respect to `student_hidden`, `student_weight` and `student_bias`. A tensor that requires none
    costs nothing, and the teacher gets none. If the teacher excludes an entry (-inf) that the student does not, reverse
    KL is infinite and its gradient NaN.

    Extra memory: up to ten tiles of chunk_tokens x V, and the gradients. Those of the head and of float16 stay in
    float32 until the backward scales and rounds them.

    Args:
        student_hidden, teacher_hidden: hidden states at the same tokens. The widths may differ.
        student_weight, teacher_weight: heads over the same vocabulary.
        mask: 0/1 or bool. Rows with 0 have no effect and reach neither head.
        beta: in [0, 1].
        temperature: of both models, > 0.
        student_softcap, teacher_softcap: bound c of c tanh(x / c), or None.
        student_bias, teacher_bias: (V,), or None. -inf excludes a token.
        student_logit_scale, teacher_logit_scale: factors on the logits, before the softcap.
        n_tokens: the global number of live tokens, for micro-batches and ranks.
        chunk_tokens: rows of a chunk, None: 256 on a CPU and 512 elsewhere.
        top_k: compare the teacher's K likeliest entries, and the rest as one bucket. None: every entry.

    Returns:
        LossOutput with metrics divergence and student_entropy. `.entropy` is the student's, per token.

    Raises:
        ValueError, TypeError: different vocabularies, token shapes or devices, numbers out of range.
    """
    how = _divergence(beta, temperature, top_k)
    labels, poison = _live_labels(mask, student_hidden)
    if chunk_tokens is None:
        chunk_tokens = CPU_CHUNK_TOKENS if student_hidden.device.type == "cpu" else GPU_CHUNK_TOKENS
    options: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "chunk_tokens": chunk_tokens, "backend": "torch"}
    student = LinearRows.checked(
        student_hidden,
        student_weight,
        labels,
        bias=student_bias,
        logit_scale=student_logit_scale,
        softcap=student_softcap,
        **options,
    )
    checks.float_tensor("teacher_hidden", teacher_hidden)
    checks.float_tensor("teacher_weight", teacher_weight)
    if tuple(teacher_hidden.shape[:-1]) != tuple(labels.shape):
        raise ValueError(
            f"teacher_hidden must be (..., DT) at the student's tokens {tuple(labels.shape)}, "
            f"got shape {tuple(teacher_hidden.shape)}"
        )
    checks.same_device("teacher_hidden", teacher_hidden, student_hidden.device)
    teacher = LinearRows.checked(
        teacher_hidden.detach(),
        teacher_weight.detach(),
        labels,
        bias=None if teacher_bias is None else teacher_bias.detach(),
        logit_scale=teacher_logit_scale,
        softcap=teacher_softcap,
        **options,
    )
    _same_vocabulary(student.weight.shape[0], teacher.weight.shape[0])
    total, entropy = _LinearDistillation.apply(student.hidden, student.weight, student.bias, student, teacher, how)
    return _output(total, entropy.view(labels.shape), labels, n_tokens, poison)


def distillation_loss_from_logits(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    mask: Tensor,  # (...)
    *,
    beta: float,
    temperature: float = 1.0,
    n_tokens: float | Tensor | None = None,
    chunk_tokens: int | None = None,
    top_k: int | None = None,
) -> LossOutput:
    """Return `distillation_loss` of given logits, with its gradient with respect to `student_logits`.

    Extra memory: up to ten tiles of chunk_tokens x V, and the gradient in the dtype of `student_logits`.
    A float16 gradient stays in float32 until the backward scales and rounds it.
    """
    how = _divergence(beta, temperature, top_k)
    checks.float_tensor("student_logits", student_logits)
    checks.float_tensor("teacher_logits", teacher_logits)
    if student_logits.dim() < 1 or student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"teacher_logits must be (..., V) at the student's tokens {tuple(student_logits.shape[:-1])}, "
            f"got shape {tuple(teacher_logits.shape)}"
        )
    _same_vocabulary(student_logits.shape[-1], teacher_logits.shape[-1])
    checks.same_device("teacher_logits", teacher_logits, student_logits.device)
    labels, poison = _live_labels(mask, student_logits)
    if chunk_tokens is None:
        chunk_tokens = CPU_CHUNK_TOKENS if student_logits.device.type == "cpu" else GPU_CHUNK_TOKENS
    checks.plain_float("chunk_tokens", chunk_tokens, low=1)
    total, entropy = _LogitDistillation.apply(student_logits, teacher_logits.detach(), labels, int(chunk_tokens), how)
    return _output(total, entropy, labels, n_tokens, poison)


def sampled_distillation_advantages(
    logprobs: Tensor,  # any shape
    teacher_logprobs: Tensor,  # the same shape
) -> Tensor:
    """Return teacher - student log-prob of the sampled tokens, detached: the advantages of on-policy distillation.

    With a policy-gradient surrogate their expectation is the gradient of -KL(S || T) per token. The teacher's log-probs
    are its only pass over the vocabulary (arXiv 2306.13649, section 3).

    Raises:
        ValueError: shapes or devices that differ.
    """
    checks.float_tensor("logprobs", logprobs)
    checks.float_tensor("teacher_logprobs", teacher_logprobs)
    checks.same_shape("teacher_logprobs", teacher_logprobs, logprobs.shape)
    checks.same_device("teacher_logprobs", teacher_logprobs, logprobs.device)
    dtype = result_dtype(logprobs)
    return teacher_logprobs.detach().to(dtype) - logprobs.detach().to(dtype)


# --- from hidden states -----------------------------------------------------------------------------------------------


def _capped(logits: Tensor, head: HeadOptions, inv_temperature: float, slope: bool) -> tuple[Tensor, Tensor | float]:
    """Return (z, dz/dlogits where asked for) of raw logits (C, V), which are overwritten."""
    if head.softcap == 0.0:
        return logits.mul_(head.logit_scale).mul_(inv_temperature), head.logit_scale * inv_temperature
    bent = logits.mul_(head.logit_scale / head.softcap).tanh_()
    slopes = bent.square().neg_().add_(1.0).mul_(head.logit_scale * inv_temperature) if slope else 1.0
    return bent.mul_(head.softcap).mul_(inv_temperature), slopes


class _LinearDistillation(torch.autograd.Function):
    """Sum over live rows of the divergence, and the student's entropy per row; the gradient is formed on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, DS)
        weight: Tensor,  # (V, DS)
        bias: Tensor | None,  # (V,)
        student_rows: LinearRows,  # hidden, weight and bias once more: autograd follows arguments only
        teacher_rows: LinearRows,
        how: Divergence,
    ) -> tuple[Tensor, Tensor]:
        student = Chunks.of(replace(student_rows, hidden=hidden, weight=weight, bias=bias))
        teacher = Chunks(teacher_rows, student.live)
        needs_hidden, needs_weight, needs_bias = (needed and how.gradient for needed in ctx.needs_input_grad[:3])
        needs = (needs_hidden, needs_weight, needs_bias)
        gradients = Gradients(student, needs, unscaled=True)
        dtype = result_dtype(hidden)
        total = torch.zeros((), dtype=torch.float64 if hidden.device.type != "mps" else dtype, device=hidden.device)
        entropy = torch.empty(student.live.numel(), dtype=dtype, device=hidden.device)
        with choice.autocast_disabled(hidden.device):
            for (rows, states, logits), (_, _, teacher_logits) in zip(student, teacher, strict=True):
                z, slope = _capped(logits, student_rows.options, 1.0 / how.temperature, any(needs))
                z_teacher, _ = _capped(teacher_logits, teacher_rows.options, 1.0 / how.temperature, False)
                result = how.rows(z, z_teacher.to(dtype))
                total += result.divergence.sum(dtype=total.dtype)
                entropy[rows] = result.entropy
                if result.gradient is not None and any(needs):
                    gradients.add(rows, states, result.gradient.mul_(slope))
                # Free the tiles of this chunk before the next ones are made.
                del result, slope
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        entropy = student.scattered(entropy)
        ctx.mark_non_differentiable(entropy)
        return total.to(dtype), entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        once_differentiable()
        keep, backend = graph_is_kept(), choice.choose("auto", grad_total.device).backend
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        released = [release_gradient(gradient, dtype, grad_total, backend, keep=keep) for gradient, dtype in pairs]
        return (*released, None, None, None)


# --- from logits ------------------------------------------------------------------------------------------------------


class _LogitDistillation(torch.autograd.Function):
    """The same from logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (..., V)
        teacher_logits: Tensor,  # (..., V)
        labels: Tensor,  # (...)
        chunk_tokens: int,
        how: Divergence,
    ) -> tuple[Tensor, Tensor]:
        dtype = result_dtype(logits)
        live = (labels != IGNORE_INDEX).nonzero()  # (L, leading dimensions)
        gradient = None
        if how.gradient and ctx.needs_input_grad[0]:
            # A loss scale is yet to multiply what float16 could not hold.
            kept = dtype if logits.dtype == torch.float16 else logits.dtype
            gradient = memory.zeros(logits.shape, kept, logits.device)
        total = torch.zeros((), dtype=torch.float64 if logits.device.type != "mps" else dtype, device=logits.device)
        entropy = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
        for rows in live.split(chunk_tokens) if len(live) else ():
            at = tuple(rows.unbind(-1))
            z, z_teacher = (x[at].to(dtype).reshape(len(rows), -1) / how.temperature for x in (logits, teacher_logits))
            result = how.rows(z, z_teacher)
            total += result.divergence.sum(dtype=total.dtype)
            entropy[at] = result.entropy.reshape(entropy[at].shape)
            if gradient is not None and result.gradient is not None:
                gradient[at] = (result.gradient / how.temperature).to(gradient.dtype).reshape(gradient[at].shape)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(entropy)
        return total.to(dtype), entropy

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        once_differentiable()
        (gradient,) = ctx.saved_tensors
        backend = choice.choose("auto", grad_total.device).backend
        return release_gradient(gradient, ctx.dtype, grad_total, backend, keep=graph_is_kept()), None, None, None, None


# --- small helpers ----------------------------------------------------------------------------------------------------


def _same_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise ValueError(f"student and teacher must share a vocabulary, got V={student} and V={teacher}")


def _divergence(beta: float, temperature: float, top_k: int | None) -> Divergence:
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an int >= 1 or None, got {top_k!r}")
    return Divergence(
        beta=checks.plain_float("beta", beta, low=0.0, high=1.0),
        temperature=checks.plain_float("temperature", temperature, low=0.0, open_low=True),
        top_k=top_k,
        gradient=torch.is_grad_enabled(),
    )


def _live_labels(mask: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (labels that mark the masked rows as ignored, poison of a mask that is neither 0 nor 1)."""
    checks.float_tensor("student_hidden or student_logits", values)
    keep, poison = checks.keep_mask("mask", mask, values.shape[:-1], values.device)
    return torch.where(keep, 0, IGNORE_INDEX), poison


def _output(
    total: Tensor, entropy: Tensor, labels: Tensor, n_tokens: float | Tensor | None, poison: Tensor | None
) -> LossOutput:
    count = (labels != IGNORE_INDEX).sum()
    loss = total / divisor(count if n_tokens is None else n_tokens)
    wide = torch.float32 if entropy.device.type == "mps" else torch.float64
    metrics = {
        "divergence": (total.detach().to(wide), count.to(wide)),
        "student_entropy": (entropy.sum(dtype=wide), count.to(wide)),
    }
    return LossOutput(loss if poison is None else loss + poison, metrics, None, entropy)


class Rows(NamedTuple):
    """The results of a chunk of rows."""

    divergence: Tensor  # (C,)
    entropy: Tensor  # (C,) of the student
    gradient: Tensor | None  # (C, V) of the divergence with respect to the student's logits


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """Return p x, and 0 if p is 0, for any x. Another NaN stays."""
    return (p * x).masked_fill_(p == 0, 0.0)


def _normalise(logits: Tensor) -> Tensor:
    """Turn logits into log-probs in place. The largest is subtracted first: a common offset then costs no precision."""
    shifted = logits.sub_(logits.amax(-1, keepdim=True))
    return shifted.sub_(shifted.exp().sum(-1, keepdim=True).log_())


def _scaled_divergence(
    student: Tensor,  # (C, K) log-probs
    teacher: Tensor,  # (C, K) log-probs
    p_s: Tensor,  # (C, K) exp(student)
    beta: float,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return (divergence (C,), its gradient with respect to the student's logits (C, K))."""
    p_t = teacher.exp()
    if beta == 0.0:
        value = _weighted(p_t, teacher - student).sum(-1) + (p_s.sum(-1) - p_t.sum(-1))
        return value, p_s - p_t if gradient else None
    if beta == 1.0:
        terms = _weighted(p_s, student - teacher)
        total = terms.sum(-1)
        value = total + (p_t.sum(-1) - p_s.sum(-1))
        return value, terms - p_s * total[:, None] if gradient else None
    mixed = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    terms = _weighted(p_s, student - mixed)
    total = terms.sum(-1)
    value = beta * _weighted(p_t, teacher - mixed).sum(-1) + (1.0 - beta) * total
    return value, (1.0 - beta) * (terms - p_s * total[:, None]) if gradient else None


def _buckets(log_probs: Tensor, index: Tensor) -> Tensor:
    """Return the log-masses (C, K+1) of the entries at `index` (C, K) and of all others together."""
    others = log_probs.scatter(-1, index, -math.inf)
    # A row without others has mass 0 there; amax keeps the sum of exponentials finite for it too.
    largest = others.amax(-1, keepdim=True)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    tail = largest + (others - largest).exp().sum(-1, keepdim=True).log()
    return torch.cat([log_probs.gather(-1, index), tail], dim=-1)


def divergence_rows(
    student: Tensor,  # (C, V) logits
    teacher: Tensor,  # (C, V) logits
    beta: float,
    top_k: int | None,
    gradient: bool,
) -> Rows:
    """Return the divergence of every row, the student's entropy and the gradient.

    Both logits are overwritten. With `top_k` the teacher's K likeliest entries are compared one by one and all others
    as one bucket. The result is a lower bound of the divergence, equal to it for K = V.
    """
    log_s, log_t = _normalise(student), _normalise(teacher)
    p_s = log_s.exp()
    entropy = -_weighted(p_s, log_s).sum(-1)
    if top_k is None or top_k >= student.shape[-1]:
        value, full = _scaled_divergence(log_s, log_t, p_s, beta, gradient)
        return Rows(value, entropy, full)
    index = log_t.topk(top_k, dim=-1).indices  # (C, K)
    coarse_s, coarse_t = _buckets(log_s, index), _buckets(log_t, index)
    value, coarse = _scaled_divergence(coarse_s, coarse_t, coarse_s.exp(), beta, gradient)
    if coarse is None:
        return Rows(value, entropy, None)
    # The bucket's gradient falls on its entries in proportion to their share of its mass.
    tail_mass = coarse_s[:, -1:].exp()
    share = torch.where(tail_mass == 0, 0.0, coarse[:, -1:] / tail_mass)
    return Rows(value, entropy, (p_s * share).scatter(-1, index, coarse[:, :-1]))
