"""The patched forward and TRL's trainers under DeepSpeed ZeRO-3, where every weight, the head's too, is sharded."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_checks
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

RANKS = 2
STEPS = 2
# No parameter is small enough to stay whole, and none is kept or fetched beyond the module that runs.
ZERO3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}

# Clipping is on by default there.
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "zero_optimization": ZERO3,
    "zero_allow_untested_optimizer": True,
}


def _start(rank: int, world_size: int) -> Any:
    """Return deepspeed, on the CPU, in the process group that is there."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": str(world_size)}
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def _batch(name: str, model: Any) -> dict[str, Tensor]:
    from tiny_families import tiny_batch

    batch = tiny_batch(name, model)
    return {key: torch.cat([value, value.flip(1)])[:4] for key, value in batch.items()}


def _loss(output: Any, weights: Tensor | None, items: int) -> Tensor:
    """The model's own loss, or one of the log-probs."""
    return output.loss if weights is None else -(output.logprobs * weights).sum() / items


def _steps(name: str, wrap: Any, forward: Any, rows: slice, own_loss: bool) -> tuple[list[float], Any]:
    """Train on `rows` of the batch, and return the losses and the model."""
    from tiny_families import tiny_family

    model = tiny_family(name).train()
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    whole = _batch(name, model)
    items = int((whole["labels"][:, 1:] != -100).sum())
    weights = None if not own_loss else torch.linspace(0.5, 2.0, whole["labels"].numel()).view(whole["labels"].shape)
    share = {key: value[rows] for key, value in whole.items()}
    engine = wrap(model)
    losses = []
    for _ in range(STEPS):
        loss = forward(engine, share, None if weights is None else weights[rows], items)
        losses.append(float(loss.detach()))
    return losses, (model, start)


def _plain(name: str, own_loss: bool) -> tuple[list[float], Any]:
    """The same steps in one process, unpatched and without DeepSpeed."""

    def wrap(model: Any) -> Any:
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def forward(engine: Any, share: dict[str, Tensor], weights: Tensor | None, items: int) -> Tensor:
        model, optimiser = engine
        output = model(**share, num_items_in_batch=items)
        if weights is not None:
            logp = output.logits[:, :-1].log_softmax(-1)
            labels = share["labels"][:, 1:]
            found = logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
            output.logprobs = torch.nn.functional.pad(found, (0, 1))
        loss = _loss(output, weights, items)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss

    return _steps(name, wrap, forward, slice(0, 4), own_loss)


def _patched(deepspeed: Any, name: str, rank: int, own_loss: bool) -> None:
    """Compare losses and weights of two ranks with one process."""
    from fastrl.integrations.transformers import patch

    def wrap(model: Any) -> Any:
        patch(model, differentiable_logprobs=own_loss)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = deepspeed.initialize(model=model, optimizer=optimiser, config=CONFIG)[0]
        assert model.get_output_embeddings().weight.numel() == 0
        return engine

    def forward(engine: Any, share: dict[str, Tensor], weights: Tensor | None, items: int) -> Tensor:
        output = engine(**share, num_items_in_batch=items)
        assert output.logits is None
        loss = _loss(output, weights, items)
        # Gradients are averaged over the ranks, and `items` counts the tokens of both.
        engine.backward(loss * RANKS)
        engine.step()
        return loss

    losses, (model, start) = _steps(name, wrap, forward, slice(rank * 2, rank * 2 + 2), own_loss)
    expected, (alone, _) = _plain(name, own_loss)
    summed = torch.tensor(losses)
    torch.distributed.all_reduce(summed)
    torch.testing.assert_close(summed, torch.tensor(expected))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {key: value.detach().clone() for key, value in model.named_parameters()}
    for key, want in alone.named_parameters():
        moved = float((want - start[key]).abs().max())
        assert moved > 0.0, f"{key} did not move"
        worst = float((weights[key] - want).abs().max())
        assert worst <= 1e-5 * moved + 1e-6, f"{name}, {key}: {worst:.3g} of {moved:.3g}"


def patched_models(rank: int, world_size: int) -> None:
    """A tied head, one with a bias, one with a softcap: their own loss, 3 GEMM units."""
    deepspeed = _start(rank, world_size)
    for name in ("llama_tied", "phi", "gemma2"):
        _patched(deepspeed, name, rank, own_loss=False)


def patched_models_with_a_loss_of_ones_own(rank: int, world_size: int) -> None:
    """The head's weight is read again in the backward, where it has been sharded in between."""
    deepspeed = _start(rank, world_size)
    for name in ("llama", "phi"):
        _patched(deepspeed, name, rank, own_loss=True)


def trainers_of_trl(rank: int, world_size: int) -> None:
    """Every trainer of TRL with its loss formed in the forward, one patched: losses, logs and weights are TRL's own."""
    pytest.importorskip("trl")
    _start(rank, world_size)
    import trl_runs

    options = {"deepspeed": {**CONFIG, "train_micro_batch_size_per_gpu": "auto"}}
    with tempfile.TemporaryDirectory() as directory:
        # transformers writes on the first rank only; the others read its model.
        shared = [str(trl_runs.tiny_folder(Path(directory) / "model"))]
        torch.distributed.broadcast_object_list(shared, src=0)
        for kind in trl_runs.TRAINERS:
            runs = {
                mode: trl_runs.train(kind, Path(shared[0]), Path(directory), options, mode=mode, prepare=_is_sharded)
                for mode in (("trl", "patched", "fast") if kind == "sft" else ("trl", "fast"))
            }
            for run in runs.values():
                trl_runs.assert_same(run, runs["trl"])
            assert "3 GEMM units" in runs["fast"].path, kind
        torch.distributed.barrier()


def _is_sharded(trainer: Any) -> None:
    assert trainer.accelerator.num_processes == RANKS
    assert trainer.model.get_output_embeddings().weight.ds_tensor is not None


CHECKS = [patched_models, patched_models_with_a_loss_of_ones_own, trainers_of_trl]


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__ for check in CHECKS])
def test_two_ranks_take_the_steps_of_one(check: Any, tmp_path: Path) -> None:
    failures = run_checks(RANKS, [check], tmp_path)
    assert failures == {check.__name__: []}
