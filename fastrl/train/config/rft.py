"""Settings of rejection sampling fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastrl.train.config.run import check_int
from fastrl.train.config.sampling import TaskConfig


@dataclass(frozen=True, kw_only=True)
class RFTConfig(TaskConfig):
    """Settings of `run_rft`."""

    # Sampling
    rewards: dict[str, float] = field(default_factory=lambda: {"exact": 1.0})
    """Reward functions by name, with their weights."""
    keep_reward: float = 1.0
    """A completion whose reward is at least this is right."""
    prompts_per_step: int = 8
    """Prompts that are sampled for each step: a round samples for all of its steps at once."""
    group_size: int = 8
    """Completions of each prompt."""
    keep_per_prompt: int = 4
    """Right completions of a prompt that are kept, the first ones; 0 keeps all."""
    distinct: bool = True
    """Keep a text once only for each prompt."""
    sample_batch_size: int = 128
    """Completions that are sampled together, a multiple of `group_size`."""

    # Training
    steps_per_round: int = 10
    """Optimiser steps on the completions of one round; 1 is online RFT."""
    epochs_per_round: int = 1
    """Passes over the kept completions of a round."""
    loss: str = "rft"
    """A preset of `fastrl.PolicyLoss` for given tokens: rft, sft, dft."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PolicyLoss`, as `aggregate: sequence_mean`."""
    micro_batch_tokens: int = 2048
    """Tokens in one forward and backward pass; it changes the memory, not the gradient."""
    packing: bool = True
    """Several completions in a pass; false takes one at a time, for a model whose sequences cannot be kept apart."""

    run_dir: str = "runs/rft"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        super().__post_init__()
        for name in ("group_size", "sample_batch_size", "steps_per_round", "epochs_per_round"):
            check_int(name, getattr(self, name), at_least=1)
        check_int("keep_per_prompt", self.keep_per_prompt, at_least=0)
        check_int("micro_batch_tokens", self.micro_batch_tokens, at_least=2)
        if self.sample_batch_size % self.group_size:
            raise ValueError(
                f"sample_batch_size must be a multiple of group_size={self.group_size}, got {self.sample_batch_size}"
            )

        if self.steps % self.steps_per_round:
            raise ValueError(f"steps must be a multiple of steps_per_round={self.steps_per_round}, got {self.steps}")

    @property
    def token_budget(self) -> int | None:
        """Tokens in a packed batch; None where batches hold one example."""
        return self.micro_batch_tokens if self.packing else None


@dataclass(frozen=True, kw_only=True)
class OnlineRFTConfig(RFTConfig):
    """Settings of `run_rft` with the defaults of online RFT: each step on all right completions of its own policy."""

    keep_per_prompt: int = 0
    """Right completions of a prompt that are kept, the first ones; 0 keeps all."""
    distinct: bool = False
    """Keep a text once only for each prompt."""
    steps_per_round: int = 1
    """Optimiser steps on the completions of one round; 1 is online RFT."""
    run_dir: str = "runs/online-rft"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""
