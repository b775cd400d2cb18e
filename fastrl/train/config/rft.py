"""Settings of rejection sampling fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastrl.train.config.run import check_int
from fastrl.train.config.sampling import TaskConfig


@dataclass(frozen=True, kw_only=True)
class RFTConfig(TaskConfig):
    """Settings of `fastrl.train.rft.run_rft`."""

    # Sampling
    rewards: dict[str, float] = field(default_factory=lambda: {"exact": 1.0})
    """Weight of each reward function, by name."""
    keep_reward: float = 1.0
    """A completion whose reward is at least this is right."""
    prompts_per_step: int = 8
    """Prompts for each step. A round samples the prompts of all its steps at once."""
    group_size: int = 8
    """Completions of each prompt."""
    keep_per_prompt: int = 4
    """Number of right completions to keep for a prompt, the first ones. 0 keeps all."""
    distinct: bool = True
    """Keep equal completions of a prompt only once."""
    sample_batch_size: int = 128
    """Completions to sample together, a multiple of `group_size`."""

    # Training
    steps_per_round: int = 10
    """Optimiser steps on the completions of one round. 1 is online RFT."""
    epochs_per_round: int = 1
    """Passes over the kept completions of a round."""
    loss: str = "rft"
    """A preset of `fastrl.PolicyLoss` for given tokens: rft, sft, dft."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PolicyLoss`, for example `aggregate: sequence_mean`."""
    micro_batch_tokens: int = 2048
    """Tokens in one forward and backward pass. It changes the memory, not the gradient."""
    packing: bool = True
    """Put several completions in a pass. False takes one at a time, for a model that cannot keep sequences apart."""

    run_dir: str = "runs/rft"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a count out of range, or sizes that do not divide each other."""
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
        """Tokens in a packed batch. None if a batch holds one example."""
        return self.micro_batch_tokens if self.packing else None


@dataclass(frozen=True, kw_only=True)
class OnlineRFTConfig(RFTConfig):
    """Settings of `run_rft` for online RFT: each step trains on all right completions of the current policy."""

    keep_per_prompt: int = 0
    """Number of right completions to keep for a prompt, the first ones. 0 keeps all."""
    distinct: bool = False
    """Keep equal completions of a prompt only once."""
    steps_per_round: int = 1
    """Optimiser steps on the completions of one round. 1 is online RFT."""
    run_dir: str = "runs/online-rft"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""
