"""Settings of GRPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrl.losses.advantages.group import BASELINES, SCALES
from fastrl.train.config.run import check_choice, check_int
from fastrl.train.config.sampling import BatchConfig

# A baseline that is given for each prompt (ReMax) would need a greedy completion, which this loop does not sample.
GROUP_BASELINES = tuple(name for name in BASELINES if name != "given")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(BatchConfig):
    """Settings of `fastrl.train.grpo.run_grpo`; the completions of a group are compared with each other."""

    # The loss
    loss: str = "grpo"
    """A preset of `fastrl.PolicyLoss`: grpo, dr_grpo, dapo, gspo, cispo, ..."""
    clip_low: float | None = None
    """Width of the clip below 1; None keeps the preset's."""
    clip_high: float | None = None
    """Width of the clip above 1; None keeps the preset's."""
    kl: str | None = None
    """KL estimator in the loss (k1, k2, k3, abs); None keeps the preset's."""
    kl_coef: float | None = None
    """Coefficient of the KL; None keeps the preset's, 0 switches the KL off and saves the reference model."""
    entropy_coef: float | None = None
    """Coefficient of the entropy bonus; None keeps the preset's."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PolicyLoss`, and `style`."""
    clip_cov_fraction: float = 2e-4
    """With `loss: clip_cov`: share of the tokens of a minibatch that are detached, at least one token (Cui et al. 2025,
    arXiv 2505.22617)."""
    clip_cov_low: float = 1.0
    """With `loss: clip_cov`: detached are tokens whose covariance of advantage and log-prob is greater than this."""
    clip_cov_high: float = 5.0
    """With `loss: clip_cov`: and less than this."""
    advantage_scale: str = "group"
    """Divisor of the advantages: `group` (std of the group), `batch`, `none` (Dr. GRPO), ..."""
    advantage_baseline: str = "group_mean"
    """What is subtracted from a reward: `group_mean`, `leave_one_out`, ..."""
    step_rewards: dict[str, float] = field(default_factory=dict)
    """Process supervision: rewards of the steps of a completion, by name, with their weights. Each is called with the
    text up to the end of a step. Their advantages are added to those of `rewards`, whose weights may be 0."""
    step_marker: str = "\n"
    """What ends a step: a newline, `<step>`, ...; a text, not a special token, which the text of a completion lacks."""

    # The prompts
    dynamic_sampling: Literal["off", "reward", "correct"] = "off"
    """Sample further prompts in the place of groups that teach nothing: those whose rewards are all equal (`reward`),
    or whose answers are all right or all wrong (`correct`, DAPO)."""
    dynamic_sampling_tries: int = 4
    """Rounds of sampling for one batch; groups that are still missing are filled up with some that teach nothing."""
    filter_prompts: int = 0
    """Train on those of this many problems that the model, before training, answers right sometimes but not always
    (of `group_size` completions), again and again; 0 trains on the endless stream of problems."""
    curriculum_parameter: str | None = None
    """Parameter of the task that makes it harder in stages, in the training problems only."""
    curriculum_values: tuple[int | float | str | bool, ...] = ()
    """Its value in each stage, the easiest first."""
    curriculum_threshold: float = 0.8
    """Share of right answers, over the last `curriculum_window` steps of a stage, from which the next one begins."""
    curriculum_window: int = 5
    """Steps over which that share is taken."""

    # The reference of the KL
    reference_sync_steps: int = 0
    """Steps after which the reference follows the policy; 0 keeps the model before training."""
    reference_ema: float = 0.0
    """Share of the old reference that a synchronisation keeps: 0 takes the policy as it is."""

    run_dir: str = "runs/grpo"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        super().__post_init__()
        for name in ("dynamic_sampling_tries", "curriculum_window"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("filter_prompts", "reference_sync_steps"):
            check_int(name, getattr(self, name), at_least=0)
        check_choice("dynamic_sampling", self.dynamic_sampling, ("off", "reward", "correct"))
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
