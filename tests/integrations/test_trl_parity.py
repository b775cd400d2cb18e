"""The GRPO loop and TRL's GRPOTrainer on the same completions: the same losses, norms, KL and weights, step by step.

TRL gets the completions that this loop sampled through its `rollout_func`, in the same order, and everything else is
its own: rewards through its reward functions, advantages, old and reference log-probs, loss, clipping, AdamW and the
learning rate. So one wrong log-prob of either shows at once, and a wrong update in the next step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import digit_share, save_tiny_model, tiny_tokenizer
from torch import Tensor

pytest.importorskip("trl")

import trl
import trl_runs
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.grpo import run_grpo
from fastrl.train.rollouts import sampler

pytestmark = trl_runs.QUIET

STEPS = 3
GROUP = 4
PROMPTS = 3
LENGTH = 7
EPSILON = 0.05  # small enough that the second step on a batch is clipped


@dataclass
class Recorded:
    """The samples of one run, and the measurements of both."""

    prompts: list[str] = field(default_factory=list)  # of all steps, in order
    prompt_ids: list[list[int]] = field(default_factory=list)  # of all completions, in order
    completion_ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def ours(folder: Path, run_dir: Path, **changes: Any) -> tuple[list[dict[str, float]], dict[str, Tensor], Recorded]:
    """Train with this loop, and return the metrics of each batch, the weights, and the samples."""
    recorded = Recorded()
    sample = sampler.Sampler.rollout

    def recording(self: Any, problems: Any) -> Any:
        rollout = sample(self, problems)
        recorded.prompts += [problem.prompt for problem in problems]
        for row, prompt in enumerate(rollout.prompt_index.tolist()):
            mask = rollout.completion_mask[row]
            recorded.prompt_ids.append(rollout.prompt_ids[prompt][rollout.prompt_mask[prompt]].tolist())
            recorded.completion_ids.append(rollout.completion_ids[row][mask].tolist())
            recorded.logprobs.append(rollout.logprobs[row][mask].tolist())
        return rollout

    values: dict[str, Any] = {
        "model": str(folder), "run_dir": str(run_dir), "device": "cpu", "prompt_template": "{prompt}",
        "task_parameters": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
        "rewards": {"tiny_model:digit_share": 1.0}, "steps": STEPS, "prompts_per_step": PROMPTS, "group_size": GROUP,
        "max_new_tokens": LENGTH, "temperature": 0.9, "learning_rate": 5e-3, "lr_schedule": "linear",
        "max_grad_norm": 0.1, "adam_beta2": 0.999, "eval_problems": 0, "reward_timeout_s": None,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.Sampler, "rollout", recording)
        run_grpo(GRPOConfig(**{**values, **changes}))
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return metrics, load_file(run_dir / "model" / "model.safetensors"), recorded


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [digit_share(None, completion) for completion in completions]


def trls(folder: Path, output: Path, recorded: Recorded, **changes: Any) -> tuple[list[dict[str, float]], Any]:
    """Train with TRL on the recorded completions, and return its logs of each optimiser step and the model."""
    batch = PROMPTS * GROUP
    starts: Iterator[int] = iter(range(0, len(recorded.prompt_ids), batch))

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        del trainer
        start = next(starts)
        asked = [recorded.prompts[i // GROUP] for i in range(start, start + batch)]
        assert prompts == asked, f"TRL asks for {prompts}, recorded are {asked}"
        rows = slice(start, start + batch)
        return {name: getattr(recorded, name)[rows] for name in ("prompt_ids", "completion_ids", "logprobs")}

    values: dict[str, Any] = {
        "output_dir": str(output), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "max_steps": STEPS, "per_device_train_batch_size": batch, "num_generations": GROUP, "temperature": 0.9,
        "max_completion_length": LENGTH, "learning_rate": 5e-3, "lr_scheduler_type": "linear", "optim": "adamw_torch",
        "adam_beta2": 0.999, "max_grad_norm": 0.1, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "shuffle_dataset": False, "dataloader_pin_memory": False,
    }  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=trl.GRPOConfig(**{**values, **changes}),
        train_dataset=Dataset.from_dict({"prompt": recorded.prompts}),
        processing_class=tiny_tokenizer(),
        reward_funcs=reward,
        rollout_func=rollout,
    )
    trainer.train()
    assert next(starts, None) is None, "TRL did not use all that was recorded"
    return [line for line in trainer.state.log_history if "loss" in line], trainer.model


TWICE: tuple[dict[str, Any], dict[str, Any]] = (
    {"epochs_per_batch": 2, "lr_schedule": "constant", "clip_low": EPSILON, "clip_high": EPSILON},
    {"num_iterations": 2, "max_steps": 2 * STEPS, "lr_scheduler_type": "constant", "epsilon": EPSILON},
)
# Micro-batches: neither side's gradient may depend on the split.
PARTS: tuple[dict[str, Any], dict[str, Any]] = (
    {"micro_batch_size": 6},
    {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
)
UNSCALED: tuple[dict[str, Any], dict[str, Any]] = (
    {**TWICE[0], "advantage_scale": "none"},
    {**TWICE[1], "scale_rewards": "none"},
)
# Relative to 0.01 at least. The sides sum a few hundred float32 terms in different orders, and every update carries
# these roundings on. 1e-4 is some 800 roundings, and a hundredth of the effect of a wrong factor anywhere.
RELATIVE = 1e-4
# Relative to the norm of a weight's change. AdamW divides by the gradient's own size, so an entry with a gradient of
# pure rounding moves by a whole step in either direction. 1e-3 is one such entry in a million.
WEIGHTS = 1e-3


@pytest.mark.parametrize(
    ("loss", "beta", "changes"),
    [
        ("grpo", 0.2, TWICE),
        ("grpo", 0.0, PARTS),
        ("dr_grpo", 0.2, UNSCALED),
        ("dapo", 0.2, PARTS),
        ("bnpo", 0.2, TWICE),
    ],
)
def test_same_steps(
    folder: Path, tmp_path: Path, loss: str, beta: float, changes: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    kl = {"kl": "k3", "kl_coef": beta} if beta else {"kl_coef": 0.0}
    options = {"style": "trl", **({"kl_gradient": "ratio_weighted"} if beta else {})}
    metrics, weights, recorded = ours(folder, tmp_path / "ours", loss=loss, loss_options=options, **kl, **changes[0])
    logs, model = trls(folder, tmp_path / "trl", recorded, loss_type=loss, beta=beta, **changes[1])

    names = {
        "loss": "loss",
        "grad_norm": "grad_norm",
        "reward": "reward",
        "frac_reward_zero_std": "frac_reward_zero_std",
    }
    if changes is not PARTS:  # over micro-batches of different lengths TRL's metrics are means of means
        names |= {"entropy": "entropy", "clip_fraction": "clip_ratio/region_mean"} | ({"kl": "kl"} if beta else {})
    updates = len(logs) // STEPS
    for step, line in enumerate(metrics):
        theirs = logs[step * updates : (step + 1) * updates]
        for mine, name in names.items():
            logged = [float(log[name]) for log in theirs if name in log]  # TRL logs rewards once a batch
            value = sum(logged) / len(logged)
            assert abs(line[mine] - value) <= RELATIVE * max(abs(value), 0.01), f"{mine} of step {step}: {value}"
    if changes is not PARTS:
        assert sum(line["clip_fraction"] for line in metrics) > 0.3, "the clip was hardly tested"

    before, after = load_file(folder / "model.safetensors"), dict(model.named_parameters())
    for name, weight in weights.items():
        change = (after[name].detach() - before[name]).norm()
        assert change > 0.01, f"{name} has hardly changed"
        assert (weight - after[name].detach()).norm() <= WEIGHTS * change, name
