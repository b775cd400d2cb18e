"""The patched forward under DDP and FSDP2: the loss runs inside the head's own call, where its weight is gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_checks
from torch import Tensor

WORLD = 2


def _model() -> Any:
    from tiny_families import tiny_family

    return tiny_family("phi")


def _batch(model: Any) -> dict[str, Tensor]:
    from tiny_families import tiny_batch

    batch = tiny_batch("phi", model)
    return {name: torch.cat([value, value.flip(1)])[:4] for name, value in batch.items()}


def _step(model: Any, inputs: dict[str, Tensor], items: int) -> Tensor:
    """Take one SGD step on this rank's share of the batch. Ranks average gradients, so the loss is times WORLD."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    output = model(**inputs, num_items_in_batch=items)
    assert output.logits is None
    (output.loss * WORLD).backward()
    optimiser.step()
    return output.logprobs


def _expected() -> dict[str, Tensor]:
    """The weights after one step on the whole batch in one process, unpatched."""
    model = _model()
    inputs = _batch(model)
    items = int((inputs["labels"][:, 1:] != -100).sum())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**inputs, num_items_in_batch=items).loss.backward()
    optimiser.step()
    return dict(model.state_dict())


def _share(inputs: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {name: value[rank * 2 : rank * 2 + 2] for name, value in inputs.items()}


def _compare(weights: dict[str, Tensor]) -> None:
    expected = _expected()
    start = _model().state_dict()
    assert weights.keys() == expected.keys()
    for name, want in expected.items():
        moved = float((want - start[name]).abs().max())
        worst = float((weights[name] - want).abs().max())
        assert worst <= 1e-5 * moved + 1e-6, f"{name}: {worst:.3g} of {moved:.3g}"


def ddp(rank: int, world_size: int) -> None:
    from fastrl.integrations.transformers import patch

    model = _model()
    inputs = _batch(model)
    items = int((inputs["labels"][:, 1:] != -100).sum())
    with patch(model):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        _step(wrapped, _share(inputs, rank), items)
    _compare(dict(model.state_dict()))


def _fsdp(rank: int, parts: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from fastrl.integrations.transformers import patch, unpatch

    model = _model()
    inputs = _batch(model)
    items = int((inputs["labels"][:, 1:] != -100).sum())
    mesh = init_device_mesh("cpu", (WORLD,))
    patch(model)
    for part in parts(model):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    logprobs = _step(model, _share(inputs, rank), items)
    assert isinstance(model.lm_head.weight, DTensor)
    _compare({name: value.full_tensor() for name, value in model.state_dict().items()})
    # A second forward after the step, and the host's own after undoing, see the same gathered head.
    with torch.no_grad():
        again = model(**_share(inputs, rank), num_items_in_batch=items)
        unpatch(model)
        plain = model(**_share(inputs, rank), num_items_in_batch=items)
    torch.testing.assert_close(again.loss, plain.loss)
    assert not torch.equal(again.logprobs, logprobs)


def fsdp2_head_in_the_root(rank: int, world_size: int) -> None:
    _fsdp(rank, lambda model: [*model.model.layers])


def fsdp2_head_by_itself(rank: int, world_size: int) -> None:
    _fsdp(rank, lambda model: [*model.model.layers, model.lm_head])


def fsdp2_a_head_that_was_not_gathered_is_named(rank: int, world_size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    from fastrl.integrations.transformers import patch

    model = _model()
    mesh = init_device_mesh("cpu", (WORLD,))
    model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh))
    with patch(model), pytest.raises((TypeError, RuntimeError), match="DTensor"):
        model(**_batch(model))


CHECKS = [ddp, fsdp2_head_in_the_root, fsdp2_head_by_itself, fsdp2_a_head_that_was_not_gathered_is_named]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_checks(WORLD, CHECKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_ranks_take_the_step_of_one(check: str, failures: dict[str, list[str]]) -> None:
    assert not failures[check], "\n".join(failures[check])
