"""TRL's trainers under DistributedDataParallel, two processes: with fastrl the same weights, the same on every rank."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_checks

pytest.importorskip("trl")

RANKS = 2
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "dpo": ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "kto": ("kto", {}),
    "grpo": ("grpo", {"loss_type": "dapo", "entropy_coef": 0.1, "beta": 0.2}),
    "grpo_accumulated": (
        "grpo",
        {"loss_type": "grpo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ),
    "rloo": ("rloo", {}),
}


def _is_spread(trainer: Any) -> None:
    assert trainer.accelerator.num_processes == RANKS


def check_training(rank: int, world_size: int) -> None:
    """Train every setting alone and with the fused loss, and compare with TRL's run and with the other rank."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    import trl_runs

    with trl_runs.shared_model(rank, world_size) as (folder, directory):
        for name, (kind, options) in SETTINGS.items():
            theirs, ours = (
                trl_runs.train(kind, folder, directory, options, mode=mode, prepare=_is_spread)
                for mode in ("trl", "fast")
            )
            assert "3 GEMM units" in ours.path, name
            trl_runs.assert_same(ours, theirs)
            for weight in ours.after.values():
                others = [torch.empty_like(weight) for _ in range(world_size)]
                dist.all_gather(others, weight)
                assert all(torch.equal(weight, other) for other in others), name
        dist.barrier()


def test_two_processes(tmp_path: Path) -> None:
    failures = run_checks(RANKS, [check_training], tmp_path)
    assert failures == {"check_training": []}
