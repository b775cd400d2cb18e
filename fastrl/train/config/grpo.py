"""Settings of GRPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrl.losses.advantages.group import BASELINES, SCALES
from fastrl.train.config.run import check_choice, check_int
from fastrl.train.config.sampling import BatchConfig

# The baseline `given` (ReMax) needs the reward of a greedy completion, and this loop samples none.
GROUP_BASELINES = tuple(name for name in BASELINES if name != "given")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(BatchConfig):
    """Settings of `fastrl.train.grpo.run_grpo`."""

    # The loss
    loss: str = "grpo"
    """A preset of `fastrl.PolicyLoss`: grpo, dr_grpo, dapo, gspo, cispo, ..."""
    clip_low: float | None = None
    """Width of the clip below 1. None keeps the preset's value."""
    clip_high: float | None = None
    """Width of the clip above 1. None keeps the preset's value."""
    kl: str | None = None
    """KL estimator in the loss (k1, k2, k3, abs). None keeps the preset's value."""
    kl_coef: float | None = None
    """Coefficient of the KL. None keeps the preset's value. 0 turns the KL off and loads no reference model."""
    entropy_coef: float | None = None
    """Coefficient of the entropy bonus. None keeps the preset's value."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PolicyLoss`, and `style`."""
    clip_cov_fraction: float = 2e-4
    """With `loss: clip_cov`: share of a minibatch's tokens to detach, at least one token (Cui et al. 2025,
    arXiv 2505.22617)."""
    clip_cov_low: float = 1.0
    """With `loss: clip_cov`: detach only tokens whose covariance of advantage and log-prob is greater than this."""
    clip_cov_high: float = 5.0
    """With `loss: clip_cov`: detach only tokens whose covariance is less than this."""
    advantage_scale: str = "group"
    """Divisor of the advantages: `group` (std of the group), `batch`, `none` (Dr. GRPO), ..."""
    advantage_baseline: str = "group_mean"
    """Baseline to subtract from a reward: `group_mean`, `leave_one_out`, ..."""
    step_rewards: dict[str, float] = field(default_factory=dict)
    """Process supervision: the weight of each step reward, by name. A step reward scores the text up to the end of a
    step. Its advantages are added to the advantages from `rewards`, whose weights may be 0."""
    step_marker: str = "\n"
    """Text that ends a step: a newline, `<step>`, ... Not a special token, because decoding drops special tokens."""

    # The prompts
    dynamic_sampling: Literal["off", "reward", "correct"] = "off"
    """Redraw groups without a gradient: `reward` redraws groups whose rewards are all equal, `correct` (DAPO) redraws
    groups whose answers are all right or all wrong."""
    dynamic_sampling_tries: int = 4
    """Rounds of sampling for one batch. After the last round, groups without a gradient fill the empty places."""
    filter_prompts: int = 0
    """Before training, answer this many problems with `group_size` completions each. Train repeatedly on the problems
    that got both right and wrong answers. 0 trains on the endless stream of problems."""
    curriculum_parameter: str | None = None
    """Parameter of the task that changes in stages, for training problems only."""
    curriculum_values: tuple[int | float | str | bool, ...] = ()
    """Value of the parameter in each stage, the easiest first."""
    curriculum_threshold: float = 0.8
    """Share of right answers that ends a stage, averaged over the last `curriculum_window` steps of the stage."""
    curriculum_window: int = 5
    """Steps in the average for `curriculum_threshold`."""

    # The reference of the KL
    reference_sync_steps: int = 0
    """Steps between updates of the reference from the policy. 0 keeps the model before training."""
    reference_ema: float = 0.0
    """Weight of the old reference in an update. 0 copies the policy."""

    run_dir: str = "runs/grpo"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number out of range, an unknown choice, or settings that contradict each other."""
        super().__post_init__()
        for name in ("dynamic_sampling_tries", "curriculum_window"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("filter_prompts", "reference_sync_steps"):
            check_int(name, getattr(self, name), at_least=0)
        self._check_advantages()
        self._check_covariance()
        object.__setattr__(self, "curriculum_values", tuple(self.curriculum_values))
        if not 0 <= self.reference_ema < 1:
            raise ValueError(f"reference_ema must be in [0, 1), got {self.reference_ema}")
        if self.reference_ema and not self.reference_sync_steps:
            raise ValueError(f"reference_ema={self.reference_ema} needs reference_sync_steps, got 0")
        if self.reference_sync_steps and self.lora_rank:
            raise ValueError("reference_sync_steps needs a copy of the model as the reference; got lora_rank > 0")
        if not 0 < self.curriculum_threshold <= 1:
            raise ValueError(f"curriculum_threshold must be in (0, 1], got {self.curriculum_threshold}")
        if (self.curriculum_parameter is None) != (not self.curriculum_values):
            raise ValueError(
                "curriculum_parameter and curriculum_values belong together, "
                f"got {self.curriculum_parameter!r} and {list(self.curriculum_values)}"
            )
        if self.curriculum_values and self.filter_prompts:
            raise ValueError("filter_prompts and a curriculum exclude each other, got both")
        if self.filter_prompts and self.filter_prompts < self.prompts_per_step:
            raise ValueError(
                f"filter_prompts must be 0 or at least prompts_per_step={self.prompts_per_step}, "
                f"got {self.filter_prompts}"
            )
        if self.step_rewards:
            check_choice("advantage_scale with step_rewards", self.advantage_scale, ("group", "batch", "none"))
            if not self.step_marker:
                raise ValueError("step_marker must not be empty")
            if self.dynamic_sampling == "reward":
                raise ValueError("dynamic_sampling with step_rewards must be 'off' or 'correct', got 'reward'")

    def _check_advantages(self) -> None:
        check_choice("advantage_scale", self.advantage_scale, SCALES)
        check_choice("advantage_baseline", self.advantage_baseline, GROUP_BASELINES)
        compared = self.advantage_baseline != "none" or self.advantage_scale not in ("batch", "none")
        if self.group_size == 1 and compared:
            raise ValueError(
                "group_size must be at least 2, or nothing is learnt: completions are compared with others of their "
                "prompt; advantage_baseline='none' with advantage_scale 'batch' or 'none' compares none"
            )

    def _check_covariance(self) -> None:
        for name in ("clip_cov_fraction", "clip_cov_low", "clip_cov_high"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default and self.loss != "clip_cov":
                raise ValueError(f"{name}={value} has no effect with loss={self.loss!r}: it needs 'clip_cov'")
        if not 0 < self.clip_cov_fraction <= 1:
            raise ValueError(f"clip_cov_fraction must be in (0, 1], got {self.clip_cov_fraction}")
        if not self.clip_cov_low < self.clip_cov_high:
            raise ValueError(
                f"clip_cov_low must be less than clip_cov_high, got {self.clip_cov_low} and {self.clip_cov_high}"
            )
