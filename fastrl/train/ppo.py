"""PPO in one file: sample completions, pay token rewards, compare with a critic's expectation, take steps.

    for each step
        prompts -> completions         sampled from the policy itself, the whole distribution, at the loss's temperature
        completions -> token rewards   the reward on the last token, minus kl_coef KL(policy || reference) on every one
        old log-probs, values          of the policy and the critic before the update, in the micro-batches of the loss
        values -> advantages, returns  generalised advantage estimation over the completion, whitened over the batch
        epochs x minibatches           the policy loss and the clipped value loss, one optimiser step each. The batch is
                                       left once the policy has moved by more than target_kl

`update` replaces the last part:

    "clip"           as above
    "gradient"       one step of the plain policy gradient
    "trust_region"   one step along the same gradient, as long as a bound on the KL allows
                     (`fastrl.train.update.trust_region`). Then the critic is fitted

Truncated completions have no stop token:

    by default             the reward of the cut text is paid, and the episode ends there
    truncated_reward       another reward is paid
    bootstrap_truncated    the critic's value of the state after the cut is paid, as for an episode that goes on
    mask_truncated         they are left out of the losses

A completion whose reward failed is left out of both losses, and counted.

Left out: more than one process, an inference engine for the rollouts, dropout (the model stays in eval mode, or the
importance ratios would not be 1), gradient checkpointing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.losses.advantages.group import reward_metrics
from fastrl.losses.advantages.returns import gae
from fastrl.losses.kl import AdaptiveKLController, kl_estimate, kl_penalty_rewards
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.losses.value import explained_variance, value_loss
from fastrl.train.config.ppo import PPOConfig
from fastrl.train.data.rollout import Rollout
from fastrl.train.model import Policy, load_policy
from fastrl.train.pretrained import add_lora
from fastrl.train.rewards.reward_set import build_rewards, check_rewards
from fastrl.train.rewards.tasks import load_task
from fastrl.train.rollouts.evaluate import CORRECT
from fastrl.train.rollouts.sampler import Sampler, batch_metrics, reward_model_of
from fastrl.train.run.run import MetricSums, Run, RunResult
from fastrl.train.update.batches import (
    RolloutBatch,
    StepCounts,
    micro_batch_rows,
    named_loss,
    ratio_deviation,
    sampled_kl,
)
from fastrl.train.update.critic import Critic
from fastrl.train.update.reference import ReferencePolicy
from fastrl.train.update.trust_region import StepLength, trust_region_step


class Learner(NamedTuple):
    """The policy and the critic, with the policy's loss."""

    policy: Policy
    critic: Critic
    loss: PolicyLoss

    def parts(self, *, train_policy: bool) -> dict[str, list[torch.nn.Parameter]]:
        """Return the parameters whose gradients are clipped apart, by the name of their norm among the metrics."""
        critic = {"value/grad_norm": [p for p in self.critic.named_parameters().values() if p.requires_grad]}
        if not train_policy:
            return critic
        return {"grad_norm": [p for p in self.policy.model.parameters() if p.requires_grad], **critic}


@dataclass(frozen=True)
class PPOBatch(RolloutBatch):
    """A batch with the values and returns that the critic's loss reads."""

    old_values: Tensor  # (B, T)
    returns: Tensor  # (B, T)


