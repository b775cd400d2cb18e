"""Accuracy on held-out problems, with its standard error and some completions to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.train.config.sampling import TaskEvaluationConfig
from fastrl.train.data.encoding import encode_prompts
from fastrl.train.rewards.reward_set import RewardSet
from fastrl.train.rewards.tasks import Problem, Task
from fastrl.train.rollouts.generate import decode, generate
from fastrl.train.run.measure import Measure, Measurement
from fastrl.train.run.run import Run

# The component of the rewards that is 1 for a right answer and 0 for a wrong one.
CORRECT = "exact"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the share of right answers among `n` problems, one completion each."""

    step: int
    mode: str
    n: int
    accuracy: float
    standard_error: float
    completions: tuple[str, ...]
    rewards: dict[str, Tensor]
    """Reward -> (n,) its values, NaN where it failed; the accuracy's own among them."""

    def of_reward(self, name: str) -> Measurement:
        """Return the mean of a reward over the problems on which it did not fail, with the error of a draw of them."""
        values = self.rewards[name].double()
        values = values[~values.isnan()]
        n = len(values)
        mean, spread = (float(values.mean()), float(values.std(correction=0))) if n else (math.nan, math.nan)
        return Measurement(self.step, mean, spread / math.sqrt(max(n, 1)), n, Measure(name), mode=self.mode)

    def record(self) -> dict[str, Any]:
        """Return what `evaluations.json` keeps."""
        return {
            "step": self.step,
            "split": "held_out",
            "mode": self.mode,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "n": self.n,
        }

    def samples(self, problems: Sequence[Problem], task: Task, count: int) -> list[dict[str, Any]]:
        """Return what `samples.json` keeps: the first completions, to be read."""
        return [
            {
                "step": self.step,
                "mode": self.mode,
                "prompt": problem.prompt,
                "completion": completion,
                "answer": problem.answer,
                "reward": float(task.is_correct(problem, completion)),
            }
            for problem, completion in list(zip(problems, self.completions, strict=True))[:count]
        ]


@dataclass(frozen=True)
class HeldOut:
    """The held-out problems of a run, answered whenever it is evaluated."""

    run: Run[Any]
    """A run with the settings of `TaskEvaluationConfig`."""
    task: Task
    rewards: RewardSet
    """Among them the one called `CORRECT`; its weight does not matter."""
    stop_ids: Sequence[int]
    measured: Sequence[str] = ()
    """Further rewards whose means are recorded."""

    def evaluate(self, model: Any, tokenizer: Any, step: int) -> dict[str, float]:
        """Record accuracy and samples in each of the run's modes, and return the accuracies as metrics."""
        config: TaskEvaluationConfig = self.run.config
        problems = self.task.held_out(config.eval_problems) if config.eval_problems else []
        found = {}
        for mode in config.eval_modes if problems else ():
            result = evaluate(
                model,
                tokenizer,
                problems,
                self.rewards,
                step=step,
                mode=mode,
                prompt_template=config.prompt_template,
                system_prompt=config.system_prompt,
                max_new_tokens=config.max_new_tokens,
                stop_ids=self.stop_ids,
                temperature=config.temperature,
                batch_size=config.eval_batch_size,
                seed=config.seed,
            )
            self.run.log.add(result.record(), result.samples(problems, self.task, config.eval_samples))
            found[f"eval/{mode}_accuracy"] = result.accuracy
            for name in self.measured:
                measurement = result.of_reward(name)
                self.run.log.add(measurement.record())
                found[f"eval/{mode}_{name}"] = measurement.value
        return found


def evaluate(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    rewards: RewardSet,
    *,
    step: int,
    mode: str,
    prompt_template: str,
    system_prompt: str | None,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float,
    batch_size: int,
    seed: int,
) -> Evaluation:
    """Return the accuracy of one completion per problem, sampled (with its own seed) or greedy.

    The same seed is used at every step, so that evaluations differ by the policy and not by the dice, and the run's
    own random numbers are not touched. An answer that the scorer fails on counts as wrong. The standard error is
    sqrt(p (1 - p) / n), that of a draw of n problems.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    completions: list[str] = []
    lengths: list[int] = []
    for start in range(0, len(problems), batch_size):
        chunk = problems[start : start + batch_size]
        rollout = generate(
            model,
            encode_prompts(tokenizer, [p.prompt for p in chunk], template=prompt_template, system=system_prompt),
            group_size=1,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            pad_id=tokenizer.pad_token_id,
            temperature=temperature,
            greedy=mode == "greedy",
            generator=generator,
        )
        completions += decode(tokenizer, rollout)
        lengths += rollout.completion_mask.sum(dim=1).tolist()
    components = rewards(problems, completions, lengths).components
    accuracy = float(components[CORRECT].nan_to_num(nan=0.0).double().mean())
    error = math.sqrt(accuracy * (1.0 - accuracy) / len(problems))
    return Evaluation(step, mode, len(problems), accuracy, error, tuple(completions), components)
