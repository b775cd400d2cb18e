"""TRL's trainers on a model sharded by FSDP2, two processes: with fastrl the same losses, logs and weights.

accelerate hands a model to FSDP on an accelerator only: on a CPU it ignores the setting and takes
DistributedDataParallel. Here `fully_shard` is applied to the trainer's model by hand, as accelerate's plugin does.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_checks

pytest.importorskip("trl")

RANKS = 2
# All completions are of one length: a rank that stops generating earlier would leave the others waiting for its shards.
FULL_LENGTH: dict[str, Any] = {"generation_kwargs": {"min_new_tokens": 6}}
# (trainer, options, whether the head is a group of its own): in the root's group its weight is whole in the forward, by
# itself it is a DTensor there, which TRL gathers.
SETTINGS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("sft", {}, False),
    ("sft", {}, True),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, False),
    ("grpo", {"loss_type": "dapo", "beta": 0.0, **FULL_LENGTH}, True),
)


def _shard(head_by_itself: bool) -> Callable[[Any], None]:
    """Return a function that shards a trainer's model before its optimiser exists, and keeps DDP from wrapping it."""

    def prepare(trainer: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        model = trainer.model
        mesh = init_device_mesh("cpu", (RANKS,))
        parts = [*model.model.layers]
        if head_by_itself:
            # A weight belongs to one group: the head is untied from the embedding.
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            parts.append(model.lm_head)
        for part in parts:
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert trainer.accelerator.num_processes == RANKS
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        trainer.accelerator.prepare_model = lambda model, **_: model

    return prepare


def same_steps(rank: int, world_size: int) -> None:
    """Train every setting alone, patched and with the fused loss, all on the same shards."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    import trl_runs

    with trl_runs.shared_model(rank, world_size) as (folder, directory):
        for kind, options, head_by_itself in SETTINGS:
            prepare = _shard(head_by_itself)
            theirs, patched, fused = (
                trl_runs.train(kind, folder, directory, options, mode=mode, prepare=prepare)
                for mode in ("trl", "patched", "fast")
            )
            trl_runs.assert_same(patched, theirs)
            trl_runs.assert_same(fused, theirs)
            assert "3 GEMM units" in fused.path, kind
        dist.barrier()


def test_two_processes(tmp_path: Path) -> None:
    failures = run_checks(RANKS, [same_steps], tmp_path)
    assert failures == {"same_steps": []}
