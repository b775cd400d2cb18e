"""The configuration of the preference loops, and the losses that they can feed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastrl.losses.preference import PreferenceLoss
from fastrl.train.comparisons import ComparisonDataConfig
from fastrl.train.config import BatchConfig, TaskEvaluationConfig, check_int


@dataclass(frozen=True, kw_only=True)
class DPOConfig(ComparisonDataConfig, TaskEvaluationConfig):
    """Settings of `fastrl.train.dpo.run_dpo`."""

    loss: str = "sigmoid"
    """A preset of `fastrl.PreferenceLoss`: sigmoid (DPO), ipo, simpo, orpo, kto, bco, ..."""
    beta: float | None = None
    """Scale of the implicit rewards; None keeps the preset's."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PreferenceLoss`, and `style`."""

    task: str | None = None
    """A reasoning-gym dataset whose held-out problems are answered in evaluations."""
    temperature: float = 1.0
    """Divides the logits where evaluations sample; the loss is at 1."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""

    run_dir: str = "runs/dpo"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(BatchConfig):
    """Settings of `fastrl.train.online_dpo.run_online_dpo`: the best and the worst of a group are a pair."""

    loss: str = "sigmoid"
    """A preset of `fastrl.PreferenceLoss` for pairs."""
    beta: float | None = None
    """Scale of the implicit rewards; None keeps the preset's."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PreferenceLoss`, and `style`."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""

    run_dir: str = "runs/online-dpo"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        super().__post_init__()
        check_int("group_size", self.group_size, at_least=2)
        if self.minibatches != 1:
            raise ValueError(f"online DPO takes one step per pass; expected minibatches=1, got {self.minibatches}")
        if self.mask_truncated:
            raise ValueError("mask_truncated is not for pairs; give truncated completions a lower reward instead")


def preference_loss(name: str, beta: float | None, options: Mapping[str, Any], *, whole_step: bool) -> PreferenceLoss:
    """Return the preset `name` with the options.

    Args:
        name: one of `PreferenceLoss.presets()`.
        beta: None keeps the preset's.
        options: further fields, and `style`.
        whole_step: all examples of an optimiser step are in one forward pass.

    Raises:
        ValueError: an unknown preset or field, `beta` given twice, or a loss whose examples depend on each other where
            they are in several passes.
    """
    fields = dict(options)
    if beta is not None:
        if "beta" in fields:
            raise ValueError(f"beta is given twice: {beta!r} and {fields['beta']!r} in loss_options")
        fields["beta"] = beta
    loss = PreferenceLoss.preset(name, **fields)
    if (loss.couples_pairs or loss.shift == "paired_mean") and not whole_step:
        raise ValueError(
            f"the loss {name!r} compares the examples of a step with each other; expected micro_batch_size=None"
        )
    return loss
