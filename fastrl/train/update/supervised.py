"""Loops on given tokens: the gradient of one optimiser step, and the loss on held-out examples.

Both go through packed batches of at most `budget` tokens. A step's loss is divided by the counts of all its examples.
So the budget changes the memory and the speed, and not the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastrl.checks import MASKED_LABEL
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.ops import linear_token_logprobs
from fastrl.reference import segment_sum
from fastrl.train.data.encoding import Example
from fastrl.train.data.packing import packed_batches, packed_hidden
from fastrl.train.model import Policy
from fastrl.train.run.measure import PERPLEXITY, Measurement
from fastrl.train.run.run import MetricSums, Run

SUPERVISED = ("nll", "dft")
# Metrics of the loss that mean something without a ratio and without advantages.
REPORTED = ("entropy", "nonfinite", "path/gemm_units")


def supervised_loss(preset: str, options: dict[str, Any]) -> PolicyLoss:
    """Return the loss of given tokens that `preset` and the fields `options` name.

    Raises:
        ValueError: the loss needs advantages, whole groups or another policy's log-probs.
    """
    loss = PolicyLoss.preset(preset, **options)
    if loss.surrogate not in SUPERVISED:
        raise ValueError(f"loss {preset!r} needs advantages; for given tokens choose sft, rft or dft")
    if loss.aggregate == "prompt_mean" or (loss.aggregate == "constant" and loss.constant is None):
        raise ValueError(
            f"aggregate {loss.aggregate!r} is not for packed examples; expected token_mean, sequence_mean, "
            "sequence_sum, token_sum, or constant with its constant"
        )
    if loss.kl is not None:
        raise ValueError(f"kl={loss.kl!r} needs the log-probs of another policy, which this loop does not have")
    return loss


def backward_examples(
    run: Run[Any], policy: Policy, loss: PolicyLoss, examples: Sequence[Example], *, budget: int | None
) -> dict[str, float]:
    """Accumulate the gradient of the loss of the examples in the parameters, and return metrics of the step.

    At most `budget` tokens go through the model at once, or one example if it is None. The metrics are `REPORTED`,
    `loss`, `trained_tokens`, `tokens` (prompts too), `micro_batches` and, with a budget, `packing`, the share of it
    that held tokens.
    """
    n_tokens, n_sequences = sum(example.n_trained for example in examples), len(examples)
    batches = packed_batches(examples, budget, run.device)
    totals = MetricSums()
    loss_sum = torch.zeros((), device=run.device)
    for _, batch in batches:
        output = loss.from_hidden(
            packed_hidden(policy.model, batch),
            policy.weight,
            batch.labels,
            advantages=None,
            mask=batch.mask,
            cu_seqlens=batch.cu_seqlens,
            n_tokens=float(n_tokens),
            n_sequences=float(n_sequences),
            **policy.options,
        )
        run.backward(output.loss)
        totals.add({name: output.metrics[name] for name in REPORTED})
        loss_sum += output.loss.detach()
    tokens = sum(batch.labels.numel() for _, batch in batches)
    packing = {} if budget is None else {"packing": tokens / (len(batches) * budget)}
    return {
        **totals.means(),
        "loss": float(loss_sum),
        "trained_tokens": float(n_tokens),
        "tokens": float(tokens),
        "micro_batches": float(len(batches)),
        **packing,
    }


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean negative log-likelihood of the trained tokens of held-out examples, in nats."""

    mean: float
    standard_error: float
    """Of the mean over tokens, with the examples as independent draws."""
    n_examples: int
    n_tokens: int

    def perplexity(self, step: int) -> Measurement:
        """Return the measurement of exp(mean). Its standard error is the perplexity times the mean's standard error."""
        value = float(torch.tensor(self.mean, dtype=torch.float64).exp())  # infinite if a float would overflow
        return Measurement(step, value, value * self.standard_error, self.n_examples, PERPLEXITY)


@torch.no_grad()
def held_out_loss(policy: Policy, examples: Sequence[Example], *, budget: int | None) -> HeldOutLoss:
    """Return the loss on held-out examples at temperature 1, weighted by tokens."""
    sums = torch.zeros(len(examples), dtype=torch.float64)
    for group, batch in packed_batches(examples, budget, policy.device):
        labels = batch.labels.masked_fill(~batch.mask, MASKED_LABEL)
        logprobs = linear_token_logprobs(
            packed_hidden(policy.model, batch),
            policy.weight,
            labels,
            ignore_index=MASKED_LABEL,
            **policy.head.kwargs(),
        ).logprobs
        sums[group] = -segment_sum(logprobs.double(), batch.cu_seqlens.long().diff()).cpu()
    counts = torch.tensor([example.n_trained for example in examples], dtype=torch.float64)
    total = counts.sum()
    mean = sums.sum() / total
    # The mean is a ratio of two sums over examples. To first order its error is the error of the sum of the residuals.
    error = (sums - counts * mean).square().sum().sqrt() / total
    return HeldOutLoss(float(mean), float(error), len(examples), int(total))
