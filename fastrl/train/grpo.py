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

import contextlib
import copy
import importlib.metadata
import json
import logging
import math
import os
import platform
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastrl
from fastrl.losses.advantage import group_advantages, reward_metrics
from fastrl.losses.policy import PolicyLoss
from fastrl.train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    optimizer_from_tensors,
    optimizer_to_tensors,
    random_state,
    save_checkpoint,
    set_random_state,
    write_json,
)
from fastrl.train.config import GRPOConfig
from fastrl.train.evaluate import CORRECT, Evaluation, evaluate
from fastrl.train.model import Head, add_lora, head_of, load_model, stop_token_ids
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
from fastrl.train.tasks import Problem, Task, load_task
from fastrl.train.tracking import RunTracker

logger = logging.getLogger(__name__)

RUN_FILES = ("metrics.jsonl", "evaluations.json", "samples.json", "checkpoints", "model")
PACKAGES = ("fastrl", "torch", "triton", "transformers", "accelerate", "peft", "safetensors", "reasoning-gym", "numpy")


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind."""

    run_dir: Path
    steps: int
    evaluations: list[dict[str, Any]]
    """Records of `evaluations.json`, in the order in which they were made."""
    metrics: dict[str, float]
    """Metrics of the last step."""


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
    problems = task.held_out(config.eval_problems) if config.eval_problems else []
    run_dir = open_run_dir(config)
    accelerator = _accelerator(config)
    device = accelerator.device
    seed_everything(config.seed)
    generator = torch.Generator(device=device).manual_seed(config.seed)

    model, tokenizer = load_model(config.model, dtype=config.dtype, device=device)
    stop_ids = stop_token_ids(model, tokenizer)
    reference = _reference_model(model, config, loss_function)
    if config.lora_rank:
        targets = tuple(config.lora_targets.split(",")) if "," in config.lora_targets else config.lora_targets
        model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, targets=targets)
    head = head_of(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trainable.values(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    optimizer = accelerator.prepare(optimizer)

    checkpoints = run_dir / "checkpoints"
    start_step = 0
    if config.resume and (newest := latest_checkpoint(checkpoints)) is not None:
        start_step = _restore(newest, config, trainable, optimizer, generator)
    log = RunLog(run_dir, start_step)
    write_json(run_dir / "config.json", config.as_dict())
    write_json(run_dir / "environment.json", environment(device))

    rewards = build_rewards({CORRECT: 0.0, **config.rewards}, task)
    sampling = {"stop_ids": stop_ids, "temperature": config.temperature, "max_new_tokens": config.max_new_tokens}
    prompting = {"prompt_template": config.prompt_template, "system_prompt": config.system_prompt}

    def evaluate_now(step: int) -> dict[str, float]:
        found = {}
        for mode in config.eval_modes if problems else ():
            result = evaluate(
                model, tokenizer, problems, rewards, step=step, mode=mode, batch_size=config.eval_batch_size,
                seed=config.seed, **sampling, **prompting,
            )  # fmt: skip
            log.add(result, problems, task, config.eval_samples)
            found[f"eval/{mode}_accuracy"] = result.accuracy
        return found

    metrics: dict[str, float] = {}
    tracker = RunTracker(run_dir, config.steps, tensorboard=config.tensorboard, trackio=config.trackio)
    with rewards, tracker, accelerator.autocast():
        if config.resume:
            tracker.resume(start_step)
        if start_step == 0:
            evaluate_now(0)
        for step in range(start_step, config.steps):
            clock = Clock(device)

            # Rollouts
            problem_batch = task.train(config.prompts_per_step, start=step * config.prompts_per_step)
            prompts = [problem.prompt for problem in problem_batch]
            encoded = encode_prompts(tokenizer, prompts, template=config.prompt_template, system=config.system_prompt)
            rollout = generate(
                model,
                encoded,
                group_size=config.group_size,
                pad_id=tokenizer.pad_token_id,
                generator=generator,
                **sampling,
            )
            if step == start_step:
                few = rollout.rows(0, min(4, config.batch_size))
                difference = verify_logprobs(model, head, few, config.temperature)
                logger.info("log-probs equal those of the model's own logits within %.2g nats", difference)
            clock.lap("rollout")

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
            ).to(device)
            clock.lap("reward")

            # Old and reference log-probs. With one optimiser step per batch the policy in the loss is the one that
            # sampled, so old log-probs are only computed once, to measure that the first ratio is 1.
            mask = rollout.completion_mask
            if config.mask_truncated:
                mask = mask & ~rollout.truncated[:, None]
            needs_old = config.epochs_per_batch * config.minibatches > 1 or step == start_step
            old = _in_micro_batches(model, head, rollout, config) if needs_old else None
            ref = None
            if reference is not None:
                with reference.active(model) as reference_model:
                    ref = _in_micro_batches(reference_model, reference.head(head), rollout, config)
            batch = Batch(rollout, advantages, mask, old, ref)
            clock.lap("logprobs")

            # Optimisation
            learning_rate = config.learning_rate_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            totals = MetricSums()
            first_step = True
            for _ in range(config.epochs_per_batch):
                for rows in minibatches(config, generator):
                    deviation = backward(model, head, loss_function, batch, rows, config, accelerator, totals)
                    clock.lap("backward")
                    if first_step and batch.old_logprobs is not None:
                        totals.add({"first_step_ratio_max_dev": (deviation, torch.ones_like(deviation))})
                    first_step = False
                    norm = accelerator.clip_grad_norm_(list(trainable.values()), config.max_grad_norm)
                    # A gradient that is not finite would leave nothing of the model: the step is left out, and counted.
                    finite = bool(torch.isfinite(norm))
                    if finite:
                        optimizer.step()
                    optimizer.zero_grad()
                    one = torch.ones((), device=device)
                    totals.add({"grad_norm": (norm, one), "skipped_updates": (one * (not finite), one)})
                    clock.lap("optimizer")

            # Bookkeeping
            totals.add(reward_metrics(scored.total, group_size=config.group_size))
            metrics = {
                **totals.means(),
                **{f"reward/{name}": float(values.nanmean()) for name, values in scored.components.items()},
                "reward_failures": float(scored.failures),
                "learning_rate": learning_rate,
                "completion_length": float(lengths.float().mean()),
                "completion_length_max": float(lengths.max()),
                "truncated_fraction": float(rollout.truncated.float().mean()),
                **clock.times(),
            }
            metrics["tokens_per_second"] = float(lengths.sum()) / metrics["time/step"]
            done = step + 1
            if done == config.steps or (config.eval_every and done % config.eval_every == 0):
                metrics |= evaluate_now(done)
            tracker.log(done, metrics)
            if config.checkpoint_every and (done % config.checkpoint_every == 0 or done == config.steps):
                _save(checkpoints, done, config, trainable, optimizer, generator)

    if config.save_model:
        model.save_pretrained(run_dir / "model")
        tokenizer.save_pretrained(run_dir / "model")
    return RunResult(run_dir, config.steps, log.evaluations, metrics)


def backward(
    model: Any,
    head: Head,
    loss_function: PolicyLoss,
    batch: Batch,
    rows: list[tuple[int, int]],
    config: GRPOConfig,
    accelerator: Any,
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
            temperature=config.temperature,
            advantages=batch.advantages[start:stop],
            mask=mask,
            rollout_logprobs=part.logprobs,
            n_tokens=n_tokens,
            n_sequences=n_sequences,
            **inputs,
            **head.kwargs(),
        )
        accelerator.backward(output.loss)
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


def open_run_dir(config: GRPOConfig) -> Path:
    """Return the folder of the run, made or emptied as `config` says; raise where an earlier run is in it."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    earlier = [run_dir / name for name in RUN_FILES if (run_dir / name).exists()]
    if earlier and not (config.resume or config.overwrite):
        raise ValueError(f"run_dir {str(run_dir)!r} holds an earlier run; resume it, overwrite it, or choose another")
    if config.overwrite:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run_dir


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


