"""The problems of a step: the stream of a task, the problems worth training on, or stages that get harder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastrl.losses.masks import dynamic_sampling_mask
from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.rewards.tasks import Problem, Task, load_task
from fastrl.train.rollouts.evaluate import CORRECT
from fastrl.train.rollouts.sampler import Sampler


class Prompts:
    """The training problems in order, each batch beginning where the last one ended."""

    def __init__(self, config: GRPOConfig, task: Task) -> None:
        """Build the stages of the curriculum. A value that the task refuses is refused here."""
        self._config = config
        values = {"seed": config.seed, **config.task_parameters}
        self._stages = [
            load_task(config.task, **{**values, str(config.curriculum_parameter): value})
            for value in config.curriculum_values
        ] or [task]
        self._position = 0
        self._pool: list[int] | None = None  # positions in the stream, or None for all
        self._stage = 0
        self._recent: list[float] = []  # shares of right answers of the last steps of this stage

    def take(self, count: int) -> list[Problem]:
        """Return the next `count` problems."""
        task, start = self._stages[self._stage], self._position
        self._position += count
        if self._pool is None:
            return task.train(count, start=start)
        slots = [self._pool[index % len(self._pool)] for index in range(start, start + count)]
        return [task.train(1, start=slot)[0] for slot in slots]

    def filter(self, sampler: Sampler) -> None:
        """Keep the problems, of the first `filter_prompts`, that the policy answers right sometimes, but not always.

        Raises:
            ValueError: fewer are kept than a step takes.
        """
        config, task = self._config, self._stages[0]
        kept: list[int] = []
        for start in range(0, config.filter_prompts, config.prompts_per_step):
            problems = task.train(min(config.prompts_per_step, config.filter_prompts - start), start=start)
            correct = sampler.score(problems, sampler.rollout(problems)).components[CORRECT]
            mask = dynamic_sampling_mask(correct, group_size=config.group_size, pass_above=0.5)
            kept += [start + index for index, keep in enumerate(mask[:: config.group_size].tolist()) if keep]
        if len(kept) < config.prompts_per_step:
            raise ValueError(
                f"of filter_prompts={config.filter_prompts} problems {len(kept)} are answered right sometimes, but not "
                f"always, in {config.group_size} completions; a step takes {config.prompts_per_step}"
            )
        self._pool = kept

    def observe(self, correct: Tensor) -> None:  # (B,) 1, 0 or NaN
        """Take note of a step's answers, also of groups without a gradient. The next stage may begin."""
        window = self._config.curriculum_window
        self._recent = [*self._recent, float(correct.nan_to_num(nan=0.0).mean())][-window:]
        learnt = len(self._recent) == window and sum(self._recent) / window >= self._config.curriculum_threshold
        if learnt and self._stage + 1 < len(self._stages):
            self._stage += 1
            self._recent = []
            self._position = 0

    def metrics(self) -> dict[str, float]:
        """Return the stage, counted from 0, and the number of problems kept, if there are stages or a filter."""
        found = {}
        if len(self._stages) > 1:
            found["curriculum_stage"] = float(self._stage)
        if self._pool is not None:
            found["prompts_kept"] = float(len(self._pool))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"position": self._position, "pool": self._pool, "stage": self._stage, "recent": self._recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        self._position, self._pool = int(state["position"]), state["pool"]
        self._stage, self._recent = int(state["stage"]), list(state["recent"])
