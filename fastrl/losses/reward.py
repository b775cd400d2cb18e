"""Losses of reward models: Bradley-Terry on pairs of scores, and classification of the steps of a solution.

Legend: P pairs, B batch, T time, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl import checks, reference
from fastrl.losses.layout import Layout
from fastrl.losses.output import LossOutput
from fastrl.losses.scalars import divisor, result_dtype, wide
from fastrl.losses.value import AGGREGATES
from fastrl.ops.segments import segment_sum


def reward_model_loss(
    chosen_scores: Tensor,  # (P,)
    rejected_scores: Tensor,  # (P,)
    margin: Tensor | None = None,  # (P,)
    centering_coef: float = 0.0,
    *,
    n_pairs: float | Tensor | None = None,
) -> LossOutput:
    """Return the Bradley-Terry loss of a reward model, as a mean over pairs.

        -log sigmoid(w - l - margin) + centering_coef (w + l)^2

    The first term is also written log(1 + exp(l - w + margin)). The margin is Llama 2's (arXiv 2307.09288, eq. 2), the
    centring keeps scores around zero (arXiv 2312.09244). The gradient is with respect to both scores.

    Args:
        chosen_scores: one score per chosen completion. A (P, 1) head output needs `.squeeze(-1)`.
        rejected_scores: one score per rejected completion.
        margin: lead that the chosen score should have, detached.
        centering_coef: >= 0.
        n_pairs: the global number of pairs, for micro-batches and ranks.

    Returns:
        LossOutput with metrics rewards/chosen, rewards/rejected, rewards/mean, rewards/margins, rewards/accuracies.

    Raises:
        ValueError, TypeError: scores that are not (P,) of one shape, device and float type, or a negative
            coefficient or count.
    """
    checks.plain_float("centering_coef", centering_coef, low=0.0)
    tensors = {"chosen_scores": chosen_scores, "rejected_scores": rejected_scores, "margin": margin}
    for name, given in tensors.items():
        if given is None and name == "margin":
            continue
        value = checks.float_tensor(name, given)
        if value.dim() != 1:
            raise ValueError(f"{name} must be (P,), one number per pair, got shape {tuple(value.shape)}")
        checks.same_shape(name, value, chosen_scores.shape)
        checks.same_device(name, value, chosen_scores.device)
    chosen, rejected = wide(chosen_scores), wide(rejected_scores)
    difference = chosen - rejected
    per_pair = -F.logsigmoid(difference if margin is None else difference - wide(margin.detach()))
    if centering_coef:
        per_pair = per_pair + centering_coef * torch.square(chosen + rejected)
    count = torch.full_like(per_pair.detach().sum(), per_pair.numel())
    loss = per_pair.sum() / divisor(per_pair.numel() if n_pairs is None else n_pairs)
    with torch.no_grad():
        metrics = {
            "rewards/chosen": (chosen.detach().sum(), count),
            "rewards/rejected": (rejected.detach().sum(), count),
            "rewards/mean": ((chosen + rejected).sum(), 2 * count),
            "rewards/margins": (difference.detach().sum(), count),
            "rewards/accuracies": ((chosen > rejected).to(count.dtype).sum(), count),
        }
    return LossOutput(loss.to(result_dtype(chosen_scores)), metrics, None, None)


def process_reward_loss(
    logits: Tensor,  # (B, T, C)
    labels: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) 1 on the tokens that end a step
    *,
    aggregate: str = "token_mean",
    n_tokens: float | Tensor | None = None,
    n_sequences: float | Tensor | None = None,
) -> LossOutput:
    """Return the cross-entropy of a process reward model at the tokens that end a step.

        -sum_c q_c log softmax(logits)_c

    Integer labels name the class. Float labels are the probability that the step is right, for C = 2 with class 1 the
    right one (soft labels, e.g. Monte Carlo estimates, arXiv 2312.08935). The gradient is with respect to `logits`.

    Args:
        logits: scores of the classes at every token.
        labels: int64 or int32 class ids, or floats in [0, 1].
        mask: 0/1 or bool. Logits and labels under a 0 have no effect.
        aggregate: token_mean, sequence_mean, sequence_sum or token_sum.
        n_tokens, n_sequences: global counts in place of the mask's.

    Returns:
        LossOutput with metrics accuracy and probability (of the labelled class, or of the right one).

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that differ, fewer than two classes, classes out of range,
            probabilities outside [0, 1].
    """
    checks.float_tensor("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits must be (B, T, C), got shape {tuple(logits.shape)}")
    if logits.shape[2] < 2:
        raise ValueError(f"logits must have C >= 2 classes, got shape {tuple(logits.shape)}")
    plain = [name for name in AGGREGATES if name not in ("constant", "prompt_mean")]
    checks.one_of("aggregate", aggregate, plain)
    shape, n_classes = logits.shape[:2], logits.shape[2]
    keep, poison = checks.keep_mask("mask", mask, shape, logits.device)
    checks.count("n_tokens", n_tokens, keep)
    checks.count("n_sequences", n_sequences, keep)
    dtype = result_dtype(logits)
    log_probs = torch.log_softmax(torch.where(keep[..., None], logits.to(dtype), 0.0), dim=-1)
    if isinstance(labels, Tensor) and labels.is_floating_point():
        target = _soft_labels(labels, keep, shape, n_classes, logits.device, dtype)  # (B, T, 2)
    else:
        fits = isinstance(labels, Tensor) and labels.shape == shape and labels.device == keep.device
        ids = torch.where(keep, labels, 0) if fits and labels.layout == torch.strided else labels
        ids = checks.labels("labels", ids, shape, logits.device, n_classes, ignore_index=0)
        target = F.one_hot(ids.long(), n_classes).to(dtype)
    # The product with a zero target is left out: log_probs may be -inf there.
    losses = -torch.where(target > 0, target * log_probs, 0.0).sum(-1).reshape(-1)
    layout = Layout.of(shape, logits.device, None, "labels")
    live = keep.reshape(-1)
    weights = reference.aggregate_weights(
        aggregate, live, layout.lengths, dtype=dtype, n_tokens=n_tokens, n_sequences=n_sequences, sums=segment_sum
    )
    loss = reference.total(weights * losses, layout.lengths, segment_sum)
    with torch.no_grad():
        count = keep.sum().to(dtype)
        right = keep & (log_probs.argmax(-1) == target.argmax(-1))
        probability = torch.where(keep, (log_probs.exp() * target).sum(-1), 0.0)
        metrics = {"accuracy": (right.sum().to(dtype), count), "probability": (probability.sum(), count)}
    return LossOutput(loss if poison is None else loss + poison, metrics, None, None)


def _soft_labels(
    labels: Tensor,  # (B, T)
    keep: Tensor,  # (B, T)
    shape: torch.Size,
    n_classes: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Return the target distribution (B, T, 2) of probabilities that a step is right."""
    checks.same_shape("labels", labels, shape)
    checks.same_device("labels", labels, device)
    if n_classes != 2:
        raise ValueError(f"float labels are probabilities of class 1 of C=2, got C={n_classes}")
    right = torch.where(keep, labels.detach().to(dtype), 0.0)
    if checks.checks_values(labels) and not bool(((right >= 0) & (right <= 1)).all()):
        raise ValueError("float labels must be probabilities in [0, 1] where the mask is 1")
    return torch.stack([1.0 - right, right], dim=-1)
