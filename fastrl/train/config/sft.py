"""Settings of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrl.train.config.run import check_int
from fastrl.train.config.sampling import TaskEvaluationConfig


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TaskEvaluationConfig):
    """Settings of `fastrl.train.sft.run_sft`."""

    # The data
    data: str | None = None
    """Source of the training records, in a form that `read_records` takes. None trains on answered problems of the
    task."""
    data_split: str | None = None
    """Split to read, for a data source with several splits."""
    eval_data: str | None = None
    """Held-out records. None holds out `eval_share` of `data`."""
    eval_share: float = 0.05
    """Share of the prompts of `data` to hold out, chosen by a hash of the prompt. 0 holds none out."""
    max_tokens: int = 1024
    """Longest example, prompt and completions together."""
    overlong: Literal["drop", "cut"] = "drop"
    """`drop` leaves longer examples out, `cut` removes their ends. The loop counts both."""

    # The task
    task: str | None = None
    """A reasoning-gym dataset. Evaluations answer its held-out problems. Without `data` it is the training data."""
    task_examples: int = 1000
    """Problems of the task to train on, if `data` is None."""
    answer_template: str = "{answer}"
    """Training completion of a problem. `{answer}` stands for the answer."""

    # The loss
    loss: str = "sft"
    """A preset of `fastrl.PolicyLoss` for given tokens: sft, or dft, which weights a token by its own probability."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PolicyLoss`, for example `aggregate: sequence_mean`."""
    temperature: float = 1.0
    """Divides the logits when evaluations sample. The loss always has temperature 1."""

    # The batch
    examples_per_step: int = 16
    """Examples in an optimiser step."""
    micro_batch_tokens: int = 2048
    """Tokens in one forward and backward pass. It changes the memory, not the gradient."""
    packing: bool = True
    """Put several examples in a pass. False takes one at a time, for a model that cannot keep sequences apart."""

    run_dir: str = "runs/sft"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number out of range, or settings that contradict each other."""
        super().__post_init__()
        for name in ("task_examples", "examples_per_step"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("max_tokens", "micro_batch_tokens"):
            check_int(name, getattr(self, name), at_least=2)
        if self.packing and self.micro_batch_tokens < self.max_tokens - 1:
            raise ValueError(
                f"micro_batch_tokens must hold the longest example, max_tokens - 1 = {self.max_tokens - 1}, "
                f"got {self.micro_batch_tokens}"
            )
        if not 0.0 <= self.eval_share < 1.0:
            raise ValueError(f"eval_share must be at least 0 and less than 1, got {self.eval_share}")
        if "{answer}" not in self.answer_template:
            raise ValueError(f"answer_template must contain '{{answer}}', got {self.answer_template!r}")
        if self.data is None and (self.eval_data is not None or self.data_split is not None):
            raise ValueError("eval_data and data_split belong to data, which is not given")

    @property
    def token_budget(self) -> int | None:
        """Tokens in a packed batch. None if a batch holds one example."""
        return self.micro_batch_tokens if self.packing else None
