"""A policy-gradient step inside a trust region: as long as a bound on the KL allows, found by halving.

Trust region policy optimisation (Schulman et al. 2015, arXiv 1502.05477) maximises the surrogate E[r A] under a bound
on the mean KL(old || new). Here the direction is the plain gradient of the surrogate, not the natural one. The line
search follows appendix C of the paper. A step is halved until the KL measured on the batch is within the bound and the
surrogate has improved. If no step does both, the old policy is kept.

The KL is the mean of r - 1 - log r over the batch's tokens, which the old policy sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.losses.policy.loss import PolicyLoss
from fastrl.train.config.ppo import PPOConfig
from fastrl.train.model import Policy
from fastrl.train.run.run import MetricSums, Run
from fastrl.train.update.batches import RolloutBatch, StepCounts, sampled_kl


class StepLength:
    """First length of the line search: twice the Euclidean length tried last, at most the longest allowed."""

    def __init__(self, longest: float) -> None:
        """Start with the longest step."""
        self._longest = longest
        self.last = longest

    def first(self) -> float:
        """Return the length that the next search starts with."""
        return min(self._longest, 2.0 * self.last)

    def state_dict(self) -> dict[str, float]:
        """Return the length tried last."""
        return {"last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the length tried last."""
        self.last = state["last"]


class Measured(NamedTuple):
    """A policy measured on a batch."""

    loss: float
    kl: float
    """Mean KL(old || new), nats per token."""


def trust_region_step(
    run: Run[PPOConfig],
    policy: Policy,
    loss: PolicyLoss,
    parts: Sequence[RolloutBatch],
    start: float,
    length: StepLength,
    metrics: MetricSums,
) -> None:
    """Move the policy against the gradient that its parameters hold, or leave it as it was to the bit.

    Args:
        run: gives the bound and the number of halvings. Its optimiser takes no step.
        policy: its parameters that have a gradient are moved.
        loss: minus the surrogate.
        parts: the micro-batches of the batch, with old log-probs.
        start: the loss over `parts` before the step. The parameters hold its gradient.
        length: gives the first length of the search, and keeps the length tried last.
        metrics: gets `grad_norm` and `trust_region/*`: the KL of the step (0 without one), accepted (1 or 0), the
            number of halvings, the length taken.
    """
    config = run.config
    assert config.target_kl is not None
    moved = [(p, p.grad, p.detach().clone()) for p in policy.model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for _, gradient, _ in moved))
    tried, tries, found = length.first(), 0, None
    if norm > 0 and math.isfinite(norm):
        while found is None and tries <= config.max_halvings:
            tried, tries = tried * (0.5 if tries else 1.0), tries + 1
            length.last = tried
            _place(moved, tried / norm)
            measured = measure(policy, loss, parts)
            if measured.kl <= config.target_kl and measured.loss < start:
                found = measured
    if found is None:
        _place(moved, 0.0)
    run.masters.read_anew()
    run.zero_grad()
    metrics.add(
        {
            "grad_norm": _one(norm),
            "skipped_updates": _one(not math.isfinite(norm)),
            "trust_region/kl": _one(0.0 if found is None else found.kl),
            "trust_region/accepted": _one(found is not None),
            "trust_region/halvings": _one(max(0, tries - 1)),
            "trust_region/length": _one(0.0 if found is None else tried),
        }
    )


@torch.no_grad()
def measure(policy: Policy, loss: PolicyLoss, parts: Sequence[RolloutBatch]) -> Measured:
    """Return the loss of the policy as it is now, and its distance from the old one."""
    counts = StepCounts.of(parts)
    value, kl = 0.0, 0.0
    for part in parts:
        hidden = policy.hidden(part.rollout)  # (B, T, D)
        output = loss.from_hidden(hidden, policy.weight, part.labels, **part.inputs(counts), **policy.options)
        value += output.loss.item()
        kl += sampled_kl(output, part).item()
    return Measured(value, kl / counts.tokens.item())


@torch.no_grad()
def _place(moved: list[tuple[Tensor, Tensor, Tensor]], factor: float) -> None:
    """Set each parameter to its origin minus `factor` times its gradient. A factor of 0 restores it to the bit."""
    for parameter, gradient, origin in moved:
        parameter.copy_(origin if factor == 0.0 else torch.sub(origin, gradient, alpha=factor))


def _one(value: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(float(value)), torch.ones(())