def run_ppo(config: PPOConfig) -> RunResult:
    """Train as `config` says and return where the results are.

    Raises ValueError for settings that do not fit together, and for a model whose log-probs this loop cannot reproduce.
    """
    loss = build_loss(config)
    task = load_task(config.task, **{"seed": config.seed, **config.task_parameters})
    check_rewards(config.rewards, task)
    run = Run(config)
    policy = load_policy(config, run.device, adapters=False)
    reward_model = reward_model_of(config, policy)
    reference = None
    if config.kl_coef > 0 or (loss.kl is not None and loss.kl_to == "ref"):
        reference = ReferencePolicy(policy, adapters=config.lora_rank > 0)
    critic = Critic(policy, config.critic)  # before the adapters: a separate critic gets its own
    policy = policy.with_adapters(config)
    if config.lora_rank and critic.backbone is not None:
        critic.backbone = add_lora(
            critic.backbone, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_modules
        )
    learner = Learner(policy, critic, loss)

    controller, step_length = None, StepLength(config.trust_region_step)
    if config.kl_target is not None:
        controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        run.register("kl_controller", controller)
    if config.update == "trust_region":
        run.register("step_length", step_length)
    run.start(
        {**{f"policy.{name}": p for name, p in policy.parameters().items()}, **critic.named_parameters()},
        factors={"critic": config.critic_lr_factor, "value_head": config.value_head_lr_factor},
    )
    rewards = build_rewards({CORRECT: 0.0, **config.rewards}, task, config.reward_timeout_s)
    sampler = Sampler(run, task, policy, rewards, reward_model)

    with rewards, run:
        if run.start_step == 0:
            sampler.evaluate(0)
        for step in run.steps():
            # Rollouts and rewards
            problems = sampler.problems(step)
            rollout = sampler.rollout(problems)
            if step == run.start_step:
                policy.verify(rollout.rows(0, 4))
            run.clock.lap("rollout")
            scored = sampler.score(problems, rollout)
            run.clock.lap("reward")

            # Old log-probs, values, KL, advantages
            old, values = before_update(learner, rollout, config)
            ref = None
            if reference is not None:
                with reference.active(policy) as frozen:
                    ref = frozen.logprobs(rollout, config.micro_batch)
            kl_coef = config.kl_coef if controller is None else controller.value
            reward = terminal_rewards(learner, rollout, scored.total.to(run.device), config)
            batch = assess(config, rollout, reward, old, values, ref, kl_coef)
            run.clock.lap("logprobs")

            # Optimisation
            totals = MetricSums()
            # Every value of a new critic is 0, so it may be trained alone at first.
            train_policy = step >= config.critic_warmup_steps
            if train_policy and config.update == "trust_region":
                parts = batch.parts(config)
                start = accumulate(run, learner, parts, totals, train_critic=False).loss.item()
                trust_region_step(run, policy, loss, parts, start, step_length, totals)
                run.clock.lap("trust_region")
            fit(run, learner, batch, totals, train_policy=train_policy and config.update != "trust_region")

            # Bookkeeping
            totals.add(reward_metrics(scored.total, group_size=config.batch_size))
            totals.add({"value/explained_variance": (explained(batch), torch.ones(()))})
            if ref is not None:
                kl = kl_estimate(old, ref, config.kl_estimator, mask=rollout.completion_mask).sum()
                totals.add(
                    {
                        "kl": (kl, rollout.completion_mask.sum()),
                        "kl_per_completion": (kl, torch.tensor(float(len(old)))),
                    }
                )
            metrics = {
                **totals.means(),
                **batch_metrics(rollout, scored),
                "kl_coef": kl_coef,
                "learning_rate": run.learning_rate,
                **run.clock.times(),
            }
            metrics["tokens_per_second"] = float(rollout.completion_mask.sum()) / metrics["time/step"]
            if controller is not None:
                controller.update(metrics["kl_per_completion"], config.batch_size)
            if run.evaluation_due(step + 1):
                metrics |= sampler.evaluate(step + 1)
            run.finish_step(step, metrics)

    run.save_model(policy.model, policy.tokenizer)
    return run.result()


@torch.no_grad()
def before_update(learner: Learner, rollout: Rollout, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """Return log-probs and values (B, T) before the update, 0 where masked, in the micro-batches of the losses."""
    old, values = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs)
    for start, stop in micro_batch_rows(config):
        part = rollout.rows(start, stop)
        hidden = learner.policy.hidden(part)  # one pass for both
        logprobs = learner.policy.logprobs_from(hidden, part)
        old[start:stop, : logprobs.shape[1]] = logprobs
        value = learner.critic.values(part, hidden).masked_fill(~part.completion_mask, 0.0)
        values[start:stop, : value.shape[1]] = value
    return old, values


@torch.no_grad()
def terminal_rewards(learner: Learner, rollout: Rollout, rewards: Tensor, config: PPOConfig) -> Tensor:
    """Return the pay (B,) of the last token of each completion: the reward, or its replacement after a cut."""
    if config.truncated_reward is not None:
        return rewards.masked_fill(rollout.truncated, config.truncated_reward)
    if not config.bootstrap_truncated:
        return rewards
    # One position more: the state after the last token of a completion that was cut off.
    longer = dataclasses.replace(
        rollout,
        completion_ids=torch.nn.functional.pad(rollout.completion_ids, (0, 1)),
        completion_mask=torch.cat([rollout.completion_mask, rollout.truncated[:, None]], dim=1),
        logprobs=torch.nn.functional.pad(rollout.logprobs, (0, 1)),
    )
    rewards = rewards.clone()
    for start, stop in micro_batch_rows(config):
        part = longer.rows(start, stop)
        if not bool(part.truncated.any()):
            continue
        value = learner.critic.values(part, learner.policy.hidden(part))[:, -1]
        rewards[start:stop] = torch.where(part.truncated, config.gamma * value, rewards[start:stop])
    return rewards


def assess(
    config: PPOConfig,
    rollout: Rollout,
    rewards: Tensor,  # (B,) paid to the last token, NaN where unknown
    old_logprobs: Tensor,  # (B, T)
    old_values: Tensor,  # (B, T)
    ref_logprobs: Tensor | None,  # (B, T)
    kl_coef: float,
) -> PPOBatch:
    """Return the batch with the advantages and returns of its token rewards. Unknown rewards are masked."""
    known = ~rewards.isnan()  # a grader that crashed must not pass for a reward of 0
    mask = rollout.completion_mask & known[:, None]
    if config.mask_truncated:
        mask = mask & ~rollout.truncated[:, None]
    last = rollout.completion_mask.sum(dim=1, keepdim=True) - 1
    token_rewards = torch.zeros_like(old_values).scatter(1, last, rewards.masked_fill(~known, 0.0)[:, None])
    if ref_logprobs is not None:
        token_rewards = kl_penalty_rewards(
            token_rewards, old_logprobs, ref_logprobs, mask, coef=kl_coef, estimator=config.kl_estimator
        )
    advantages, returns = gae(
        token_rewards, old_values, mask, gamma=config.gamma, lam=config.lam, whiten=config.whiten_advantages
    )
    return PPOBatch(rollout, advantages, mask, old_logprobs, ref_logprobs, old_values, returns)


