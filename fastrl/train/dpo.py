"""DPO and its relatives in one file: given pairs, implicit rewards, one optimiser step after the other.

    records -> comparisons        a prompt with its chosen and its rejected completion
    reference log-probs           once, before training, kept in the folder of the run. The reference is then let go
    for each step
        comparisons -> gradient   PreferenceLoss.from_hidden, no logits, divided by the pairs of the whole step
        one optimiser step
    now and then                  held-out pairs: how often the chosen one has the greater implicit reward, and by how
                                  much. Answers to held-out problems of a task

Losses of single rows (kto, bco) take records with a `label`, or split each pair into two rows.

KTO's reference point is the positive part of the mean log-ratio of mismatched completions, over the whole step and
before its gradient. Here the mismatched completion belongs to the next record with another prompt (Ethayarajh et al.
2024, arXiv 2402.01306, section 4).

BCO's baseline is the mean implicit reward of all rows of the steps before. Jung et al. 2024, arXiv 2404.04656, keep a
running mean that includes the step itself, which would tie its rows together.

Left out: more than one process, dropout (the model stays in eval mode), gradient checkpointing, updates of the
reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrl.losses.preference.loss import PreferenceLoss
from fastrl.train.config.dpo import DPOConfig
from fastrl.train.data.encoding import Encoder
from fastrl.train.model import Policy, load_policy
from fastrl.train.preferences.comparisons import (
    Comparison,
    by_length,
    comparison_records,
    padded_logprobs,
    rollout_of,
)
from fastrl.train.preferences.dataset import Preferences, preferences, select, with_reference
from fastrl.train.rewards.tasks import load_task
from fastrl.train.run.measure import Measure, Measurement
from fastrl.train.run.run import MetricSums, Run, RunResult
from fastrl.train.update.epochs import held_out_problems, log_measurements, train_on_examples

REWARD_ACCURACY = Measure("reward accuracy", share=True)


REWARD_MARGIN = Measure("reward margin")


class RunningMean:
    """The mean of all numbers so far, 0 before the first."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    @property
    def mean(self) -> float:
        """The mean."""
        return self.total / self.count if self.count else 0.0

    def add(self, total: float, count: int) -> None:
        """Add the sum of `count` numbers."""
        self.total, self.count = self.total + total, self.count + count

    def state_dict(self) -> dict[str, Any]:
        """Return the sum and the count."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sum and the count."""
        self.total, self.count = float(state["total"]), int(state["count"])


def run_dpo(config: DPOConfig) -> RunResult:
    """Train as `config` says and return where the results are.

    Raises ValueError for settings that do not fit together, data that cannot be read, and a model whose log-probs this
    loop cannot reproduce.
    """
    whole_step = config.micro_batch >= config.examples_per_step
    loss = preference_loss(config.loss, config.beta, config.loss_options, whole_step=whole_step)
    task = None
    if config.task is not None:
        task = load_task(config.task, **{"seed": config.seed, **config.task_parameters})
        task.held_out(config.eval_problems)  # too many of them are refused before the model is loaded
    train_records, held_out_records = comparison_records(config)
    run = Run(config)
    policy = load_policy(config, run.device, adapters=False)  # the reference is the bare model
    encoder = Encoder(policy.tokenizer, policy.stop_ids, config.prompt_template, config.system_prompt)
    train, skipped = preferences(train_records, encoder, config, loss, split=True)
    held_out = None
    if held_out_records is not None:
        held_out, _ = preferences(held_out_records, encoder, config, loss, split=False)
    policy.verify(rollout_of(train.comparisons[:2], policy.pad_id, run.device))
    if loss.reads_reference:
        train, held_out = with_reference(run, policy, train, held_out)
    policy = policy.with_adapters(config)
    rewards_so_far = RunningMean()
    run.register("rewards_so_far", rewards_so_far)
    run.start(policy.parameters())

    def gradient(chosen: list[int]) -> dict[str, float]:
        return backward_preferences(run, policy, loss, select(train, chosen), rewards_so_far, size=config.micro_batch)

    with held_out_problems(run, task, policy) as problems, run:

        def evaluate_now(step: int) -> dict[str, float]:
            found = {}
            if held_out is not None:
                measured = held_out_rewards(policy, loss, held_out, step, config.micro_batch)
                found |= log_measurements(run, measured)
            if problems is not None:
                found |= problems.evaluate(step)
            return found

        train_on_examples(run, len(train), gradient=gradient, evaluate=evaluate_now, dropped=skipped[0], cut=skipped[1])

    run.save_model(policy.model, policy.tokenizer)
    return run.result()


