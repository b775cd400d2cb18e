"""Settings of the data of preference pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastrl.train.config.run import RunConfig, check_int


@dataclass(frozen=True, kw_only=True)
class ComparisonDataConfig(RunConfig):
    """Settings of the loops that read preferences: their source, and the size of a step."""

    data: str | None = None
    """Source of the training records (prompt, chosen, rejected), in a form that `read_records` takes."""
    data_split: str | None = None
    """Split to read, for a data source with several splits."""
    eval_data: str | None = None
    """Held-out records. None holds out `eval_share` of `data`."""
    eval_share: float = 0.1
    """Share of the prompts of `data` to hold out, chosen by a hash of the prompt. 0 holds none out."""
    max_tokens: int = 1024
    """Longest example, prompt and completion together."""
    overlong: Literal["drop", "cut"] = "drop"
    """`drop` leaves longer examples out, `cut` removes their ends. The loop counts both."""
    examples_per_step: int = 16
    """Pairs, or labelled completions, in an optimiser step."""
    micro_batch_size: int | None = None
    """Examples in one forward and backward pass. None takes all at once. It changes the memory, not the gradient."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a count or a share out of range."""
        super().__post_init__()
        check_int("examples_per_step", self.examples_per_step, at_least=1)
        check_int("max_tokens", self.max_tokens, at_least=2)
        if self.micro_batch_size is not None:
            check_int("micro_batch_size", self.micro_batch_size, at_least=1)
        if not 0.0 <= self.eval_share < 1.0:
            raise ValueError(f"eval_share must be at least 0 and less than 1, got {self.eval_share}")

    @property
    def micro_batch(self) -> int:
        """Examples in one forward and backward pass."""
        return self.micro_batch_size or self.examples_per_step
