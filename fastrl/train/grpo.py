"""GRPO in one file: sample groups of completions, score them, compare within each group, take a step.

    for each step
        prompts -> completions        sampled from the policy itself, the whole distribution, at the loss's temperature.
                                      Dynamic sampling redraws groups whose rewards are all equal
        completions -> rewards        a reward that failed is NaN: it is counted, and its completion has advantage 0
        rewards -> advantages         (R - mean of the group) / std of the group, or as configured. Rewards of steps are
                                      normalised over the group too, and summed from each token to the end
        old, reference log-probs      by the same code, in the same micro-batches, as in the loss: the ratio is 1
        epochs x minibatches          PolicyLoss.from_hidden, no logits of the whole batch, one optimiser step each

The step itself is `take_steps`: forward, loss, backward, step. Every micro-batch divides its loss by the counts of the
whole optimiser step. So the split into micro-batches changes the memory and not the gradient. A batch keeps its
micro-batches, and epochs differ in their order only.

Left out: more than one process (use the trainers of `fastrl.integrations` there), an inference engine for the
rollouts, dropout (the model stays in eval mode, or the importance ratios would not be 1), gradient checkpointing,
and losses that do not look at the rewards (they are refused by name).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from fastrl.losses.advantages.group import group_advantages, reward_metrics
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.model import Policy, load_policy
from fastrl.train.rewards.reward_set import build_rewards, check_rewards
from fastrl.train.rewards.tasks import load_task
from fastrl.train.rollouts.dynamic_sampling import sample_batch
from fastrl.train.rollouts.evaluate import CORRECT
from fastrl.train.rollouts.prompts import Prompts
from fastrl.train.rollouts.sampler import Sampler, batch_metrics, reward_model_of
from fastrl.train.rollouts.step_rewards import process_advantages
from fastrl.train.run.run import MetricSums, Run, RunResult
from fastrl.train.update.batches import RolloutBatch, StepCounts, named_loss, ratio_deviation, zero_advantages
from fastrl.train.update.clip_cov import CovarianceSelection
from fastrl.train.update.reference import ReferencePolicy


def run_grpo(config: GRPOConfig) -> RunResult:
    """Train as `config` says and return where the results are.

    Raises ValueError for settings that do not fit together, and for a model whose log-probs this loop cannot reproduce.
    """
    loss = build_loss(config)
    task = load_task(config.task, **{"seed": config.seed, **config.task_parameters})
    task.held_out(config.eval_problems)  # too many of them are refused before the model is loaded
    check_rewards(config.rewards, task)
    check_rewards(config.step_rewards, task)
    run = Run(config)
    policy = load_policy(config, run.device)
    reward_model = reward_model_of(config, policy)
    reference = None
    if loss.kl is not None and loss.kl_to == "ref":
        reference = ReferencePolicy(policy, adapters=config.lora_rank > 0)
        if config.reference_sync_steps:
            run.register("reference", reference)
    elif config.reference_sync_steps:
        raise ValueError(f"reference_sync_steps={config.reference_sync_steps} needs a KL to a reference, got none")
    prompts = Prompts(config, task)
    run.register("prompts", prompts)
    run.start(policy.parameters())
    rewards = build_rewards({CORRECT: 0.0, **config.rewards}, task, config.reward_timeout_s)
    step_rewards = build_rewards(config.step_rewards, task, config.reward_timeout_s) if config.step_rewards else None
    sampler = Sampler(run, task, policy, rewards, reward_model)

    with rewards, step_rewards or contextlib.nullcontext(), run:
        if run.start_step == 0:
            sampler.evaluate(0)
            if config.filter_prompts:
                prompts.filter(sampler)
        for step in run.steps():
            # Rollouts and rewards
            sampled = sample_batch(sampler, prompts, config, policy.pad_id, run.clock)
            problems, rollout, scored = sampled.problems, sampled.rollout, sampled.scored
            prompts.observe(sampled.seen.components[CORRECT])
            if step == run.start_step:
                policy.verify(rollout.rows(0, 4))
                run.clock.lap("verification")

            # Advantages
            lengths = rollout.completion_mask.sum(dim=1)
            advantages = group_advantages(
                scored.total,
                group_size=config.group_size,
                scale=config.advantage_scale,
                baseline=config.advantage_baseline,
                lengths=lengths.cpu() if config.advantage_baseline == "length_weighted" else None,
            ).to(run.device)
            step_metrics: dict[str, float] = {}
            if step_rewards is not None:
                of_steps, step_metrics = process_advantages(problems, rollout, step_rewards, policy.tokenizer, config)
                advantages = advantages[:, None] + of_steps
            run.clock.lap("advantages")

            # Old and reference log-probs
            mask = rollout.completion_mask
            if config.mask_truncated:
                mask = mask & ~rollout.truncated[:, None]
            # With one optimiser step per batch the policy in the loss is the one that sampled, so the old log-probs are
            # only computed once, to measure that the first ratio is 1.
            needs_old = config.epochs_per_batch * config.minibatches > 1 or step == run.start_step
            old = policy.logprobs(rollout, config.micro_batch) if needs_old else None
            ref = None
            if reference is not None:
                with reference.active(policy) as frozen:
                    ref = frozen.logprobs(rollout, config.micro_batch)
            batch = RolloutBatch(rollout, advantages, mask, old, ref)
            run.clock.lap("logprobs")

            # Optimisation
            totals = take_steps(run, policy, loss, batch)
            if reference is not None and config.reference_sync_steps and (step + 1) % config.reference_sync_steps == 0:
                reference.update(policy, config.reference_ema)

            # Bookkeeping
            totals.add(reward_metrics(scored.total, group_size=config.group_size))
            totals.add(zero_advantages(batch))
            metrics = {
                **totals.means(),
                **batch_metrics(rollout, scored),
                **(sampled.metrics() if config.dynamic_sampling != "off" else {}),
                **prompts.metrics(),
                **step_metrics,
                "learning_rate": run.learning_rate,
                **run.clock.times(),
            }
            metrics["tokens_per_second"] = float(lengths.sum()) / metrics["time/step"]
            if run.evaluation_due(step + 1):
                metrics |= sampler.evaluate(step + 1)
            run.finish_step(step, metrics)

    run.save_model(policy.model, policy.tokenizer)
    return run.result()


def take_steps(run: Run[GRPOConfig], policy: Policy, loss: PolicyLoss, batch: RolloutBatch) -> MetricSums:
    """Take the optimiser steps of a batch, and return their metrics."""
    config, metrics = run.config, MetricSums()
    select = CovarianceSelection(config, loss, run.generator) if config.loss == "clip_cov" else None
    zero, one = torch.zeros((), device=run.device), torch.ones((), device=run.device)
    first_step = batch.old_logprobs is not None
    for _ in range(config.epochs_per_batch):
        for minibatch in batch.minibatches(config, run.generator):
            counts = StepCounts.of(minibatch)  # of the whole optimiser step
            deviation = zero
            for part in minibatch:
                hidden = policy.hidden(part.rollout)  # (B, T, D)
                inputs = part.inputs(counts)
                if select is not None:
                    # The denominator keeps the detached tokens.
                    inputs["selection"] = select(policy, hidden, part)
                    metrics.add({"detached_fraction": ((part.mask & ~inputs["selection"]).sum(), part.mask.sum())})
                output = loss.from_hidden(hidden, policy.weight, part.labels, **inputs, **policy.options)
                run.backward(output.loss)
                metrics.add({**output.metrics, "loss": (output.loss.detach(), zero)})
                if first_step:
                    deviation = torch.maximum(deviation, ratio_deviation(output, part))
            del hidden, output  # the optimiser step needs their memory
            run.clock.lap("backward")
            metrics.add({"loss": (zero, one)})  # the losses of the parts add up to the loss of one step
            if first_step:
                metrics.add({"first_step_ratio_max_dev": (deviation, one)})
                first_step = False
            metrics.add(run.clip_and_step())
            run.clock.lap("optimizer")
    return metrics


def build_loss(config: GRPOConfig) -> PolicyLoss:
    """Return the loss that `config` names, with its overrides.

    Raises:
        ValueError: a field is given twice, or this loop cannot feed the loss.
    """
    fields: dict[str, Any] = dict(config.loss_options)
    for name in ("clip_low", "clip_high", "kl", "kl_coef", "entropy_coef"):
        if (value := getattr(config, name)) is not None:
            if name in fields:
                raise ValueError(f"{name} is given twice: {value!r} and {fields[name]!r} in loss_options")
            fields[name] = value
    if fields.get("kl_coef") == 0.0:
        fields.setdefault("kl", None)
    return named_loss(config.loss, fields, config)