class MetricSums:
    """Sums and counts of metrics, added over micro-batches and divided once."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add (sum, count) by name; the tensors stay where they are."""
        for name, (total, count) in metrics.items():
            before = self._sums.get(name)
            self._sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)

    def means(self) -> dict[str, float]:
        """Return the quotients, NaN where nothing was counted; waits for the device."""
        return {
            name: float(total) / float(count) if float(count) else math.nan
            for name, (total, count) in self._sums.items()
        }


class Clock:
    """Wall time of the parts of a step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: dict[str, float] = {}
        self._start = self._last = self._now()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        now = self._now()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        """Return seconds per part and of the whole step."""
        return {
            **{f"time/{name}": seconds for name, seconds in self._laps.items()},
            "time/step": self._last - self._start,
        }

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class RunLog:
    """`evaluations.json` and `samples.json` of a run; on resuming, what came after the checkpoint is dropped."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._dir = run_dir
        self.evaluations = self._read("evaluations.json", start_step)
        self._samples = self._read("samples.json", start_step)

    def _read(self, name: str, start_step: int) -> list[dict[str, Any]]:
        path = self._dir / name
        if start_step == 0 or not path.is_file():
            return []
        return [record for record in json.loads(path.read_text()) if record["step"] <= start_step]

    def add(self, result: Evaluation, problems: list[Problem], task: Task, samples: int) -> None:
        """Append an evaluation and its first completions, and write both files."""
        self.evaluations.append(result.record())
        for problem, completion in list(zip(problems, result.completions, strict=True))[:samples]:
            self._samples.append(
                {
                    "step": result.step,
                    "mode": result.mode,
                    "prompt": problem.prompt,
                    "completion": completion,
                    "answer": problem.answer,
                    "reward": float(task.is_correct(problem, completion)),
                }
            )
        write_json(self._dir / "evaluations.json", self.evaluations)
        write_json(self._dir / "samples.json", self._samples)


