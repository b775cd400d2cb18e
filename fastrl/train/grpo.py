"""GRPO in one file: sample groups of completions, score them, compare within each group, take a step.

    for each step
        prompts -> completions        sampled from the policy itself, the whole distribution, at the loss's temperature
        completions -> rewards        a reward that failed is NaN: counted, and its completion has advantage 0
        rewards -> advantages         (R - mean of the group) / std of the group, or as configured
        old, reference log-probs      by the same code, in the same micro-batches, as in the loss: the ratio is 1
        epochs x minibatches          PolicyLoss.from_hidden, no logits of the whole batch; one optimiser step each

The denominator of the loss is counted over the whole optimiser step and given to every micro-batch, so that the split
into micro-batches changes the memory and nothing else. The composition of the micro-batches is fixed for a batch;
epochs differ in their order only.

Left out: more than one process (use the trainers of `fastrl.integrations` there), an inference engine for the
rollouts, dropout (the model stays in eval mode, or the importance ratios would not be 1), gradient checkpointing,
and losses that need more than this loop has at hand (they are refused by name).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.losses.advantage import group_advantages, reward_metrics
from fastrl.losses.policy import PolicyLoss
from fastrl.train.config import GRPOConfig
from fastrl.train.evaluate import CORRECT, HeldOut
from fastrl.train.model import Head, add_lora, head_of, load_model, stop_token_ids
from fastrl.train.reference_policy import ReferencePolicy
from fastrl.train.rewards import build_rewards
from fastrl.train.rollout import (
    Rollout,
    completion_hidden,
    decode,
    encode_prompts,
    generate,
    token_logprobs_of,
    verify_logprobs,
)
from fastrl.train.run import MetricSums, Run, RunResult
from fastrl.train.tasks import load_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A batch of rollouts with everything that the loss needs beside the policy."""

    rollout: Rollout
    advantages: Tensor  # (B,)
    mask: Tensor  # (B, T) tokens in the loss
    old_logprobs: Tensor | None  # (B, T), None where the policy still is the one that sampled
    ref_logprobs: Tensor | None  # (B, T)


