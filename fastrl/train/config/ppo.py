"""Settings of PPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fastrl.train.config.run import check_int, check_positive
from fastrl.train.config.sampling import BatchConfig


@dataclass(frozen=True, kw_only=True)
class PPOConfig(BatchConfig):
    """Settings of `fastrl.train.ppo.run_ppo`."""

    prompts_per_step: int = 32
    """Number of different prompts in a batch."""
    group_size: int = 1
    """Completions of each prompt. They share its forward pass, and PPO does not compare them."""
    epochs_per_batch: int = 2
    """Passes over a batch of rollouts."""
    minibatches: int = 2
    """Optimiser steps in one pass."""

    # The update
    update: Literal["clip", "gradient", "trust_region"] = "clip"
    """`clip` is PPO. `gradient` takes one plain policy-gradient step per batch (REINFORCE with the critic as baseline).
    `trust_region` steps along this gradient, and halves the step until the KL to the old policy is at most `target_kl`
    and the surrogate has improved."""
    target_kl: float | None = None
    """In nats per token. `clip` stops the steps on a batch once KL(old || new) of a minibatch exceeds this number.
    `trust_region` needs it as the bound of each step."""
    trust_region_step: float = 1.0
    """Longest step of `trust_region`, in the Euclidean norm of the parameters. Each search starts at twice the step
    that was taken last."""
    max_halvings: int = 10
    """Halvings of a `trust_region` step before the search gives up and keeps the old policy."""
    clip_low: float = 0.2
    """Width of the clip below 1, with `update: clip`."""
    clip_high: float = 0.2
    """Width of the clip above 1."""
    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus, per token."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PolicyLoss`."""

    # The critic
    critic: Literal["head", "shared", "separate"] = "head"
    """Each critic trains a linear head. `head` reads the policy's hidden states, `shared` trains the policy's backbone
    too, `separate` trains a copy of the whole backbone."""
    critic_lr_factor: float = 1.0
    """Multiplies the learning rate of a separate backbone."""
    value_head_lr_factor: float = 10.0
    """Multiplies the learning rate of the value head, which starts at 0."""
    value_coef: float = 0.5
    """Coefficient of the squared error of the values."""
    value_clip: float | None = 0.2
    """Half-width of the clip of a value around the old value. None takes the plain squared error."""
    critic_warmup_steps: int = 0
    """Number of first steps that train the critic only."""

    # Advantages
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Decay of generalised advantage estimation. 1 takes whole returns, 0 one-step differences of values."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of a batch to mean 0 and variance 1."""

    # KL in the reward
    kl_coef: float = 0.05
    """Coefficient of the KL to the initial policy, subtracted from the reward of each token. 0 loads no
    reference model."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Estimate of the KL of a token. With k1 the rewards of a completion sum to R - coef log(p / p_ref)."""
    kl_target: float | None = None
    """Target of the adaptive coefficient, in nats per completion (Ziegler et al. 2019). None keeps it fixed."""
    kl_horizon: float = 10_000.0
    """Completions over which the adaptive coefficient can move by a fifth."""

    # Truncated completions
    truncated_reward: float | None = None
    """Reward of a completion without a stop token, in place of its own. None keeps its own."""
    bootstrap_truncated: bool = False
    """Do not treat truncation as an end: the critic's value at the cut stands in for the later rewards."""

    run_dir: str = "runs/ppo"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number out of range, an unknown choice, or settings that contradict each other."""
        super().__post_init__()
        check_int("max_halvings", self.max_halvings, at_least=0)
        check_int("critic_warmup_steps", self.critic_warmup_steps, at_least=0)
        for name in ("trust_region_step", "critic_lr_factor", "value_head_lr_factor", "kl_horizon"):
            check_positive(name, getattr(self, name))
        for name in ("target_kl", "kl_target", "value_clip"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("kl_coef", "value_coef"):
            if not (getattr(self, name) >= 0.0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        self._check_update()
        self._check_rewards()

    def _check_update(self) -> None:
        if self.update != "clip" and (self.clip_low, self.clip_high) != (0.2, 0.2):
            raise ValueError(f"clip_low and clip_high have no effect with update={self.update!r}: they need 'clip'")
        if self.update == "gradient":
            passes = self.epochs_per_batch * self.minibatches
            if passes != 1:
                raise ValueError(
                    "update='gradient' takes one step per batch: expected epochs_per_batch=1 and minibatches=1, "
                    f"got {self.epochs_per_batch} and {self.minibatches}"
                )
            if self.target_kl is not None:
                raise ValueError(f"target_kl={self.target_kl} has no effect with update='gradient'")
        if self.update == "trust_region":
            if self.target_kl is None:
                raise ValueError(
                    "update='trust_region' needs target_kl, the bound of a step in nats per token, got None"
                )
            if self.critic == "shared":
                raise ValueError(
                    "update='trust_region' bounds every move of the policy, and critic='shared' would move it too; "
                    "expected critic='head' or 'separate'"
                )
            if self.mixed_precision == "fp16":
                raise ValueError("update='trust_region' takes gradients as they are, got mixed_precision='fp16'")
        if self.critic != "separate" and self.critic_lr_factor != 1.0:
            raise ValueError(
                f"critic_lr_factor={self.critic_lr_factor} has no effect with critic={self.critic!r}: it needs "
                "'separate'; value_head_lr_factor is that of the head"
            )

    def _check_rewards(self) -> None:
        if self.kl_target is not None:
            if self.kl_coef == 0.0:
                raise ValueError(f"kl_target={self.kl_target} needs a coefficient to adapt: kl_coef > 0, got 0")
            if self.batch_size >= 5.0 * self.kl_horizon:
                raise ValueError(f"kl_horizon must exceed a fifth of the batch, got {self.kl_horizon:g}")
        ways = {
            "mask_truncated": self.mask_truncated,
            "truncated_reward": self.truncated_reward is not None,
            "bootstrap_truncated": self.bootstrap_truncated,
        }
        if sum(ways.values()) > 1:
            chosen = ", ".join(name for name, on in ways.items() if on)
            raise ValueError(f"truncated completions can be treated in one way only, got {chosen}")
        if self.truncated_reward is not None and not math.isfinite(self.truncated_reward):
            raise ValueError(f"truncated_reward must be finite, got {self.truncated_reward}")