class Reference:
    """The policy that the KL is measured to: a frozen copy, or the model with its adapters switched off."""

    def __init__(self, copied: Any | None) -> None:
        self._copied = copied

    @contextlib.contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """Yield the reference model."""
        if self._copied is not None:
            yield self._copied
            return
        with model.disable_adapter():
            yield model

    def head(self, policy_head: Head) -> Head:
        """Return the reference model's head."""
        return policy_head if self._copied is None else head_of(self._copied)


def _reference_model(model: Any, config: GRPOConfig, loss: PolicyLoss) -> Reference | None:
    if loss.kl is None or loss.kl_to != "ref":
        return None
    return Reference(None if config.lora_rank else copy.deepcopy(model).requires_grad_(False))


def _in_micro_batches(model: Any, head: Head, rollout: Rollout, config: GRPOConfig) -> Tensor:
    """Return log-probs (B, T), computed in the micro-batches of the loss, so that equal weights give equal bits."""
    result = torch.zeros_like(rollout.logprobs)
    for start in range(0, config.batch_size, config.micro_batch):
        part = rollout.rows(start, start + config.micro_batch)
        logprobs = token_logprobs_of(model, head, part, config.temperature).logprobs
        result[start : start + config.micro_batch, : logprobs.shape[1]] = logprobs
    return result


def _accelerator(config: GRPOConfig) -> Any:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"this loop runs in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}")
    from accelerate import Accelerator

    return Accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions and the machine, as JSON values."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "packages": versions,
        "backends": fastrl.explain(device),
    }


def _save(
    root: Path,
    step: int,
    config: GRPOConfig,
    trainable: Mapping[str, Tensor],
    optimizer: Any,
    generator: torch.Generator,
) -> None:
    optimizer_tensors, groups = optimizer_to_tensors(optimizer)
    random_tensors, random_values = random_state(generator)
    save_checkpoint(
        root,
        step,
        {"weights": trainable, "optimizer": optimizer_tensors, "random": random_tensors},
        {"config": config.as_dict(), "optimizer_groups": groups, "random": random_values},
        keep=config.keep_checkpoints,
    )


def _restore(
    path: Path, config: GRPOConfig, trainable: Mapping[str, Tensor], optimizer: Any, generator: torch.Generator
) -> int:
    """Load the checkpoint in `path` into the policy, the optimiser and the generators; return its step."""
    saved = load_checkpoint(path)
    config.check_resumable(saved.state["config"])
    weights = saved.tensors["weights"]
    if weights.keys() != trainable.keys():
        different = sorted(weights.keys() ^ trainable.keys())
        raise ValueError(f"the checkpoint {path} holds other parameters than the model trains: {different[:4]}")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(weights[name])
    optimizer_from_tensors(optimizer, saved.tensors["optimizer"], saved.state["optimizer_groups"])
    set_random_state(generator, saved.tensors["random"], saved.state["random"])
    return int(saved.state["step"])
