"""Loops on given examples: the order of the examples, and the steps around their gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fastrl.train.model import Policy
from fastrl.train.rewards.reward_set import build_rewards
from fastrl.train.rewards.tasks import Task
from fastrl.train.rollouts.evaluate import CORRECT, HeldOut
from fastrl.train.run.measure import Measurement
from fastrl.train.run.run import Run


def train_on_examples(
    run: Run[Any],
    n: int,
    *,
    gradient: Callable[[list[int]], dict[str, float]],
    evaluate: Callable[[int], Mapping[str, float]],
    dropped: int,
    cut: int,
) -> None:
    """Take the steps of the run, which is entered already, on `examples_per_step` of the n examples each.

    Args:
        run: a run whose configuration has `examples_per_step`.
        n: number of examples. Each is seen once before any is seen again.
        gradient: accumulates the gradient of a step on the examples with these indices in the parameters, and returns
            metrics, `tokens` among them.
        evaluate: measures the model after so many steps, and returns metrics.
        dropped, cut: examples that were left out or cut when they were read, for the metrics.
    """
    if run.start_step == 0:
        evaluate(0)
    size = run.config.examples_per_step
    for step in run.steps():
        metrics = gradient(shuffled(n, start=step * size, count=size, seed=run.config.seed))
        run.clock.lap("backward")
        metrics |= {name: float(total / count) for name, (total, count) in run.clip_and_step().items()}
        run.clock.lap("optimizer")
        metrics |= {
            "epoch": (step + 1) * size / n,
            "dropped_examples": float(dropped),
            "cut_examples": float(cut),
            "learning_rate": run.learning_rate,
            **run.clock.times(),
        }
        metrics["tokens_per_second"] = metrics["tokens"] / metrics["time/step"]
        if run.evaluation_due(step + 1):
            metrics |= evaluate(step + 1)
        run.finish_step(step, metrics)


@contextlib.contextmanager
def held_out_problems(run: Run[Any], task: Task | None, policy: Policy) -> Iterator[HeldOut | None]:
    """Yield the held-out problems of the task while the workers of its rewards live, or None without a task."""
    if task is None:
        yield None
        return
    with build_rewards({CORRECT: 0.0}, task, run.config.reward_timeout_s) as rewards:
        yield HeldOut(run, task, rewards, policy)


def log_measurements(run: Run[Any], measurements: Sequence[Measurement]) -> dict[str, float]:
    """Record the measurements, and return them as metrics `eval/NAME`, with _ for a space."""
    for measurement in measurements:
        run.log.add(measurement.record())
    return {f"eval/{measured.measure.name.replace(' ', '_')}": measured.value for measured in measurements}


def shuffled(n: int, *, start: int, count: int, seed: int) -> list[int]:
    """Return entries `start` to `start + count` of an endless stream of the indices below n.

    The stream is one random order of all indices after the other. Each order is a function of the seed and its number.
    So a run can continue at any place without a state of its own.
    """
    taken: list[int] = []
    for epoch, order in _orders(n, start // n, seed):
        first = max(0, start - epoch * n)
        taken += order[first : first + count - len(taken)]
        if len(taken) == count:
            break
    return taken


def _orders(n: int, epoch: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    while True:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        yield epoch, torch.randperm(n, generator=generator).tolist()
        epoch += 1
