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
from fastrl.train.model import Policy
from fastrl.train.rewards.reward_set import RewardSet
from fastrl.train.rewards.tasks import Problem, Task
from fastrl.train.rollouts.generate import decode, generate
from fastrl.train.run.measure import Measure, Measurement
from fastrl.train.run.run import Run

# The component of the rewards that is 1 for a right answer and 0 for a wrong one.
CORRECT = "exact"


@dataclass(frozen=True)
class TaskEvaluation:
    """One evaluation: the share of right answers among `n` problems, one completion each."""

    step: int
    mode: str
    n: int
    accuracy: float
    standard_error: float
    completions: tuple[str, ...]
    rewards: dict[str, Tensor]
    """Reward -> its values (n,), NaN if it failed. `CORRECT` is among them."""

    def of_reward(self, name: str) -> Measurement:
        """Return the mean of a reward over the problems on which it did not fail, with its standard error."""
        values = self.rewards[name].double()
        values = values[~values.isnan()]
        n = len(values)
        mean, spread = (float(values.mean()), float(values.std(correction=0))) if n else (math.nan, math.nan)
        return Measurement(self.step, mean, spread / math.sqrt(max(n, 1)), n, Measure(name), mode=self.mode)

    def record(self) -> dict[str, Any]:
        """Return the record for `evaluations.json`."""
        return {
            "step": self.step,
            "split": "held_out",
            "mode": self.mode,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "n": self.n,
        }

    def samples(self, problems: Sequence[Problem], task: Task, count: int) -> list[dict[str, Any]]:
        """Return the first completions for `samples.json`, to be read.

        Their rewards are the ones that the worker gave: nothing scores a completion in this process. None stands for
        a reward that failed or was not asked for.
        """
        del task
        correct = self.rewards[CORRECT].tolist() if CORRECT in self.rewards else [math.nan] * len(self.completions)
        return [
            {
                "step": self.step,
                "mode": self.mode,
                "prompt": problem.prompt,
                "completion": completion,
                "answer": problem.answer,
                "reward": None if math.isnan(reward) else reward,
            }
            for problem, completion, reward in list(zip(problems, self.completions, correct, strict=True))[:count]
        ]


@dataclass(frozen=True)
class HeldOut:
    """The held-out problems of a run, answered whenever it is evaluated."""

    run: Run[Any]
    """A run with the settings of `TaskEvaluationConfig`."""
    task: Task
    rewards: RewardSet
    """`CORRECT` is among them. Its weight does not matter."""
    policy: Policy
    measured: Sequence[str] = ()
    """Further rewards whose means are recorded."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Record accuracy and samples in each of the run's modes, and return the accuracies as metrics."""
        config: TaskEvaluationConfig = self.run.config
        problems = self.task.held_out(config.eval_problems) if config.eval_problems else []
        found = {}
        for mode in config.eval_modes if problems else ():
            result = evaluate(self.policy, problems, self.rewards, config, step=step, mode=mode)
            self.run.log.add(result.record(), result.samples(problems, self.task, config.eval_samples))
            found[f"eval/{mode}_accuracy"] = result.accuracy
            for name in self.measured:
                measurement = result.of_reward(name)
                self.run.log.add(measurement.record())
                found[f"eval/{mode}_{name}"] = measurement.value
        return found


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    rewards: RewardSet,
    config: TaskEvaluationConfig,
    *,
    step: int,
    mode: str,
) -> TaskEvaluation:
    """Return the accuracy of one completion per problem, sampled (with its own seed) or greedy.

    An answer that the scorer fails on counts as wrong. The standard error is sqrt(p (1 - p) / n), for a draw of n
    problems.
    """
    # The same seed at every step: evaluations differ by the policy and not by the dice, and the run's own random
    # numbers are not touched.
    generator = torch.Generator(device=policy.device).manual_seed(config.seed)
    stop_ids, tokenizer = policy.stop_ids, policy.tokenizer
    completions: list[str] = []
    lengths: list[int] = []
    for start in range(0, len(problems), config.eval_batch_size):
        chunk = problems[start : start + config.eval_batch_size]
        prompts = [problem.prompt for problem in chunk]
        rollout = generate(
            policy.model,
            encode_prompts(tokenizer, prompts, template=config.prompt_template, system=config.system_prompt),
            group_size=1,
            max_new_tokens=config.max_new_tokens,
            stop_ids=stop_ids,
            pad_id=policy.pad_id,
            temperature=config.temperature,
            greedy=mode == "greedy",
            generator=generator,
        )
        completions += decode(tokenizer, rollout)
        lengths += rollout.completion_mask.sum(dim=1).tolist()
    components = rewards(problems, completions, lengths).components
    accuracy = float(components[CORRECT].nan_to_num(nan=0.0).double().mean())
    error = math.sqrt(accuracy * (1.0 - accuracy) / len(problems))
    return TaskEvaluation(step, mode, len(problems), accuracy, error, tuple(completions), components)