def fit(run: Run[PPOConfig], learner: Learner, batch: PPOBatch, totals: MetricSums, *, train_policy: bool) -> None:
    """Take the optimiser steps of a batch, on the critic alone unless `train_policy`. Stop early at `target_kl`."""
    config, one = run.config, torch.ones((), device=run.device)
    stopped, steps = False, 0
    for _ in range(config.epochs_per_batch):
        for minibatch in batch.minibatches(config, run.generator):
            done = accumulate(run, learner, minibatch, totals, train_policy=train_policy)
            run.clock.lap("backward")
            if steps == 0 and train_policy:  # the policy has not moved yet: every ratio should be 1
                totals.add({"first_step_ratio_max_dev": (done.ratio_deviation, one)})
            stopped = train_policy and config.target_kl is not None and done.kl.item() > config.target_kl
            if stopped:
                run.zero_grad()  # the gradient of the step that is not taken
                break
            totals.add(run.clip_and_step(learner.parts(train_policy=train_policy)))
            run.clock.lap("optimizer")
            steps += 1
        if stopped:
            break
    totals.add({"early_stop": (one * stopped, one), "optimizer_steps": (one * steps, one)})


class Accumulated(NamedTuple):
    """Scalars of an accumulated gradient, on the device. They are 0 if the policy is not trained."""

    loss: Tensor
    """The policy loss."""
    ratio_deviation: Tensor
    """max |ratio - 1|"""
    kl: Tensor
    """Mean KL(old || new), nats per token."""


def accumulate(
    run: Run[PPOConfig],
    learner: Learner,
    minibatch: Sequence[PPOBatch],
    totals: MetricSums,
    *,
    train_policy: bool = True,
    train_critic: bool = True,
) -> Accumulated:
    """Accumulate the gradients of the policy loss and the value loss of one optimiser step in the parameters.

    Both are divided by the counts of the whole minibatch, so the split into micro-batches changes nothing.
    """
    config, policy, critic = run.config, learner.policy, learner.critic
    counts = StepCounts.of(minibatch)
    zero, one = torch.zeros((), device=counts.tokens.device), torch.ones((), device=counts.tokens.device)
    policy_value = critic_value = deviation = kl = zero
    for part in minibatch:
        # A critic that is trained alone needs no graph of the policy.
        with torch.set_grad_enabled(train_policy):
            hidden = policy.hidden(part.rollout)  # (B, T, D)
        total = zero
        if train_critic:
            critic_output = value_loss(
                critic.values(part.rollout, hidden), part.old_values, part.returns, part.mask, clip=config.value_clip,
                coefficient=config.value_coef, n_tokens=counts.tokens,
            )  # fmt: skip
            total = total + critic_output.loss
            critic_value = critic_value + critic_output.loss.detach()
            shown = {"clip_fraction", "values", "returns"} & critic_output.metrics.keys()
            totals.add({f"value/{name}": critic_output.metrics[name] for name in sorted(shown)})
        if train_policy:
            output = learner.loss.from_hidden(
                hidden, policy.weight, part.labels, **part.inputs(counts), **policy.options
            )
            total = total + output.loss
            policy_value = policy_value + output.loss.detach()
            totals.add(output.metrics)
            deviation = torch.maximum(deviation, ratio_deviation(output, part))
            kl = kl + sampled_kl(output, part)
        run.backward(total)
    if train_critic:
        totals.add({"value/loss": (critic_value, one)})
    if train_policy:
        totals.add({"loss": (policy_value, one)})
    return Accumulated(policy_value, deviation, kl / counts.tokens)


def explained(batch: PPOBatch) -> Tensor:
    """Return the share of the variance of the returns that the values before the update explain. 1 is best."""
    return explained_variance(value_loss(batch.old_values, None, batch.returns, batch.mask, clip=None).metrics)


def build_loss(config: PPOConfig) -> PolicyLoss:
    """Return the policy loss of `config.update`.

    Raises:
        ValueError: `loss_options` repeats a field that the update or a setting gives.
    """
    fields: dict[str, Any] = {"entropy_coef": config.entropy_coef}
    if config.update == "clip":
        fields |= {"clip_low": config.clip_low, "clip_high": config.clip_high}
    elif config.update == "trust_region":
        fields |= {"surrogate": "importance", "clip_low": None, "clip_high": None}
    if given := sorted(fields.keys() & config.loss_options.keys()):
        raise ValueError(f"loss_options repeats {', '.join(given)}, which update={config.update!r} or a setting gives")
    name = "reinforce" if config.update == "gradient" else "ppo"
    return named_loss(name, {**fields, **config.loss_options}, config)
