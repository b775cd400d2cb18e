"""TRL's trainers on a tiny random model, run twice with the same seeds: alone, and with fastrl."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from tiny_model import save_tiny_model, tiny_tokenizer
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from fastrl.integrations import trl as fast

# TRL and its libraries warn about these tiny runs.
QUIET = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")
]
CONFIGS = {
    "sft": trl.SFTConfig,
    "dpo": trl.DPOConfig,
    "kto": trl.KTOConfig,
    "grpo": trl.GRPOConfig,
    "rloo": trl.RLOOConfig,
}
TRAINERS = {
    "sft": trl.SFTTrainer,
    "dpo": trl.DPOTrainer,
    "kto": trl.KTOTrainer,
    "grpo": trl.GRPOTrainer,
    "rloo": trl.RLOOTrainer,
}
FAST = {
    "sft": fast.FastSFTTrainer,
    "dpo": fast.FastDPOTrainer,
    "kto": fast.FastKTOTrainer,
    "grpo": fast.FastGRPOTrainer,
    "rloo": fast.FastRLOOTrainer,
}
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
    "dataloader_pin_memory": False,
}
# Two steps on the same rollouts, with a clip that the second one reaches.
ROLLOUTS: dict[str, Any] = {
    "num_generations": 2,
    "max_completion_length": 6,
    "temperature": 0.9,
    "learning_rate": 0.1,
    "epsilon": 0.01,
    "num_iterations": 2,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {"max_length": 24},
    "dpo": {"max_length": 24},
    "kto": {"max_length": 24},
    "grpo": ROLLOUTS,
    "rloo": ROLLOUTS,
}
# What differs between two runs of the same settings: times, and what is computed from them.
UNTIMED = ("time", "runtime", "per_second", "flops", "mfu")


@dataclass
class Run:
    """What a training run leaves: the loss of every step, the logs, and the weights before and after."""

    losses: list[float] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    after: dict[str, torch.Tensor] = field(default_factory=dict)
    path: str = ""


def dataset(kind: str) -> Dataset:
    prompts = [f"{a} + {b} = " for a, b in ((1, 2), (12, 7), (3, 40), (5, 5), (6, 61), (70, 8), (9, 0), (2, 2))]
    answers = ["3", "19", "43", "10", "67", "78 indeed", "9", "4, I think"]
    wrong = ["4 or so", "2", "44", "100", "6", "7", "90 (nine)", "5"]
    if kind == "sft":
        return Dataset.from_dict({"text": [p + a for p, a in zip(prompts, answers, strict=True)]})
    if kind == "dpo":
        return Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": wrong})
    if kind == "kto":
        labels = [i % 2 == 0 for i in range(len(prompts))]
        texts = [a if label else w for a, w, label in zip(answers, wrong, labels, strict=True)]
        return Dataset.from_dict({"prompt": prompts, "completion": texts, "label": labels})
    return Dataset.from_dict({"prompt": prompts})


def digits(completions: list[str], **_: Any) -> list[float]:
    """A reward that a random model gets some of."""
    return [sum(c.isdigit() for c in completion) / 3.0 + 0.01 * len(completion) for completion in completions]


def tiny_folder(directory: Path, **options: Any) -> Path:
    """Save a tiny model, from which the trainers load the policy and the reference."""
    return save_tiny_model(directory, **options)


def tiny_experts(directory: Path) -> Path:
    """Save a tiny mixture of experts."""
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = MixtralConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, output_router_logits=True,
        **sizes, **heads, **ids,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_trainer(
    kind: str, folder: Path, output: Path, options: dict[str, Any], trainer: type | None = None, **more: Any
) -> Any:
    """Return a trainer on the tiny model; `ref_folder` has a reference of its own."""
    config = CONFIGS[kind](output_dir=str(output), **{**COMMON, **DEFAULTS[kind], **options})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind in ("grpo", "rloo"):
        more["reward_funcs"] = digits
    if "ref_folder" in more:
        more["ref_model"] = AutoModelForCausalLM.from_pretrained(more.pop("ref_folder"), dtype=torch.float32)
    made = trainer or TRAINERS[kind]
    tokenizer = tiny_tokenizer(pad_is_eos=False)
    return made(model=model, args=config, train_dataset=dataset(kind), processing_class=tokenizer, **more)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the trained weights, whole where DeepSpeed or FSDP2 has sharded them."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gathered: Any = contextlib.nullcontext()
    if any(hasattr(value, "ds_id") for value in trained.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(trained.values()))
    with gathered:
        return {name: _whole(value.detach()).clone() for name, value in trained.items()}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def train(
    kind: str,
    folder: Path,
    output: Path,
    options: dict[str, Any],
    *,
    mode: str = "trl",
    prepare: Callable[[Any], None] | None = None,
    **more: Any,
) -> Run:
    """Train and return what happened; mode "trl", "patched" or "fast"."""
    context = fast.patched() if mode == "patched" else contextlib.nullcontext()
    run = Run()
    with context:
        trainer = make_trainer(kind, folder, output, options, FAST[kind] if mode == "fast" else None, **more)
        if prepare is not None:
            prepare(trainer)
        step = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = step(*args, **kwargs)
            run.losses.append(float(loss))
            return loss

        trainer.training_step = training_step
        run.before = weights(trainer.model)
        trainer.train()
    run.after = weights(trainer.model)
    run.path = getattr(trainer, "fastrl_path", "")
    for logs in trainer.state.log_history:
        run.logs.append({k: v for k, v in logs.items() if not any(word in k for word in UNTIMED)})
    return run


# Both sides sum the same few hundred float32 numbers per gradient entry in another order: an error of sqrt(n) roundings
# of the largest, which the second step's log-probs see again. 1e-4 of the change is some 800 roundings.
RELATIVE = 1e-4
EPS = torch.finfo(torch.float32).eps


def assert_same(ours: Run, theirs: Run) -> None:
    """Assert equal losses step by step, equal logs, and equal changes of every weight."""
    assert len(ours.losses) == len(theirs.losses) > 0
    for a, b in zip(ours.losses, theirs.losses, strict=True):
        assert abs(a - b) <= RELATIVE * max(abs(b), 0.01), f"losses {ours.losses} against {theirs.losses}"
    moved = 0.0
    assert ours.after.keys() == theirs.after.keys()
    for name, weight in theirs.after.items():
        change = (weight - theirs.before[name]).abs().max()
        moved = max(moved, float(change))
        difference = float((ours.after[name] - weight).abs().max())
        allowed = RELATIVE * float(change) + 4.0 * EPS * float(weight.abs().max())
        assert difference <= allowed, f"{name}: {difference} apart after changing by {float(change)}"
    assert moved > 1e-4, "nothing was learnt: the comparison says nothing"
    assert len(ours.logs) == len(theirs.logs)
    for a, b in zip(ours.logs, theirs.logs, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            if isinstance(value, float):
                assert abs(a[key] - value) <= RELATIVE * max(abs(value), 1.0), f"{key}: {a[key]} against {value}"


@contextlib.contextmanager
def shared_model(rank: int, world_size: int) -> Iterator[tuple[Path, Path]]:
    """Give the folder of one tiny model to every rank of the process group, and each a folder of its own.

    transformers writes a model on the first rank only, so the others read that one's. The environment says what a
    launcher would.
    """
    gc.freeze()
    with tempfile.TemporaryDirectory() as directory:
        shared = [str(tiny_folder(Path(directory) / "model"))]
        dist.broadcast_object_list(shared, src=0)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": str(world_size)}
        yield Path(shared[0]), Path(directory)
