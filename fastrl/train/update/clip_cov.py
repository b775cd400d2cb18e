"""Clip-Cov in a loop: choose the tokens of a minibatch that the policy term detaches, before its loss is formed.

Tokens whose log-prob and advantage vary together make the entropy fall (Cui et al. 2025, arXiv 2505.22617). A random
few of them are left out of the policy term. The covariance is over the whole minibatch, so a minibatch is one
micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.losses.masks import covariance_keep_mask
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.model import Policy
from fastrl.train.update.batches import RolloutBatch


@dataclass(frozen=True)
class CovarianceSelection:
    """Chooses the tokens of a minibatch that the policy term keeps."""

    config: GRPOConfig
    loss: PolicyLoss
    generator: torch.Generator
    """Draws the detached tokens. It is on the device of the model."""

    def __call__(self, policy: Policy, hidden: Tensor, part: RolloutBatch) -> Tensor:
        """Return (B, T) bool, False for detached tokens. `hidden` (B, T, D) predicts the tokens of `part`."""
        config, loss = self.config, self.loss
        logprobs = policy.logprobs_from(hidden.detach(), part.rollout)
        return covariance_keep_mask(
            logprobs,
            # Without old log-probs the policy is the one that sampled, and no token is clipped.
            logprobs if part.old_logprobs is None else part.old_logprobs,
            part.advantages,
            part.mask,
            low=config.clip_cov_low,
            high=config.clip_cov_high,
            fraction=config.clip_cov_fraction,
            clip_low=math.inf if loss.clip_low is None else loss.clip_low,
            clip_high=math.inf if loss.clip_high is None else loss.clip_high,
            generator=self.generator,
        )
