"""Squared regression of a sequence's log-ratio: Kimi k1.5's surrogate as its paper has it, and A*-PO.

    loss = weight * mean_i (scale u_i - target_i)^2,    u_i = sum_t (logp_t - anchor_t)

It is `PolicyLoss(surrogate="square", ratio_level="sequence_sum", aggregate="sequence_mean")` with any anchor and
weight. The preset "opmd" of `PolicyLoss` squares per token, as trainers do.

| loss | source | anchor | scale | target | weight |
|---|---|---|---|---|---|
| opmd_sequence (also a preset) | arXiv 2501.12599, eq. 3 | old | tau | A = R - mean R | 1/(2 tau) |
| A*-PO | arXiv 2505.20686 | ref | beta_2 | R - V*, V* from `optimal_values` | 1 |

The gradient of opmd_sequence is -(A - tau u) dlogp_t, the negative of the paper's ascent direction.

Legend: B batch, T time, N tokens, S sequences, P prompts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.losses.layout import Layout
from fastrl.losses.output import LossOutput
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.ops.segments import segment_sum


def sequence_square_loss(
    logprobs: Tensor,  # (B, T) or (N,)
    *,
    targets: Tensor,  # (B,) or (S,)
    mask: Tensor,  # (B, T) or (N,)
    anchor_logprobs: Tensor,  # (B, T) or (N,)
    scale: float,
    weight: float = 1.0,
    n_sequences: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> LossOutput:
    """Return weight * mean over sequences of (scale sum_t (logp - anchor) - target)^2.

    The gradient is with respect to `logprobs`: 2 weight scale (scale u_i - target_i) / n_sequences at every live token
    of sequence i. Sequences without a live token count neither in the sum nor in the mean.

    Args:
        logprobs: padded, or packed with `cu_seqlens`, in nats.
        targets: target of the scaled log-ratio of each sequence, constants.
        mask: 0/1. Values under a 0 cannot matter.
        anchor_logprobs: of the policy in the log-ratio's denominator, constants.
        scale: > 0, tau or beta_2.
        weight: > 0. With 1/(2 scale) the gradient is -(target - scale u) per token.
        n_sequences: the global number of sequences, for micro-batches and ranks.
        cu_seqlens: offsets of packed sequences.

    Returns:
        `LossOutput` with the metrics square_error, log_ratio (u) and residual (scale u - target), means over sequences.

    Raises:
        TypeError, ValueError: types, shapes or numbers that do not fit.
    """
    checks.float_tensor("logprobs", logprobs)
    checks.plain_float("scale", scale, low=0.0, open_low=True)
    checks.plain_float("weight", weight, low=0.0, open_low=True)
    layout = Layout.of(logprobs.shape, logprobs.device, cu_seqlens)
    layout.tokens("anchor_logprobs", checks.float_tensor("anchor_logprobs", anchor_logprobs))
    wanted = layout.sequences("targets", checks.float_tensor("targets", targets)).detach()
    spec = PolicyLoss.preset("opmd_sequence", square_tau=scale)
    output = spec(
        logprobs,
        advantages=wanted,
        mask=mask,
        old_logprobs=anchor_logprobs,
        n_sequences=n_sequences,
        cu_seqlens=cu_seqlens,
    )
    with torch.no_grad():
        keep = checks.keep_mask("mask", mask, layout.shape, layout.device)[0].reshape(-1)

        def live(values: Tensor) -> Tensor:
            return torch.where(keep, values.detach().reshape(-1).to(output.loss.dtype), 0.0)

        pooled = segment_sum(live(logprobs) - live(anchor_logprobs), layout.lengths)
        present = segment_sum(keep.to(pooled.dtype), layout.lengths) > 0
        residual = reference.square_residual(pooled, torch.where(present, wanted.to(pooled.dtype), 0.0), scale)
        found = {"square_error": residual.square(), "log_ratio": pooled, "residual": residual}
        metrics = {name: (value.double().sum(), present.sum().double()) for name, value in found.items()}
    # The preset's square is over 2 tau.
    loss = output.loss * (2.0 * scale * weight)
    return LossOutput(loss, metrics, layout.restore(live(logprobs)), None)


def optimal_values(
    rewards: Tensor,  # (P, n)
    beta: float,
) -> Tensor:
    """Return V* (P,) = beta log mean_j exp(R_j / beta), of n rewards of the reference policy per prompt.

    V* lies between the mean (beta large) and the largest (beta small) of the rewards (arXiv 2505.20686). No gradient.
    """
    checks.float_tensor("rewards", rewards)
    checks.plain_float("beta", beta, low=0.0, open_low=True)
    if rewards.dim() != 2 or rewards.shape[1] < 1:
        raise ValueError(f"rewards must be (P, n) with n >= 1, got shape {tuple(rewards.shape)}")
    wide = rewards.detach().double() / beta
    return (beta * (torch.logsumexp(wide, dim=1) - math.log(rewards.shape[1]))).to(rewards.dtype)
