"""A policy-gradient step inside a trust region: as long as a bound on the KL allows, found by halving.

Trust region policy optimisation (Schulman et al. 2015, arXiv 1502.05477) maximises the surrogate E[r A] under a bound
on the mean KL(old || new). Here the direction is the plain gradient of the surrogate, not the natural one. The line
search is that of its appendix C: a step is halved until the KL measured on the batch is within the bound and the
surrogate has improved; if none is, the old policy is kept.

The KL is the mean of r - 1 - log r over the batch's tokens, which the old policy sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.losses.policy.loss import PolicyLoss
from fastrl.train.config.ppo import PPOConfig
from fastrl.train.model import Head
from fastrl.train.run.run import MetricSums, Run
from fastrl.train.update.batches import (
    Batch,
    Counts,
    Rows,
    backward,
    forward_of,
    micro_batches,
    policy_output,
    sampled_kl,
)


class StepLength:
    """Where the line search starts: at twice the Euclidean length that was tried last, at most the longest allowed."""

    def __init__(self, longest: float) -> None:
        """Start with the longest step."""
        self._longest = longest
        self.last = longest

    def first(self) -> float:
        """Return the length that the next search starts with."""
        return min(self._longest, 2.0 * self.last)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint needs."""
        return {"last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.last = state["last"]


class Measured(NamedTuple):
    """A policy measured on a batch."""

    loss: float
    kl: float
    """Mean KL(old || new), nats per token."""


def trust_region_step(
    run: Run[PPOConfig],
    model: Any,
    head: Head,
    loss_function: PolicyLoss,
    batch: Batch,
    length: StepLength,
    totals: MetricSums,
) -> None:
    """Move the policy against the gradient of `loss_function` over the batch, or leave it as it was to the bit.

    Args:
        run: its backward pass is used, its optimiser is not; the bound and the number of halvings are in its settings.
        model, head: the policy; its parameters that require a gradient are moved.
        loss_function: minus the surrogate.
        batch: with old log-probs.
        length: where the search starts; set to the length that was tried last.
        totals: gets the metrics of the loss before the step, `grad_norm`, and `trust_region/*`: the KL of the step
            (0 where there was none), accepted (1 or 0), the number of halvings, the length taken.
    """
    config = run.config
    assert config.target_kl is not None
    rows = micro_batches(config)
    before = backward(run, model, head, loss_function, batch, rows, totals).loss.item()
    moved = [(p, p.grad, p.detach().clone()) for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for _, gradient, _ in moved))
    tried, tries, found = length.first(), 0, None
    if norm > 0 and math.isfinite(norm):
        while found is None and tries <= config.max_halvings:
            tried, tries = tried * (0.5 if tries else 1.0), tries + 1
            length.last = tried
            _place(moved, tried / norm)
            measured = measure(model, head, loss_function, batch, rows, config)
            if measured.kl <= config.target_kl and measured.loss < before:
                found = measured
    if found is None:
        _place(moved, 0.0)
    run.optimizer.zero_grad()
    totals.add(
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
def measure(model: Any, head: Head, loss_function: PolicyLoss, batch: Batch, rows: Rows, config: PPOConfig) -> Measured:
    """Return the loss of the policy as it is now, and how far it is from the old one."""
    counts = Counts.of(batch.mask, rows)
    loss, kl = 0.0, 0.0
    for start, stop in rows:
        part = batch.rows(start, stop)
        hidden = forward_of(config)(model, part.rollout)
        output = policy_output(loss_function, head, hidden, part, counts, config.temperature)
        loss += output.loss.item()
        kl += sampled_kl(output, part).item()
    return Measured(loss, kl / counts.tokens.item())


@torch.no_grad()
def _place(moved: list[tuple[Tensor, Tensor, Tensor]], factor: float) -> None:
    """Set each parameter to where it was, less `factor` times its gradient; 0 restores it to the bit."""
    for parameter, gradient, origin in moved:
        parameter.copy_(origin if factor == 0.0 else torch.sub(origin, gradient, alpha=factor))


def _one(value: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(float(value)), torch.ones(())
