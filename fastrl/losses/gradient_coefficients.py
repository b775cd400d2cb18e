"""Gradient coefficients: the factors of a loss on each token's log-prob and entropy gradients.

    dL/dtheta = sum_t g_t dlogp_t/dtheta + h_t dH_t/dtheta

SFT, rejection-sampling fine-tuning, PPO, GRPO, DPO and the rest differ only in the source of their tokens and in g_t.
This is the view of DeepSeekMath, arXiv 2402.03300, section 5, which writes the coefficient of the ascent direction,
-g_t. docs/unified-view.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import checks
from fastrl.losses.output import LossOutput
from fastrl.losses.preference.loss import PreferenceLoss


class GradientCoefficients(NamedTuple):
    """g = dL/dlogp and h = dL/dH, of the shape of the log-probs, detached, 0 at tokens outside the loss."""

    g: Tensor
    h: Tensor


def gradient_coefficients(
    loss: PreferenceLoss | Callable[..., LossOutput],
    logprobs: Tensor,  # (B, T) or (N,); (2P, T) for a PreferenceLoss
    *,
    entropy: Tensor | None = None,  # the same shape
    **inputs: Any,
) -> GradientCoefficients:
    """Return dL/dlogp_t and dL/dH_t of a loss at a batch of log-probs.

    Args:
        loss: a `PolicyLoss`, a `PreferenceLoss` (called as `from_logprobs`), or any other function of log-probs that
            returns a `LossOutput`.
        logprobs: the point of differentiation. No gradient flows into it.
        entropy: per token, for losses with an entropy term.
        inputs: the other inputs of the call: advantages, mask, old_logprobs, ...

    Returns:
        `GradientCoefficients`, in the dtype of `logprobs`. h is 0 for a loss without an entropy term.

    Raises:
        TypeError, ValueError: from the loss, for its inputs.
    """
    checks.float_tensor("logprobs", logprobs)
    if entropy is not None:
        checks.float_tensor("entropy", entropy)
        checks.same_shape("entropy", entropy, logprobs.shape)
    call = loss.from_logprobs if isinstance(loss, PreferenceLoss) else loss
    with torch.enable_grad():
        points = [logprobs.detach().clone().requires_grad_()]
        if entropy is not None:
            points.append(entropy.detach().clone().requires_grad_())
            inputs["entropy"] = points[1]
        value = call(points[0], **inputs).loss
        grads = torch.autograd.grad(value, points, allow_unused=True, materialize_grads=True)
    h = grads[1].to(logprobs.dtype) if entropy is not None else torch.zeros_like(logprobs)
    return GradientCoefficients(grads[0], h.detach())
