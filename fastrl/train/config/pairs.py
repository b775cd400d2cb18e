"""Settings of the two makers of preference pairs, `fastrl pairs` and `fastrl constitutional-pairs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fastrl.train.config.run import check_choices, check_int, check_positive

PRINCIPLES = (
    "The answer must be correct.",
    "The answer must be short, without anything that was not asked for.",
)
CRITIQUE = "Question: {prompt}\nAnswer: {answer}\nPrinciple: {principle}\nCriticise the answer by the principle."
REVISION = (
    "Question: {prompt}\nAnswer: {answer}\nCritique: {critique}\n"
    "Rewrite the answer so that the critique no longer holds. Write the new answer only."
)


@dataclass(frozen=True, kw_only=True)
class PairSourceConfig:
    """Settings that both makers share: a model answers problems of a task."""

    model: str = "smollm2"
    """A folder with a saved model, a name on the Hugging Face hub, or `smollm2`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the parameters."""
    device: str = "cpu"
    """Device of the model: cpu, cuda, ..."""
    prompt_template: str = "chat"
    """`chat` for the tokenizer's chat template, or a text with `{prompt}`."""
    system_prompt: str | None = None
    """System message of the chat template."""

    task: str = "chain_sum"
    """Name of a reasoning-gym dataset."""
    task_parameters: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Parameters of the task."""
    problems: int = 200
    """Number of problems to ask, from the training stream."""
    first_problem: int = 0
    """Position of the first problem in the stream. Files from different positions share no problem draw."""

    max_new_tokens: int = 128
    """Longest completion."""
    temperature: float = 1.0
    """Divides the logits."""
    reward_timeout_s: float | None = 5.0
    """Time limit of one call of a reward, in seconds. None runs rewards in this process, without a limit."""
    sample_batch_size: int = 64
    """Completions to sample together."""
    keep_truncated: bool = True
    """Pair truncated completions too. The file holds text, so training on it will give them an end."""
    seed: int = 0
    """Seed of the problems and the sampling."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a number out of range, or an unknown choice."""
        for name in ("problems", "max_new_tokens", "sample_batch_size"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("first_problem", "seed"):
            check_int(name, getattr(self, name), at_least=0)
        check_positive("temperature", self.temperature)
        if self.reward_timeout_s is not None:
            check_positive("reward_timeout_s", self.reward_timeout_s)
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class PairsConfig(PairSourceConfig):
    """Settings of `fastrl.train.pairs.make_pairs`."""

    rewards: dict[str, float] = field(default_factory=lambda: {"exact": 1.0})
    """Weight of each reward function, by name. Their sum ranks the completions."""
    group_size: int = 8
    """Completions of each problem, a divisor of `sample_batch_size`."""
    chosen: Literal["sampled", "answer"] = "sampled"
    """Source of the better completion: the best sampled one, or the problem's answer."""
    answer_template: str = "{answer}"
    """Text of the better completion with `chosen: answer`."""

    output: str = "pairs.jsonl"
    """File to write. An existing one is replaced."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for group sizes that give no pairs, or a template without the answer."""
        super().__post_init__()
        check_int("group_size", self.group_size, at_least=1)
        if self.sample_batch_size % self.group_size:
            raise ValueError(
                f"sample_batch_size must be a multiple of group_size={self.group_size}, got {self.sample_batch_size}"
            )
        if self.chosen == "sampled" and self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 to pair sampled completions, got {self.group_size}")
        if "{answer}" not in self.answer_template:
            raise ValueError(f"answer_template must contain '{{answer}}', got {self.answer_template!r}")


@dataclass(frozen=True, kw_only=True)
class ConstitutionalConfig(PairSourceConfig):
    """Settings of `fastrl.train.constitutional.make_constitutional_pairs`."""

    principles: tuple[str, ...] = PRINCIPLES
    """Principles by which the model criticises an answer."""
    critique_template: str = CRITIQUE
    """The request for a critique: a text with `{prompt}`, `{answer}` and `{principle}`."""
    revision_template: str = REVISION
    """The request for a revision: a text with `{prompt}`, `{answer}` and `{critique}`, and `{principle}` if wanted."""
    critique_tokens: int = 128
    """Longest critique. The model uses a truncated critique as it is."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Weight of each reward function, by name. A pair stays only if the revision earns more than the answer. Without
    rewards all pairs stay."""

    output: str = "constitutional.jsonl"
    """File to write. An existing one is replaced."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for too short critiques, no principles, or templates without their placeholders."""
        super().__post_init__()
        check_int("critique_tokens", self.critique_tokens, at_least=1)
        object.__setattr__(self, "principles", tuple(self.principles))
        if not self.principles:
            raise ValueError("principles must have at least one text, got none")
        for name, words in (
            ("critique_template", ("{prompt}", "{answer}", "{principle}")),
            ("revision_template", ("{prompt}", "{answer}", "{critique}")),
        ):
            if missing := [word for word in words if word not in getattr(self, name)]:
                raise ValueError(f"{name} must contain {', '.join(words)}, got none of {', '.join(missing)}")
