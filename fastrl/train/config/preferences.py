"""Settings of data of preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.run import RunConfig, check_choice, check_int


@dataclass(frozen=True, kw_only=True)
class ComparisonDataConfig(RunConfig):
    """Settings of the loops on given preferences: where they come from, and how many make a step."""

    data: str | None = None
    """Records to train on, as `fastrl.train.data.read_records` takes them: prompt, chosen and rejected."""
    data_split: str | None = None
    """Split of a data source that has several."""
    eval_data: str | None = None
    """Held-out records; None takes `eval_share` of `data`."""
    eval_share: float = 0.1
    """Share of the prompts of `data` that is held out, by a hash of each; 0 holds none out."""
    max_tokens: int = 1024
    """Longest example, prompt and completion together."""
    overlong: Literal["drop", "cut"] = "drop"
    """What becomes of a longer one: left out, or its end is; both are counted."""
    examples_per_step: int = 16
    """Pairs (or labelled completions) in an optimiser step."""
    micro_batch_size: int | None = None
    """Of these in one forward and backward pass; None: all at once. It changes the memory, not the gradient."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        super().__post_init__()
        check_int("examples_per_step", self.examples_per_step, at_least=1)
        check_int("max_tokens", self.max_tokens, at_least=2)
        check_choice("overlong", self.overlong, ("drop", "cut"))
        if self.micro_batch_size is not None:
            check_int("micro_batch_size", self.micro_batch_size, at_least=1)
        if not 0.0 <= self.eval_share < 1.0:
            raise ValueError(f"eval_share must be at least 0 and less than 1, got {self.eval_share}")

    @property
    def micro_batch(self) -> int:
        """Examples in one forward and backward pass."""
        return self.micro_batch_size or self.examples_per_step