def backward_preferences(
    run: Run[Any], policy: Policy, loss: PreferenceLoss, step: Preferences, rewards_so_far: RunningMean, *, size: int
) -> dict[str, float]:
    """Accumulate the gradient of the loss of one optimiser step in the parameters, and return its metrics.

    `size` examples go through the model at once. `rewards_so_far` is BCO's baseline. It takes in the rewards of the
    step.
    """
    inputs: dict[str, Any] = {"n_pairs": float(len(step))}
    if not loss.unpaired:
        inputs["n_tokens"] = float(sum(len(comparison.completions[0]) for comparison in step.comparisons))
    elif loss.shift == "reference_point":
        inputs["reference_point"] = mismatched_log_ratio(policy, step, size)
    elif loss.shift == "baseline":
        inputs["baseline"] = rewards_so_far.mean
    totals = MetricSums()
    value = torch.zeros((), device=run.device)
    tokens = 0
    for indices in by_length(step.comparisons, size):
        part = select(step, indices)
        few = part.comparisons
        if loss.unpaired:
            # The mismatched completion was for the reference point only.
            few = [Comparison(comparison.prompt, comparison.completions[:1]) for comparison in few]
            assert part.labels is not None
            inputs["desirable"] = torch.tensor(part.labels, device=run.device)
        rollout = rollout_of(few, policy.pad_id, run.device)
        ref = None
        if part.ref is not None:
            kept = [row[: len(few[0].completions)] for row in part.ref]
            ref = padded_logprobs(kept, rollout.completion_ids.shape[1], run.device)
        hidden = policy.hidden(rollout)  # (B, T, D)
        output = loss.from_hidden(
            hidden, policy.weight, rollout.completion_ids, rollout.completion_mask, ref_logprobs=ref, **inputs,
            **policy.options,
        )  # fmt: skip
        run.backward(output.loss)
        totals.add(output.metrics)
        value = value + output.loss.detach()
        tokens += int(rollout.completion_mask.sum()) + int(rollout.prompt_mask.sum())
    metrics = totals.means()
    if loss.shift == "baseline":  # of the steps after this one
        assert step.labels is not None
        wanted = sum(step.labels)
        by_side = (("rewards/chosen", wanted), ("rewards/rejected", len(step) - wanted))
        rewards_so_far.add(sum(metrics[name] * count for name, count in by_side if count), len(step))
    return {**metrics, "loss": float(value), "tokens": float(tokens)}


def mismatched_log_ratio(policy: Policy, step: Preferences, size: int) -> float:
    """Return KTO's reference point in nats: max(0, mean log-ratio of the mismatched completions of the step)."""
    assert step.ref is not None
    others = [Comparison(comparison.prompt, comparison.completions[1:]) for comparison in step.comparisons]
    total = 0.0
    for indices in by_length(others, size):
        rollout = rollout_of([others[index] for index in indices], policy.pad_id, policy.device)
        total += float(policy.logprobs(rollout).sum()) - float(sum(step.ref[index][1].sum() for index in indices))
    return max(0.0, total / len(others))


@torch.no_grad()
def held_out_rewards(
    policy: Policy, loss: PreferenceLoss, held_out: Preferences, step: int, size: int
) -> list[Measurement]:
    """Return the accuracy and the margin of the implicit rewards on held-out examples.

    The implicit reward is beta times the log-ratio to the reference. Without a reference it is beta times the log-prob.
    It is averaged over the tokens if the loss averages. A pair is right if the chosen one has the greater reward, and
    half right if both are equal, as they all are before training with a reference. Completions with a label have the
    margin alone: the difference of the mean rewards of both kinds.
    """
    rewards = torch.zeros(len(held_out), len(held_out.comparisons[0].completions), dtype=torch.float64)
    for indices in by_length(held_out.comparisons, size):
        part = select(held_out, indices)
        rollout = rollout_of(part.comparisons, policy.pad_id, policy.device)
        logprobs = policy.logprobs(rollout).double()
        if part.ref is not None:
            logprobs = logprobs - padded_logprobs(part.ref, logprobs.shape[1], logprobs.device)
        score = logprobs.sum(dim=1)
        if loss.reduce == "mean":
            score = score / rollout.completion_mask.sum(dim=1)
        rewards[indices] = loss.beta * score.view(-1, len(part)).T.cpu()
    if held_out.labels is not None:
        return _margin_of_labels(rewards[:, 0], torch.tensor(held_out.labels), step)
    margins = rewards[:, 0] - rewards[:, 1]
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    n = len(held_out)
    accuracy = float(right.mean())
    return [
        Measurement(step, accuracy, (accuracy * (1.0 - accuracy) / n) ** 0.5, n, REWARD_ACCURACY),
        Measurement(step, float(margins.mean()), float(margins.std(correction=0)) / n**0.5, n, REWARD_MARGIN),
    ]


def _margin_of_labels(rewards: Tensor, labels: Tensor, step: int) -> list[Measurement]:
    sides = [rewards[labels], rewards[~labels]]
    if not all(len(side) for side in sides):
        return []
    margin = float(sides[0].mean() - sides[1].mean())
    error = float(sum(side.var(correction=0) / len(side) for side in sides)) ** 0.5
    return [Measurement(step, margin, error, len(rewards), REWARD_MARGIN)]


def preference_loss(name: str, beta: float | None, options: Mapping[str, Any], *, whole_step: bool) -> PreferenceLoss:
    """Return the preset `name` with the options.

    Args:
        name: one of `PreferenceLoss.presets()`.
        beta: None keeps the beta of the preset.
        options: further fields, and `style`.
        whole_step: all examples of an optimiser step are in one forward pass.

    Raises:
        ValueError: an unknown preset or field, `beta` given twice, or a loss that compares the examples of a step with
            each other although they are in several passes.
    """
    fields = dict(options)
    if beta is not None:
        if "beta" in fields:
            raise ValueError(f"beta is given twice: {beta!r} and {fields['beta']!r} in loss_options")
        fields["beta"] = beta
    loss = PreferenceLoss.preset(name, **fields)
    if (loss.couples_pairs or loss.shift == "paired_mean") and not whole_step:
        raise ValueError(
            f"the loss {name!r} compares the examples of a step with each other; expected micro_batch_size=None"
        )
    return loss
