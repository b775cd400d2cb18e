"""Online DPO in one file: sample groups of completions, take the best and the worst of each as a pair, step.

    for each step
        prompts -> completions        `group_size` of each, from the policy as it is now
        completions -> rewards        as in GRPO; a reward that failed is NaN, its completion is in no pair
        rewards -> pairs              the best and the worst of a group; none where all are equal
        reference log-probs           of all completions: the pairs need them, and the KL is measured on them
        pairs -> gradient             PreferenceLoss.from_hidden, divided by the pairs of the step

The pairs come from the policy that they train, ranked by a reward (Guo et al. 2024, arXiv 2402.04792, rank by a model).
`kl` is KL(policy || reference) per completion, estimated without bias by the mean log-ratio of the samples.

Left out: more than one process, losses of single rows (kto, bco: `fastrl train dpo`), an inference engine for the
rollouts, dropout, gradient checkpointing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastrl.losses.preference.loss import PreferenceLoss
from fastrl.train.config.dpo import OnlineDPOConfig
from fastrl.train.data.packing import use_flash_attention
from fastrl.train.dpo import preference_loss
from fastrl.train.model import Head, add_lora, head_of, load_model
from fastrl.train.pairs import best_and_worst
from fastrl.train.preferences.comparisons import backward_rollout
from fastrl.train.rewards.model import load_reward_model
from fastrl.train.rewards.reward_set import build_rewards, check_rewards
from fastrl.train.rewards.tasks import load_task
from fastrl.train.rollouts.evaluate import CORRECT
from fastrl.train.rollouts.generate import Rollout
from fastrl.train.rollouts.sampler import Sampler, batch_metrics
from fastrl.train.run.run import MetricSums, Run, RunResult
from fastrl.train.update.batches import forward_of, logprobs_in_micro_batches, verify_rollout
from fastrl.train.update.reference import ReferencePolicy


def run_online_dpo(config: OnlineDPOConfig) -> RunResult:
    """Train as `config` says and return where the results are.

    Raises ValueError for settings that do not fit together, and for a model whose log-probs this loop cannot reproduce.
    """
    loss = preference_loss(config.loss, config.beta, config.loss_options, whole_step=config.micro_batch_size is None)
    if loss.unpaired:
        raise ValueError(f"online DPO needs a loss of pairs, got {config.loss!r}; use it with fastrl train dpo")
    task = load_task(config.task, **{"seed": config.seed, **config.task_parameters})
    task.held_out(config.eval_problems)  # too many of them are refused before the model is loaded
    check_rewards(config.rewards, task)
    run = Run(config)
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=run.device)
    if config.packing:
        use_flash_attention(model)
    reward_model = None
    if config.reward_model is not None:
        reward_model = load_reward_model(config.reward_model, tokenizer, dtype=config.dtype, device=run.device)
    reference = ReferencePolicy(model, adapters=config.lora_rank > 0) if loss.reads_reference else None
    if config.lora_rank:
        model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_modules)
    head = head_of(model)
    run.start(dict(model.named_parameters()))
    rewards = build_rewards({CORRECT: 0.0, **config.rewards}, task, config.reward_timeout_s)
    sampler = Sampler(run, task, model, tokenizer, rewards, reward_model)

    with rewards, run:
        if run.start_step == 0:
            sampler.evaluate(0)
        for step in run.steps():
            problems = sampler.problems(step)
            rollout = sampler.rollout(problems)
            if step == run.start_step:
                verify_rollout(model, head, rollout, config)
            run.clock.lap("rollout")
            scored = sampler.score(problems, rollout)
            chosen, rejected = (index.to(run.device) for index in best_and_worst(scored.total, config.group_size))
            run.clock.lap("reward")

            totals = MetricSums()
            ref = None
            if reference is not None:
                with reference.active(model) as reference_model:
                    ref = logprobs_in_micro_batches(reference_model, reference.head(head), rollout, config)
                log_ratio = torch.where(rollout.completion_mask, rollout.logprobs - ref, 0.0).sum()
                totals.add({"kl": (log_ratio, torch.full_like(log_ratio, config.batch_size))})
            run.clock.lap("logprobs")

            for _ in range(config.epochs_per_batch if len(chosen) else 0):
                backward_pairs(run, model, head, loss, rollout, (chosen, rejected), ref, totals)
                run.clock.lap("backward")
                totals.add(run.clip_and_step())
                run.clock.lap("optimizer")

            metrics = {
                **totals.means(),
                **batch_metrics(rollout, scored),
                "pairs": float(len(chosen)),
                "reward": float(scored.total.nanmean()),
                "learning_rate": run.learning_rate,
                **run.clock.times(),
            }
            metrics["tokens_per_second"] = float(rollout.completion_mask.sum()) / metrics["time/step"]
            if run.evaluation_due(step + 1):
                metrics |= sampler.evaluate(step + 1)
            run.finish_step(step, metrics)

    run.save_model(model, tokenizer)
    return run.result()


def backward_pairs(
    run: Run[OnlineDPOConfig],
    model: Any,
    head: Head,
    loss: PreferenceLoss,
    rollout: Rollout,
    pairs: tuple[Tensor, Tensor],  # (P,) chosen and rejected rows
    ref_logprobs: Tensor | None,  # (B, T)
    totals: MetricSums,
) -> None:
    """Add the gradient of the loss of the pairs, in micro-batches, to that of the parameters."""
    config = run.config
    chosen, rejected = pairs
    size = len(chosen) if config.micro_batch_size is None else max(1, config.micro_batch_size // 2)
    n_tokens = float(rollout.completion_mask[chosen].sum())
    value = torch.zeros((), device=chosen.device)
    for start in range(0, len(chosen), size):
        rows = torch.cat([chosen[start : start + size], rejected[start : start + size]])
        part = rows_of(rollout, rows)
        ref = None if ref_logprobs is None else ref_logprobs[rows, : part.completion_ids.shape[1]]
        output = backward_rollout(
            run, model, head, loss, part, ref,
            temperature=config.temperature, forward=forward_of(config), n_pairs=float(len(chosen)), n_tokens=n_tokens,
        )  # fmt: skip
        totals.add(output.metrics)
        value = value + output.loss
    totals.add({"loss": (value, torch.ones_like(value))})


def rows_of(rollout: Rollout, rows: Tensor) -> Rollout:
    """Return the completions at the indices `rows`, in that order, with only their own prompts and no more padding."""
    chosen = dataclasses.replace(
        rollout,
        **{
            name: getattr(rollout, name)[rows]
            for name in ("prompt_index", "completion_ids", "completion_mask", "logprobs", "truncated")
        },
    )
    return chosen.rows(0, len(rows))
