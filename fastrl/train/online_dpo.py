"""Online DPO in one file: sample groups of completions, take the best and the worst of each as a pair, step.

    for each step
        prompts -> completions        `group_size` of each, from the policy as it is now
        completions -> rewards        as in GRPO. A reward that failed is NaN, and its completion is in no pair
        rewards -> pairs              the best and the worst of a group, no pair if all are equal
        reference log-probs           of all completions: the pairs need them, and the KL is measured on them
        pairs -> gradient             PreferenceLoss.from_hidden, divided by the pairs of the step

The pairs come from the policy that they train, ranked by a reward (Guo et al. 2024, arXiv 2402.04792, rank by a model).
`kl` is KL(policy || reference) per completion. The mean log-ratio of the samples estimates it without bias.

Left out: more than one process, losses of single rows (kto, bco: `fastrl train dpo`), an inference engine for the
rollouts, dropout, gradient checkpointing.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastrl.losses.preference.loss import PreferenceLoss
from fastrl.train.config.dpo import OnlineDPOConfig
from fastrl.train.data.rollout import Rollout
from fastrl.train.dpo import preference_loss
from fastrl.train.model import Policy, load_policy
from fastrl.train.pairs import best_and_worst
from fastrl.train.rewards.reward_set import build_rewards, check_rewards
from fastrl.train.rewards.tasks import load_task
from fastrl.train.rollouts.evaluate import CORRECT
from fastrl.train.rollouts.sampler import Sampler, batch_metrics, reward_model_of
from fastrl.train.run.run import MetricSums, Run, RunResult
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
    policy = load_policy(config, run.device)
    reward_model = reward_model_of(config, policy)
    reference = ReferencePolicy(policy, adapters=config.lora_rank > 0) if loss.reads_reference else None
    run.start(policy.parameters())
    rewards = build_rewards({CORRECT: 0.0, **config.rewards}, task, config.reward_timeout_s)
    sampler = Sampler(run, task, policy, rewards, reward_model)

    with rewards, run:
        if run.start_step == 0:
            sampler.evaluate(0)
        for step in run.steps():
            problems = sampler.problems(step)
            rollout = sampler.rollout(problems)
            if step == run.start_step:
                policy.verify(rollout.rows(0, 4))
            run.clock.lap("rollout")
            scored = sampler.score(problems, rollout)
            chosen, rejected = (index.to(run.device) for index in best_and_worst(scored.total, config.group_size))
            run.clock.lap("reward")

            totals = MetricSums()
            ref = None
            if reference is not None:
                with reference.active(policy) as frozen:
                    ref = frozen.logprobs(rollout, config.micro_batch)
                log_ratio = torch.where(rollout.completion_mask, rollout.logprobs - ref, 0.0).sum()
                totals.add({"kl": (log_ratio, torch.full_like(log_ratio, config.batch_size))})
            run.clock.lap("logprobs")

            # Without a pair there is no gradient and no optimiser step.
            for _ in range(config.epochs_per_batch if len(chosen) else 0):
                backward_ranked(run, policy, loss, rollout, (chosen, rejected), ref, totals)
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

    run.save_model(policy.model, policy.tokenizer)
    return run.result()


def backward_ranked(
    run: Run[OnlineDPOConfig],
    policy: Policy,
    loss: PreferenceLoss,
    rollout: Rollout,
    pairs: tuple[Tensor, Tensor],  # (P,) chosen and rejected rows
    ref_logprobs: Tensor | None,  # (B, T)
    totals: MetricSums,
) -> None:
    """Accumulate the gradient of the loss of the pairs in the parameters, in micro-batches."""
    config = run.config
    chosen, rejected = pairs
    # The setting counts completions, and a pair is two of them.
    size = len(chosen) if config.micro_batch_size is None else max(1, config.micro_batch_size // 2)
    n_tokens = float(rollout.completion_mask[chosen].sum())
    value = torch.zeros((), device=chosen.device)
    for start in range(0, len(chosen), size):
        rows = torch.cat([chosen[start : start + size], rejected[start : start + size]])
        part = rows_of(rollout, rows)
        ref = None if ref_logprobs is None else ref_logprobs[rows, : part.completion_ids.shape[1]]
        hidden = policy.hidden(part)  # (B, T, D)
        output = loss.from_hidden(
            hidden, policy.weight, part.completion_ids, part.completion_mask, ref_logprobs=ref,
            n_pairs=float(len(chosen)), n_tokens=n_tokens, **policy.options,
        )  # fmt: skip
        run.backward(output.loss)
        totals.add(output.metrics)
        value = value + output.loss.detach()
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
