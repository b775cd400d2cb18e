"""Settings of DPO and online DPO."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastrl.train.config.preferences import ComparisonDataConfig
from fastrl.train.config.run import check_int
from fastrl.train.config.sampling import BatchConfig, TaskEvaluationConfig


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ComparisonDataConfig, TaskEvaluationConfig):
    """Settings of `fastrl.train.dpo.run_dpo`."""

    loss: str = "sigmoid"
    """A preset of `fastrl.PreferenceLoss`: sigmoid (DPO), ipo, simpo, orpo, kto, bco, ..."""
    beta: float | None = None
    """Scale of the implicit rewards. None keeps the preset's value."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PreferenceLoss`, and `style`."""

    task: str | None = None
    """A reasoning-gym dataset. Evaluations answer its held-out problems."""
    temperature: float = 1.0
    """Divides the logits when evaluations sample. The loss always has temperature 1."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""

    run_dir: str = "runs/dpo"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(BatchConfig):
    """Settings of `fastrl.train.online_dpo.run_online_dpo`, which pairs the best and the worst of a group."""

    loss: str = "sigmoid"
    """A preset of `fastrl.PreferenceLoss` for pairs."""
    beta: float | None = None
    """Scale of the implicit rewards. None keeps the preset's value."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PreferenceLoss`, and `style`."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""

    run_dir: str = "runs/online-dpo"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for groups of one, several minibatches, or masked truncated completions."""
        super().__post_init__()
        check_int("group_size", self.group_size, at_least=2)
        if self.minibatches != 1:
            raise ValueError(f"online DPO takes one step per pass; expected minibatches=1, got {self.minibatches}")
        if self.mask_truncated:
            raise ValueError("mask_truncated is not for pairs; give truncated completions a lower reward instead")
