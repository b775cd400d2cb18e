"""The configuration of the loops: frozen dataclasses, every field explained where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from fastrl.train.config.run import RunConfig, check_choice, check_int, check_positive


@dataclass(frozen=True, kw_only=True)
class TaskEvaluationConfig(RunConfig):
    """Settings of the loops that answer held-out problems of a task."""

    task_parameters: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Parameters of the task: those of the dataset, and `extraction` (how an answer is read off a completion)."""
    max_new_tokens: int = 128
    """Longest completion; one that gets there without a stop token counts as truncated."""
    temperature: float = 1.0
    """Divides the logits, in the sampling and in the loss alike."""
    eval_problems: int = 100
    """Held-out problems in an evaluation; 0 leaves evaluations out."""
    eval_modes: tuple[Literal["sampled", "greedy"], ...] = ("sampled",)
    """`sampled` at the training temperature, `greedy`, or both."""
    reward_timeout_s: float | None = 5.0
    """Seconds that one call of a reward may take, in a worker process; None calls rewards in the process that trains,
    where nothing stops one that hangs."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        super().__post_init__()
        check_int("max_new_tokens", self.max_new_tokens, at_least=1)
        check_int("eval_problems", self.eval_problems, at_least=0)
        check_positive("temperature", self.temperature)
        if self.reward_timeout_s is not None:
            check_positive("reward_timeout_s", self.reward_timeout_s)
        object.__setattr__(self, "eval_modes", tuple(self.eval_modes))
        for mode in self.eval_modes:
            check_choice("eval_modes", mode, ("sampled", "greedy"))


@dataclass(frozen=True, kw_only=True)
class TaskConfig(TaskEvaluationConfig):
    """Settings of the loops that sample completions and score them."""

    task: str = "chain_sum"
    """Name of a reasoning-gym dataset."""
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    """Reward functions by name, with their weights."""
    eval_rewards: tuple[str, ...] = ()
    """Those of `rewards` whose mean over the answers to held-out problems is measured too: what the policy is meant to
    be paid for, when a reward model stands in its place."""
    prompts_per_step: int = 8
    """Different prompts in a batch."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        super().__post_init__()
        check_int("prompts_per_step", self.prompts_per_step, at_least=1)
        object.__setattr__(self, "eval_rewards", tuple(self.eval_rewards))
        for name in self.eval_rewards:
            check_choice("eval_rewards", name, tuple(self.rewards))


@dataclass(frozen=True, kw_only=True)
class BatchConfig(TaskConfig):
    """Settings of the loops that take optimiser steps on batches of sampled completions."""

    group_size: int = 8
    """Completions of each prompt."""
    mask_truncated: bool = False
    """Leave truncated completions out of the loss (the overlong filtering of DAPO)."""
    reward_model: str | None = None
    """Folder or hub name of a sequence classifier with one label, whose score is added to the rewards; its tokenizer
    must be the policy's."""
    reward_model_weight: float = 1.0
    """Weight of its score."""

    # Passes over a batch
    epochs_per_batch: int = 1
    """Passes over a batch of rollouts."""
    minibatches: int = 1
    """Optimiser steps in one pass."""
    micro_batch_size: int | None = None
    """Completions in one forward and backward pass, a divisor of the minibatch; None: the whole minibatch at once.
    It changes the memory, not the gradient: the loss is divided by the counts of the whole optimiser step."""
    packing: bool = False
    """Run each completion with its prompt as a sequence of a packed stream, without padding. False runs a prompt once
    for all its completions, and pads these. Both give the same log-probs and gradients, within rounding; what has fewer
    tokens is faster: packing where completions are long and differ in length, shared prompts elsewhere."""
    packing_tokens: int = 512
    """Tokens of a packed stream, more where a sequence is longer; without FlashAttention its mask has their square."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
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
