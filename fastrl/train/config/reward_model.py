"""Settings of the reward model."""

from __future__ import annotations

from dataclasses import dataclass

from fastrl.train.config.preferences import ComparisonDataConfig
from fastrl.train.config.run import check_positive


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(ComparisonDataConfig):
    """Settings of `run_reward_model`."""

    centering_coef: float = 0.0
    """Weight of the square of the two scores' sum, which keeps scores around zero."""
    head_learning_rate_factor: float = 1.0
    """The head's learning rate over that of the backbone."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""

    run_dir: str = "runs/reward-model"
    """Folder of the run: metrics, evaluations, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        super().__post_init__()
        check_positive("head_learning_rate_factor", self.head_learning_rate_factor)
        if not self.centering_coef >= 0.0:
            raise ValueError(f"centering_coef must be at least 0, got {self.centering_coef}")
