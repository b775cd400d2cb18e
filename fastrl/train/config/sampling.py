"""Settings of the loops that answer problems of a task: three steps of one ladder.

| class | adds | loops |
|---|---|---|
| `TaskEvaluationConfig` | held-out problems in evaluations | dpo, sft, and all below |
| `TaskConfig` | completions to train on, and their rewards | rft, and all below |
| `BatchConfig` | optimiser steps on a batch of completions | grpo, ppo, online_dpo |
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fastrl.train.config.run import RunConfig, check_choice, check_int, check_positive


@dataclass(frozen=True, kw_only=True)
class TaskEvaluationConfig(RunConfig):
    """Settings of evaluations on held-out problems of a task, the base of `DPOConfig`, `SFTConfig` and `TaskConfig`."""

    task_parameters: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Parameters of the dataset, and `extraction`: how the task finds the answer in a completion."""
    max_new_tokens: int = 128
    """Longest completion. One that reaches this length without a stop token counts as truncated."""
    temperature: float = 1.0
    """Divides the logits, both in sampling and in the loss."""
    eval_problems: int = 100
    """Held-out problems in an evaluation. 0 turns evaluations off."""
    eval_modes: tuple[Literal["sampled", "greedy"], ...] = ("sampled",)
    """`sampled` at the training temperature, `greedy`, or both."""
    reward_timeout_s: float | None = 5.0
    """Time limit of one call of a reward, in seconds. Rewards then run in a worker process. None runs them in the
    training process, which cannot stop a call that hangs."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a length, count, temperature or time limit out of range, or an unknown mode."""
        super().__post_init__()
        check_int("max_new_tokens", self.max_new_tokens, at_least=1)
        check_int("eval_problems", self.eval_problems, at_least=0)
        check_positive("temperature", self.temperature)
        if self.reward_timeout_s is not None:
            check_positive("reward_timeout_s", self.reward_timeout_s)
        object.__setattr__(self, "eval_modes", tuple(self.eval_modes))


@dataclass(frozen=True, kw_only=True)
class TaskConfig(TaskEvaluationConfig):
    """Settings of sampled and scored completions, the base of `RFTConfig` and `BatchConfig`."""

    task: str = "chain_sum"
    """Name of a reasoning-gym dataset."""
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    """Weight of each reward function, by name."""
    eval_rewards: tuple[str, ...] = ()
    """Rewards to evaluate on held-out problems too, each one a name in `rewards`. For example the true reward, while a
    reward model is the training signal."""
    prompts_per_step: int = 8
    """Number of different prompts in a batch."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for fewer than one prompt, or a reward to evaluate that is not in `rewards`."""
        super().__post_init__()
        check_int("prompts_per_step", self.prompts_per_step, at_least=1)
        object.__setattr__(self, "eval_rewards", tuple(self.eval_rewards))
        for name in self.eval_rewards:
            check_choice("eval_rewards", name, tuple(self.rewards))


@dataclass(frozen=True, kw_only=True)
class BatchConfig(TaskConfig):
    """Settings of optimiser steps on batches of completions, the base of GRPO's, PPO's and online DPO's settings."""

    group_size: int = 8
    """Completions of each prompt."""
    mask_truncated: bool = False
    """Leave truncated completions out of the loss (the overlong filtering of DAPO)."""
    reward_model: str | None = None
    """Folder or hub name of a sequence classifier with one label. Its score is added to the rewards. It must have the
    tokenizer of the policy."""
    reward_model_weight: float = 1.0
    """Weight of the reward model's score."""

    # Passes over a batch
    epochs_per_batch: int = 1
    """Passes over a batch of rollouts."""
    minibatches: int = 1
    """Optimiser steps in one pass."""
    micro_batch_size: int | None = None
    """Completions in one forward and backward pass, a divisor of the minibatch. None takes the whole minibatch.
    It changes the memory, not the gradient: the loss is divided by the counts of the whole optimiser step."""
    packing: bool = False
    """True packs sequences of prompt and completion into a stream without padding. False runs each prompt once for all
    its completions, and pads the completions. Both give the same log-probs and gradients, within rounding. The layout
    with fewer tokens is faster: packing for long completions of different lengths, shared prompts otherwise."""
    packing_tokens: int = 512
    """Tokens T of a packed stream. A longer sequence makes a longer stream. Without FlashAttention the
    attention mask has T x T entries."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for sizes that do not divide each other, or a batch that nothing scores."""
        super().__post_init__()
        for name in ("group_size", "epochs_per_batch", "minibatches", "packing_tokens"):
            check_int(name, getattr(self, name), at_least=1)
        if not math.isfinite(self.reward_model_weight):
            raise ValueError(f"reward_model_weight must be finite, got {self.reward_model_weight}")
        if not self.rewards and self.reward_model is None:
            raise ValueError("rewards must name at least one reward where there is no reward_model, got none")
        self._check_batch()

    def _check_batch(self) -> None:
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"minibatches must divide the batch of prompts_per_step * group_size = {self.batch_size} completions, "
                f"got {self.minibatches}"
            )
        minibatch = self.batch_size // self.minibatches
        if self.micro_batch_size is not None:
            check_int("micro_batch_size", self.micro_batch_size, at_least=1)
            if minibatch % self.micro_batch_size:
                raise ValueError(
                    f"micro_batch_size must divide the minibatch of {minibatch} completions, "
                    f"got {self.micro_batch_size}"
                )

    @property
    def batch_size(self) -> int:
        """Completions in a batch of rollouts."""
        return self.prompts_per_step * self.group_size

    @property
    def micro_batch(self) -> int:
        """Completions in one forward and backward pass."""
        return self.micro_batch_size or self.batch_size // self.minibatches