def run_grpo(config: GRPOConfig) -> RunResult:
    """Train as `config` says and return where the results are.

    Raises ValueError for settings that do not fit together, and for a model whose log-probs this loop cannot reproduce.
    """
    loss_function = build_loss(config)
    task = load_task(config.task, **{"seed": config.seed, **config.task_parameters})
    task.held_out(config.eval_problems)  # too many of them are refused before the model is loaded
    run = Run(config)
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=run.device)
    stop_ids = stop_token_ids(model, tokenizer)
    reference = None
    if loss_function.kl is not None and loss_function.kl_to == "ref":
        reference = ReferencePolicy(model, adapters=config.lora_rank > 0)
    if config.lora_rank:
        model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_modules)
    head = head_of(model)
    run.optimize(dict(model.named_parameters()))

    rewards = build_rewards({CORRECT: 0.0, **config.rewards}, task)
    sampling = {"stop_ids": stop_ids, "temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    held_out = HeldOut(run, task, rewards, stop_ids)

    with rewards, run:
        if run.start_step == 0:
            held_out.evaluate(model, tokenizer, 0)
        for step in run.steps():
            # Rollouts
            problem_batch = task.train(config.prompts_per_step, start=step * config.prompts_per_step)
            prompts = [problem.prompt for problem in problem_batch]
            encoded = encode_prompts(tokenizer, prompts, template=config.prompt_template, system=config.system_prompt)
            rollout = generate(
                model,
                encoded,
                group_size=config.group_size,
                pad_id=tokenizer.pad_token_id,
                generator=run.generator,
                **sampling,
            )
            if step == run.start_step:
                few = rollout.rows(0, min(4, config.batch_size))
                difference = verify_logprobs(model, head, few, config.temperature)
                logger.info("log-probs equal those of the model's own logits within %.2g nats", difference)
            run.clock.lap("rollout")

            # Rewards and advantages
            lengths = rollout.completion_mask.sum(dim=1)
            scored = rewards(
                [problem for problem in problem_batch for _ in range(config.group_size)],
                decode(tokenizer, rollout),
                lengths.tolist(),
            )
            advantages = group_advantages(
                scored.total,
                group_size=config.group_size,
                scale=config.advantage_scale,
                baseline=config.advantage_baseline,
                lengths=lengths.cpu() if config.advantage_baseline == "length_weighted" else None,
            ).to(run.device)
            run.clock.lap("reward")

            # Old and reference log-probs. With one optimiser step per batch the policy in the loss is the one that
            # sampled, so old log-probs are only computed once, to measure that the first ratio is 1.
            mask = rollout.completion_mask
            if config.mask_truncated:
                mask = mask & ~rollout.truncated[:, None]
            needs_old = config.epochs_per_batch * config.minibatches > 1 or step == run.start_step
            old = _in_micro_batches(model, head, rollout, config) if needs_old else None
            ref = None
            if reference is not None:
                with reference.active(model) as reference_model:
                    ref = _in_micro_batches(reference_model, reference.head(head), rollout, config)
            batch = Batch(rollout, advantages, mask, old, ref)
            run.clock.lap("logprobs")

            # Optimisation
            totals = MetricSums()
            first_step = True
            for _ in range(config.epochs_per_batch):
                for rows in minibatches(config, run.generator):
                    deviation = backward(run, model, head, loss_function, batch, rows, totals)
                    run.clock.lap("backward")
                    if first_step and batch.old_logprobs is not None:
                        totals.add({"first_step_ratio_max_dev": (deviation, torch.ones_like(deviation))})
                    first_step = False
                    totals.add(run.clip_and_step())
                    run.clock.lap("optimizer")

            # Bookkeeping
            totals.add(reward_metrics(scored.total, group_size=config.group_size))
            metrics = {
                **totals.means(),
                **{f"reward/{name}": float(values.nanmean()) for name, values in scored.components.items()},
                "reward_failures": float(scored.failures),
                "learning_rate": run.learning_rate,
                "completion_length": float(lengths.float().mean()),
                "completion_length_max": float(lengths.max()),
                "truncated_fraction": float(rollout.truncated.float().mean()),
                **run.clock.times(),
            }
            metrics["tokens_per_second"] = float(lengths.sum()) / metrics["time/step"]
            if run.evaluation_due(step + 1):
                metrics |= held_out.evaluate(model, tokenizer, step + 1)
            run.finish_step(step, metrics)

    run.save_model(model, tokenizer)
    return run.result()


def backward(
    run: Run[GRPOConfig],
    model: Any,
    head: Head,
    loss_function: PolicyLoss,
    batch: Batch,
    rows: list[tuple[int, int]],
    totals: MetricSums,
) -> Tensor:
    """Accumulate the gradient of one optimiser step over the micro-batches `rows`; return max |ratio - 1|.

    Each micro-batch is divided by the token and sequence counts of all of them, so their gradients simply add up.
    """
    live = torch.cat([batch.mask[start:stop].sum(dim=1) for start, stop in rows])
    n_tokens, n_sequences = live.sum().clamp_min(1), (live > 0).sum().clamp_min(1)
    deviation = torch.zeros((), device=live.device)
    for start, stop in rows:
        part = batch.rollout.rows(start, stop)
        width = part.completion_ids.shape[1]

        def cut(values: Tensor | None, here: slice = slice(start, stop), width: int = width) -> Tensor | None:
            return None if values is None else values[here, :width]

        inputs: dict[str, Any] = {"old_logprobs": cut(batch.old_logprobs), "ref_logprobs": cut(batch.ref_logprobs)}
        if loss_function.aggregate == "prompt_mean":
            inputs["group_ids"] = part.prompt_index
        mask = cut(batch.mask)
        output = loss_function.from_hidden(
            completion_hidden(model, part),
            head.weight,
            part.completion_ids,
            temperature=run.config.temperature,
            advantages=batch.advantages[start:stop],
            mask=mask,
            rollout_logprobs=part.logprobs,
            n_tokens=n_tokens,
            n_sequences=n_sequences,
            **inputs,
            **head.kwargs(),
        )
        run.backward(output.loss)
        totals.add(output.metrics)
        totals.add({"loss": (output.loss.detach(), torch.zeros((), device=live.device))})
        if inputs["old_logprobs"] is not None:
            ratio = torch.exp(output.logprobs - inputs["old_logprobs"])
            live_deviation = torch.where(batch.mask[start:stop, :width], (ratio - 1.0).abs(), 0.0)
            deviation = torch.maximum(deviation, live_deviation.max())
    totals.add({"loss": (torch.zeros((), device=live.device), torch.ones((), device=live.device))})
    return deviation


def minibatches(config: GRPOConfig, generator: torch.Generator) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each optimiser step of a pass, the (start, stop) rows of its micro-batches, in random order."""
    size = config.micro_batch
    starts = torch.arange(0, config.batch_size, size)
    if config.minibatches > 1:
        starts = starts[torch.randperm(len(starts), generator=generator, device=generator.device).cpu()]
    for chunk in starts.chunk(config.minibatches):
        yield [(start, start + size) for start in sorted(chunk.tolist())]


def build_loss(config: GRPOConfig) -> PolicyLoss:
    """Return the loss that `config` names, with its overrides; raise ValueError for one that this loop cannot feed."""
    fields: dict[str, Any] = dict(config.loss_options)
    for name in ("clip_low", "clip_high", "kl", "kl_coef", "entropy_coef"):
        if (value := getattr(config, name)) is not None:
            if name in fields:
                raise ValueError(f"{name} is given twice: {value!r} and {fields[name]!r} in loss_options")
            fields[name] = value
    if fields.get("kl_coef") == 0.0:
        fields.setdefault("kl", None)
    loss = PolicyLoss.preset(config.loss, **fields)
    if loss.aggregate == "constant" and loss.constant is None:
        loss = PolicyLoss.preset(config.loss, **fields, constant=float(config.max_new_tokens))
    if loss.surrogate in ("nll", "dft"):
        raise ValueError(f"loss {config.loss!r} does not look at the rewards; it is for supervised data")
    if config.loss == "clip_cov":
        raise ValueError("loss 'clip_cov' selects tokens by the covariance over a batch, which this loop does not do")
    per_batch = loss.aggregate == "prompt_mean" or loss.kl_fraction is not None
    if per_batch and config.micro_batch != config.batch_size // config.minibatches:
        raise ValueError(
            f"loss {config.loss!r} is computed over a whole minibatch; expected micro_batch_size=None, "
            f"got {config.micro_batch_size}"
        )
    return loss


def _in_micro_batches(model: Any, head: Head, rollout: Rollout, config: GRPOConfig) -> Tensor:
    """Return log-probs (B, T), computed in the micro-batches of the loss, so that equal weights give equal bits."""
    result = torch.zeros_like(rollout.logprobs)
    for start in range(0, config.batch_size, config.micro_batch):
        part = rollout.rows(start, start + config.micro_batch)
        logprobs = token_logprobs_of(model, head, part, config.temperature).logprobs
        result[start : start + config.micro_batch, : logprobs.shape[1]] = logprobs
    return result
