"""Settings of the training of a reward model."""

from __future__ import annotations

from dataclasses import dataclass

from fastrl.train.config.preferences import ComparisonDataConfig
from fastrl.train.config.run import check_positive


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(ComparisonDataConfig):
    """Settings of `fastrl.train.reward_model.run_reward_model`."""

    centering_coef: float = 0.0
    """Weight of the squared sum of a pair's two scores, which keeps scores around zero."""
    head_learning_rate_factor: float = 1.0
    """The head's learning rate divided by the backbone's."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""

    run_dir: str = "runs/reward-model"
    """Folder of the run: metrics, evaluations, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a factor that is not positive, or a negative coefficient."""
        super().__post_init__()
        check_positive("head_learning_rate_factor", self.head_learning_rate_factor)
        if not self.centering_coef >= 0.0:
            raise ValueError(f"centering_coef must be at least 0, got {self.centering_coef}")
