"""Divergence of two softmax distributions, row by row, with its gradient: the arithmetic of distillation.

    beta = 0: KL(T || S)    beta = 1: KL(S || T)    else: beta KL(T || M) + (1 - beta) KL(S || M)
    M = (1 - beta) S + beta T

The generalised Jensen-Shannon divergence of on-policy distillation (GKD, arXiv 2306.13649), in nats. A KL is summed as
sum p (log p - log q) + sum q - sum p: the last two sums are 1 each but for rounding, and take the rounding of the
normalisers out of the result. Entries that are -inf on a side have probability 0 there and contribute nothing.

Legend: C rows of a chunk, V vocabulary, K kept entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What a chunk of rows gives."""

    divergence: Tensor  # (C,)
    entropy: Tensor  # (C,) of the student
    gradient: Tensor | None  # (C, V) of the divergence with respect to the student's logits


def _weighted(p: Tensor, x: Tensor) -> Tensor:
    """Return p x, 0 where p is 0 whatever x is; NaN stays."""
    return (p * x).masked_fill_(p == 0, 0.0)


def _normalise(logits: Tensor) -> Tensor:
    """Turn logits into log-probs; the largest is taken out first, so that a common offset costs no precision."""
    shifted = logits.sub_(logits.amax(-1, keepdim=True))
    return shifted.sub_(shifted.exp().sum(-1, keepdim=True).log_())


def _divergence(
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
    """Return the log-masses (C, K+1) of the entries at `index` (C, K) and of all the others together."""
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
    as one bucket: a lower bound of the divergence, equal to it for K = V.
    """
    log_s, log_t = _normalise(student), _normalise(teacher)
    p_s = log_s.exp()
    entropy = -_weighted(p_s, log_s).sum(-1)
    if top_k is None or top_k >= student.shape[-1]:
        value, full = _divergence(log_s, log_t, p_s, beta, gradient)
        return Rows(value, entropy, full)
    index = log_t.topk(top_k, dim=-1).indices  # (C, K)
    coarse_s, coarse_t = _buckets(log_s, index), _buckets(log_t, index)
    value, coarse = _divergence(coarse_s, coarse_t, coarse_s.exp(), beta, gradient)
    if coarse is None:
        return Rows(value, entropy, None)
    # The bucket's gradient falls on its entries in proportion to their share of its mass.
    tail_mass = coarse_s[:, -1:].exp()
    share = torch.where(tail_mass == 0, 0.0, coarse[:, -1:] / tail_mass)
    return Rows(value, entropy, (p_s * share).scatter(-1, index, coarse[:, :-1]))
