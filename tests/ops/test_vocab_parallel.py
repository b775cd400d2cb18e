"""The head's rows spread over a group of processes: against the whole head in one process, and on every rank alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_checks
from memory import MemoryWatch
from oracle import assert_as_accurate
from torch import Tensor
from vocabulary_cases import BACKENDS, patterns, upstream, weighted_sum
from vocabulary_cases import draw_head as draw

from fastrl import PolicyLoss, PreferenceLoss, linear_token_logprobs, reference
from fastrl.ops.head import HeadOptions
from fastrl.ops.vocab_parallel import linear_token_logprobs_parallel, merge_shards, part_statistics

NAMES = ("logprobs", "entropy", "logsumexp", "hidden", "weight", "bias")
PRODUCTS = (("chunks", "chunk_logits"), ("vocab_parallel", "_times_weight"))
# Rows of a vocabulary of 10 on every rank: uneven, one entry, none at either end and between.
SIZES = {2: [(6, 4), (1, 9), (0, 10), (10, 0)], 3: [(7, 0, 3), (0, 9, 1), (3, 4, 3)]}


def statistics_of(
    logits: Tensor, labels: Tensor, inv_temperature: Tensor, bounds: list[int], head: HeadOptions
) -> Tensor:
    """Return the statistics (R, N, 4) of the parts of logits between consecutive bounds."""
    absent = torch.tensor([-math.inf, 0.0, 0.0, -math.inf], dtype=torch.float64).expand(len(labels), 4)
    return torch.stack(
        [
            part_statistics(logits[:, a:b].contiguous(), labels - a, inv_temperature, head)[0] if b > a else absent
            for a, b in pairwise(bounds)
        ]
    )


def judge_merge(logits: Tensor, labels: Tensor, bounds: list[int], backend: str, **options: Any) -> Tensor:
    """Hold the merge of the parts against the reference on whole rows; return its log-probs."""
    temperature = options.get("temperature", 1.0)
    inv_temperature = (1.0 / torch.as_tensor(temperature, dtype=logits.dtype)).expand(len(labels))
    head = HeadOptions(options.get("logit_scale", 1.0), options.get("softcap") or 0.0, -100, 8, backend)
    merged = merge_shards(statistics_of(logits, labels, inv_temperature, bounds, head), inv_temperature)
    want = reference.token_logprobs(logits.double(), labels, **options)
    eager = reference.token_logprobs(logits, labels, **options)
    for name, got, exact, plain in zip(NAMES, merged, want, eager, strict=False):
        assert_as_accurate(name, got.to(logits.dtype), exact, plain)
    torch.testing.assert_close(merged.log_share.exp().sum(0), torch.ones(len(labels), dtype=torch.float64))
    return merged.logprobs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bounds", [[0, 37], [0, 5, 37], [0, 20, 20, 37], [0, 1, 30, 36, 37]], ids=str)
def test_merge_of_parts_is_the_whole_row(bounds: list[int], backend: str) -> None:
    generator = torch.Generator().manual_seed(len(bounds))
    logits = torch.randn(40, 37, generator=generator) * 4
    labels = torch.randint(0, 37, (40,), generator=generator)
    heat = torch.rand(40, generator=generator) + 0.5
    judge_merge(logits, labels, bounds, backend)
    judge_merge(logits, labels, bounds, backend, temperature=heat, logit_scale=-0.5, softcap=3.0)
    # So wide that sums relative to any entry but the largest of z would overflow.
    judge_merge(logits * 100.0, labels, bounds, backend, logit_scale=-0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", patterns(37))
def test_merge_of_hard_rows(name: str, backend: str) -> None:
    """Parts that are -inf throughout, a target at -inf, offsets of 1e6, all but one entry banned."""
    logits, labels = patterns(37)[name]
    for bounds in ([0, 37], [0, 12, 37], [0, 2, 35, 37], [0, 1, 2, 36, 37]):
        judge_merge(logits, labels, bounds, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_keeps_the_precision_of_a_certain_target(backend: str) -> None:
    """At 1 - p of about 1e-8 the log-prob is as precise as anywhere, whatever part holds the target."""
    logits = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 4, 11, 12, 23])
    logits[torch.arange(6), labels] = 21.0
    got = judge_merge(logits, labels, [0, 4, 12, 24], backend)
    want = reference.token_logprobs(logits.double(), labels)[0]
    # A float32 p could not tell these rows from certain ones.
    assert bool((want > -torch.finfo(torch.float32).eps).all())
    assert float(((got - want) / want).abs().max()) < 1e-6


def test_a_row_without_a_finite_entry_is_nan() -> None:
    absent = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(3, 2, 4)
    assert all(bool(x.isnan().all()) for x in merge_shards(absent)[:3])


def test_merge_of_a_row_does_not_depend_on_the_rows_around_it() -> None:
    generator = torch.Generator().manual_seed(0)
    statistics = torch.rand(3, 50, 4, generator=generator)
    inv_temperature = torch.rand(50, generator=generator) + 0.5
    whole = merge_shards(statistics, inv_temperature)
    for i in (0, 17, 49):
        alone = merge_shards(statistics[:, i : i + 1], inv_temperature[i : i + 1])
        assert all(torch.equal(a[..., i : i + 1], b) for a, b in zip(whole, alone, strict=True))


def rows_of(rank: int, sizes: tuple[int, ...]) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def run(
    rank: int,
    sizes: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
    needs: str,
    **options: Any,
) -> dict[str, Tensor]:
    """Return the outputs and this rank's gradients; "bias" in `needs` or not, the bias is passed if there is one."""
    hidden, weight, bias, labels = tensors
    held = rows_of(rank, sizes)
    leaves = {"hidden": hidden, "weight": weight[held], "bias": None if bias is None else bias[held]}
    leaves = {k: v.detach().clone().requires_grad_(k in needs.split()) for k, v in leaves.items() if v is not None}
    outputs = linear_token_logprobs_parallel(
        leaves["hidden"], leaves["weight"], labels, bias=leaves.get("bias"), group=dist.group.WORLD, **options
    )
    weighted_sum(outputs, grads, outputs.logprobs.dtype).backward()
    return dict(zip(NAMES, outputs, strict=False)) | {k: v.grad for k, v in leaves.items() if v.requires_grad}


def whole(
    tensors: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """Return outputs and gradients of the reference on the whole head."""
    hidden, weight, bias, labels = tensors
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves.items() if v is not None}
    outputs = reference.linear_token_logprobs(leaves["hidden"], leaves["weight"], labels, leaves.get("bias"), **options)
    weighted_sum(outputs, grads, dtype).backward()
    return dict(zip(NAMES, outputs, strict=False)) | {k: v.grad for k, v in leaves.items()}


def same_on_all_ranks(x: Tensor) -> bool:
    every = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(every, x.detach().contiguous())
    return all(torch.equal(x, other) for other in every)


def judge(
    rank: int, sizes: tuple[int, ...], tensors: tuple[Tensor, ...], needs: str, grads: Any = None, **options: Any
) -> None:
    """Hold a run against the whole head in one process; outputs and dX must be the same bits on every rank."""
    grads = upstream(tensors[0].shape[0]) if grads is None else grads
    got = run(rank, sizes, tensors, grads, needs, **options)
    for key in ("chunk_tokens", "backend", "keep_token_grads"):
        options.pop(key, None)
    low = tensors[0].dtype
    plain = torch.float64 if low == torch.float64 else torch.float32
    want, eager = (whole(tensors, grads, dtype, **options) for dtype in (torch.float64, plain))
    assert set(got) == {*NAMES[:3], *needs.split()}
    for name, value in got.items():
        exact, beside = want[name], eager[name]
        if name in ("weight", "bias"):
            exact, beside = exact[rows_of(rank, sizes)], beside[rows_of(rank, sizes)]
            assert value.shape == exact.shape
            assert value.dtype == low
        if value.numel():
            # A part of the head is judged by the largest gradient of the whole head, as a part of dX is.
            assert_as_accurate(name, value, exact, beside, dtype=plain if name in NAMES[:3] else low)
        if name in (*NAMES[:3], "hidden"):
            assert same_on_all_ranks(value), f"{name} differs between ranks"


def check_splits_and_backends(rank: int, world: int) -> None:
    for sizes in SIZES[world]:
        for backend in BACKENDS:
            judge(rank, sizes, draw(13, 6, 10), "hidden weight bias", backend=backend, chunk_tokens=4)


def check_head_options(rank: int, world: int) -> None:
    heat = torch.linspace(0.5, 1.5, 13)
    for backend in BACKENDS:
        options = {"backend": backend, "chunk_tokens": 5, "temperature": heat, "softcap": 2.0}
        judge(rank, SIZES[world][0], draw(13, 6, 10), "hidden weight bias", logit_scale=0.3, **options)
        judge(rank, SIZES[world][0], draw(13, 6, 10), "hidden", logit_scale=-0.3, **options)


def check_dtypes(rank: int, world: int) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        judge(rank, SIZES[world][0], draw(13, 6, 10, dtype), "hidden weight bias", backend="torch", chunk_tokens=4)
        hidden, weight, _, labels = draw(13, 6, 10, dtype)
        judge(rank, SIZES[world][1], (hidden, weight, None, labels), "hidden weight", chunk_tokens=4)  # type: ignore[arg-type]


def check_partial_requires_grad(rank: int, world: int) -> None:
    for needs in ("hidden", "weight", "bias", "hidden weight", "weight bias"):
        judge(rank, SIZES[world][0], draw(13, 6, 10), needs, backend="torch", chunk_tokens=4)


def check_each_output_alone(rank: int, world: int) -> None:
    """With a frozen head the log-prob alone takes the kept token gradients, the others form the logits again."""
    for which in range(3):
        grads = tuple(g if i == which else None for i, g in enumerate(upstream(13)))
        for needs in ("hidden", "hidden weight bias"):
            for backend in BACKENDS:
                judge(rank, SIZES[world][0], draw(13, 6, 10), needs, grads, backend=backend, chunk_tokens=4)


def check_keep_token_grads(rank: int, world: int) -> None:
    """Without them every output forms the logits again: 3 units for an entropy bonus over a frozen head, 2 without."""
    for which in range(3):
        grads = tuple(g if i == which else None for i, g in enumerate(upstream(13)))
        judge(rank, SIZES[world][0], draw(13, 6, 10), "hidden", grads, keep_token_grads=False, chunk_tokens=4)
    sizes, (hidden, weight, _, labels) = SIZES[world][0], draw(13, 6, 10)
    inputs = {"advantages": torch.ones(13), "mask": labels >= 0, "cu_seqlens": torch.tensor([0, 6, 13])}
    found, rows = {}, []
    for name, entropy_coef in (("bonus", 0.1), ("none", 0.0)):
        rows.clear()
        leaf, part = hidden.clone().requires_grad_(), weight[rows_of(rank, sizes)]
        spec = PolicyLoss.preset("reinforce", entropy_coef=entropy_coef)
        with counting_products(rows):
            output = spec.from_hidden(leaf, part, labels, **inputs, tp_group=dist.group.WORLD, chunk_tokens=4)
            output.loss.backward()
        chunks = len(range(0, int((labels >= 0).sum()), 4))
        found[name] = output.metrics["path/gemm_units"][0].item(), len(rows) / chunks
    # A rank without rows of the head has no products.
    assert found == {"bonus": (3.0, 3.0 * bool(sizes[rank])), "none": (2.0, 2.0 * bool(sizes[rank]))}, found


@contextmanager
def counting_products(rows: list[int]) -> Iterator[None]:
    """Note the rows of every product with a part of the head."""
    modules = [(import_module(f"fastrl.ops.{where}"), name) for where, name in PRODUCTS]
    originals = [getattr(module, name) for module, name in modules]

    def counted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            rows.append(arguments[0].shape[0])
            return function(*arguments)

        return call

    for (module, name), original in zip(modules, originals, strict=True):
        setattr(module, name, counted(original))
    try:
        yield
    finally:
        for (module, name), original in zip(modules, originals, strict=True):
            setattr(module, name, original)


def check_rows_without_a_gradient(rank: int, world: int) -> None:
    first, _, _ = upstream(13)
    grads = (torch.where(torch.arange(13) % 3 == 0, first, 0.0), None, None)
    judge(rank, SIZES[world][0], draw(13, 6, 10), "hidden weight bias", grads, chunk_tokens=4)
    grads = (torch.zeros(13), torch.zeros(13), torch.zeros(13))
    judge(rank, SIZES[world][0], draw(13, 6, 10), "hidden weight bias", grads, chunk_tokens=4)


def check_hard_rows(rank: int, world: int) -> None:
    """Through the bias: a part banned throughout, the target banned, a target that is certain, offsets of 1e6."""
    hidden, weight, bias, labels = draw(13, 6, 10)
    sizes = SIZES[world][0]
    live = labels >= 0
    # Ids that no banned part holds.
    last = torch.where(live, 9, labels)
    for backend in BACKENDS:
        banned = bias.clone()
        banned[: sizes[0]] = -math.inf
        target = bias.clone()
        target[9] = -math.inf
        certain = bias.clone()
        certain[9] = 40.0
        for case in (banned, certain, bias + 1e6):
            for needs in ("hidden", "hidden weight bias"):
                judge(rank, sizes, (hidden, weight, case, last), needs, backend=backend, chunk_tokens=4)
        # A banned target's log-prob is -inf; its gradient is that of log_softmax. Also where its whole part is banned.
        for case, ids in ((target, last), (banned, torch.where(live, 0, labels))):
            for needs in ("hidden", "hidden weight bias"):
                grads = (upstream(13)[0], None, None)
                judge(rank, sizes, (hidden, weight, case, ids), needs, grads, backend=backend, chunk_tokens=4)


def check_certain_target_keeps_its_gradient(rank: int, world: int) -> None:
    """At 1 - p of about 1e-8 the gradient of the hidden states has the relative precision that it has elsewhere."""
    hidden, weight, bias, labels = draw(13, 6, 10)
    weight, bias[9] = weight * 0.3, 21.0
    labels = torch.where(labels >= 0, 9, labels)
    grads = (upstream(13)[0], None, None)
    want = whole((hidden, weight, bias, labels), grads, torch.float64)["hidden"]
    assert 0 < float(want.abs().max()) < 1e-5
    for sizes in SIZES[world]:
        for needs in ("hidden", "hidden weight bias"):
            got = run(rank, sizes, (hidden, weight, bias, labels), grads, needs, chunk_tokens=4)["hidden"]
            error = (got.double() - want).abs().max() / want.abs().max()
            assert float(error) < 3e-5, f"{needs} {sizes}: {float(error):.1e}"


def check_bits_repeat_and_follow_the_row(rank: int, world: int) -> None:
    """The same bits again; and the outputs of a row are the same bits in another place of another batch."""
    sizes = {2: (157, 100), 3: (100, 0, 157)}[world]
    hidden, weight, bias, labels = draw(300, 64, 257)
    grads = upstream(300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:131]
    for needs in ("hidden", "hidden weight bias"):
        first = run(rank, sizes, (hidden, weight, bias, labels), grads, needs)
        again = run(rank, sizes, (hidden, weight, bias, labels), grads, needs)
        assert all(torch.equal(first[k], again[k]) for k in first)
        moved = run(rank, sizes, (hidden[order], weight, bias, labels[order]), tuple(g[order] for g in grads), needs)
        assert all(torch.equal(first[k][order], moved[k]) for k in NAMES[:3])


def check_masked_rows_cannot_matter(rank: int, world: int) -> None:
    hidden, weight, bias, labels = draw(13, 6, 10)
    poisoned = torch.where((labels == -100).unsqueeze(-1), math.nan, hidden)
    for needs in ("hidden", "hidden weight bias"):
        results = [
            run(rank, SIZES[world][0], (x, weight, bias, labels), upstream(13), needs, chunk_tokens=4)
            for x in (hidden, poisoned)
        ]
        assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def check_shapes_and_empty_batches(rank: int, world: int) -> None:
    hidden, weight, _, labels = draw(12, 6, 10)
    held = rows_of(rank, SIZES[world][0])
    group = dist.group.WORLD
    flat = linear_token_logprobs_parallel(hidden, weight[held], labels, group=group)
    deep = linear_token_logprobs_parallel(hidden.view(3, 4, 6), weight[held], labels.view(3, 4).int(), group=group)
    assert all(b.shape == (3, 4) and torch.equal(a.view(3, 4), b) for a, b in zip(flat, deep, strict=True))
    for n, ids in ((0, labels[:0]), (12, torch.full((12,), -100))):
        leaf, part = hidden[:n].clone().requires_grad_(), weight[held].clone().requires_grad_()
        result = linear_token_logprobs_parallel(leaf, part, ids, group=group)
        assert result.logprobs.shape == (n,)
        (result.logprobs.sum() + result.entropy.sum()).backward()
        assert leaf.grad is not None
        assert not leaf.grad.any()
        assert part.grad is not None
        assert not part.grad.any()


def check_ignore_index_is_an_id(rank: int, world: int) -> None:
    """The id of padding tokens, which is also a place within every part."""
    hidden, weight, bias, labels = draw(13, 6, 10)
    judge(rank, SIZES[world][0], (hidden, weight, bias, labels.clamp(min=0)), "hidden weight bias", ignore_index=0)


def check_no_grad_forward(rank: int, world: int) -> None:
    hidden, weight, bias, labels = draw(13, 6, 10)
    held = rows_of(rank, SIZES[world][0])
    with torch.no_grad():
        leaf = hidden.clone().requires_grad_()
        result = linear_token_logprobs_parallel(leaf, weight[held], labels, bias=bias[held], group=dist.group.WORLD)
    assert not result.logprobs.requires_grad
    one = linear_token_logprobs(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(tuple(result), tuple(one))


def check_second_derivatives_are_refused(rank: int, world: int) -> None:
    hidden, weight, _, labels = draw(13, 6, 10)
    leaf = hidden.requires_grad_()
    result = linear_token_logprobs_parallel(
        leaf, weight[rows_of(rank, SIZES[world][0])], labels, group=dist.group.WORLD
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(result.logprobs.sum(), leaf, create_graph=True)


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Record the names of the collectives that are called inside."""
    called: list[str] = []
    names = ("all_gather_single", "all_gather_into_tensor", "all_to_all_single", "all_reduce", "all_gather")
    originals: dict[str, Callable[..., Any]] = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def recorded(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return originals[name](*arguments, **options)

        return call

    for name in originals:
        setattr(dist, name, recorded(name))
    try:
        yield called
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def check_number_of_collectives(rank: int, world: int) -> None:
    """Two in the forward and two for dX, whatever the number of chunks; none for the gradients of the head."""
    for chunk in (2, 100):
        for needs, count in (("hidden weight bias", 4), ("hidden", 4), ("weight", 2)):
            with collectives() as called:
                run(rank, SIZES[world][0], draw(13, 6, 10), upstream(13), needs, chunk_tokens=chunk)
            assert len(called) == count, called


def check_memory(rank: int, world: int) -> None:
    """One chunk of this part's logits; dX twice in float32, once more while it is put in its place; this part's dW."""
    n, dim, chunk = 512, 8, 32
    sizes = {2: (3000, 1000), 3: (2000, 0, 2000)}[world]
    tensors = draw(n, dim, 4000)
    with MemoryWatch() as watch:
        run(rank, sizes, tensors, upstream(n), "hidden weight bias", chunk_tokens=chunk)
    states, head, tile = n * dim * 4, sizes[rank] * (dim + 1) * 4, chunk * sizes[rank] * 4
    rows_torch = 10 * tile
    assert watch.largest <= max(tile, head, 4 * states)
    # The head's copy as a leaf, its gradient and the gradient's place in the leaf; two dozen numbers per token.
    assert watch.peak <= tile + rows_torch + 3 * head + 8 * states + 64 * n * 8


def check_dtensor_weights(rank: int, world: int) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    hidden, weight, bias, labels = draw(13, 6, 10)
    mesh = init_device_mesh("cpu", (world,))
    split, spread = (distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias))
    leaf = hidden.clone().requires_grad_()
    result = linear_token_logprobs_parallel(leaf, split, labels, bias=spread, group=mesh.get_group())
    grads = upstream(13)
    weighted_sum(result, grads, torch.float32).backward()
    want, eager = (whole((hidden, weight, bias, labels), grads, dtype) for dtype in (torch.float64, torch.float32))
    assert isinstance(split.grad, DTensor)
    for name, got in (("weight", split.grad.full_tensor()), ("bias", spread.grad.full_tensor()), ("hidden", leaf.grad)):
        assert_as_accurate(name, got, want[name], eager[name])
    with pytest.raises(TypeError, match=r"weight is a DTensor .* must be Shard\(0\) on a 1-D mesh"):
        linear_token_logprobs_parallel(
            hidden, distribute_tensor(weight, mesh, [Replicate()]), labels, group=mesh.get_group()
        )
    with pytest.raises(TypeError, match="hidden is a DTensor"):
        linear_token_logprobs_parallel(
            distribute_tensor(hidden, mesh, [Shard(0)]), split, labels, group=mesh.get_group()
        )


def check_bad_labels_raise_everywhere(rank: int, world: int) -> None:
    hidden, weight, _, labels = draw(13, 6, 10)
    held = rows_of(rank, SIZES[world][0])
    for bad in (10, -1, 2**40):
        labels[3] = bad
        with pytest.raises(ValueError, match=r"labels must be in \[0, V=10\)"):
            linear_token_logprobs_parallel(hidden, weight[held], labels, group=dist.group.WORLD)


def check_one_bad_rank_stops_all(rank: int, world: int) -> None:
    """Bad input on one rank must not leave the others waiting."""
    hidden, weight, _, labels = draw(13, 6, 10)
    held = rows_of(rank, SIZES[world][0])
    bad: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"weight must be \(V_r, D=6\)", {"weight": torch.empty(0)}),
        (ValueError, "weight must be", {"weight": weight[held, :5]}),
        (TypeError, "weight must be", {"weight": weight[held].long()}),
        (TypeError, "labels must be", {"labels": labels.double()}),
        (TypeError, "labels must be", {"labels": None}),
        (ValueError, "labels must have shape", {"labels": labels[:5]}),
        (ValueError, "bias must have shape", {"bias": torch.zeros(11)}),
        (ValueError, "temperature", {"temperature": 0.0}),
        (ValueError, "tail_mass must be 0.0", {"tail_mass": 1e-4}),
        (ValueError, "softcap", {"softcap": -1.0}),
        (ValueError, "backend must be one of", {"backend": "fastest"}),
        (TypeError, "integer", {"ignore_index": 0.5}),
    ]
    for kind, message, change in bad:
        arguments: dict[str, Any] = {"hidden": hidden, "weight": weight[held], "labels": labels}
        if rank == 1:
            arguments |= change
        expected = (kind, message) if rank == 1 else (ValueError, r"ranks \[1\] of tp_group refused")
        with pytest.raises(expected[0], match=expected[1]):
            linear_token_logprobs_parallel(**arguments, group=dist.group.WORLD)


def check_ranks_that_differ_are_refused(rank: int, world: int) -> None:
    hidden, weight, bias, labels = draw(13, 6, 10)
    held = rows_of(rank, SIZES[world][0])
    trained = hidden.clone().requires_grad_()
    differing: dict[str, dict[str, Any]] = {
        "number of tokens": {"hidden": hidden[1:], "labels": labels[1:]},
        "dtype": {"hidden": hidden.double()},
        "gradient mode": {"hidden": trained},
        "presence of a bias": {"bias": bias[held]},
        "logit_scale": {"logit_scale": 0.5},
        "softcap": {"softcap": 30.0},
        "ignore_index": {"ignore_index": -1},
        "labels": {"labels": labels.flip(0)},
        "temperature": {"temperature": torch.linspace(0.5, 1.0, 13)},
    }
    for name, change in differing.items():
        arguments: dict[str, Any] = {"hidden": hidden, "weight": weight[held], "labels": labels}
        if rank == 0:
            arguments |= change
        with pytest.raises(ValueError, match=f"same tokens and options: {name}"):
            linear_token_logprobs_parallel(**arguments, group=dist.group.WORLD)


def check_a_group_without_rows_is_refused(rank: int, world: int) -> None:
    hidden, weight, _, labels = draw(13, 6, 10)
    with pytest.raises(ValueError, match="weight is empty on every rank"):
        linear_token_logprobs_parallel(hidden, weight[:0], labels, group=dist.group.WORLD)
    with pytest.raises(TypeError, match=r"tp_group must be a .*ProcessGroup"):
        linear_token_logprobs_parallel(hidden, weight, labels, group="tp")


def check_public_entrances(rank: int, world: int) -> None:
    """The op, the policy loss and the preference loss take a shard and give the single-process loss and gradients."""
    hidden, weight, _, labels = draw(12, 8, 41)
    labels = torch.where(labels < 0, 3, labels).view(4, 3)
    mine = rows_of(rank, (30, 11) if world == 2 else (30, 0, 11))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    advantages, old = torch.tensor([1.0, -0.5, 2.0, -1.0]), torch.full((4, 3), -3.0)

    def losses(head: Tensor, leaf: Tensor, group: Any) -> Tensor:
        policy = {"advantages": advantages, "mask": mask, "old_logprobs": old, "ref_logprobs": old, "tp_group": group}
        states = leaf.view(4, 3, 8)
        total = PolicyLoss.preset("grpo").from_hidden(states, head, labels, **policy).loss
        total = total + PolicyLoss.preset("gspo", entropy_coef=0.1).from_hidden(states, head, labels, **policy).loss
        preference = PreferenceLoss.preset("sigmoid")
        options = {"ref_logprobs": old, "tp_group": group}
        total = total + preference.from_hidden(states, head, labels, mask, **options).loss
        return total + linear_token_logprobs(leaf, head, labels.view(-1), tp_group=group).logprobs.mean()

    results = []
    for head, group in ((weight, None), (weight[mine], dist.group.WORLD)):
        leaf, shard = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        value = losses(shard, leaf, group)
        value.backward()
        results.append((value.detach(), leaf.grad, shard.grad if group else shard.grad[mine]))
    for whole_result, parts in zip(*results, strict=True):
        assert torch.allclose(whole_result, parts, rtol=1e-5, atol=1e-6)


def check_subgroups(rank: int, world: int) -> None:
    """Ranks of a group count from 0 within it, and a group of one rank is the whole head."""
    tensors = draw(13, 6, 10)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    result = linear_token_logprobs_parallel(tensors[0], tensors[1], tensors[3], group=alone)
    torch.testing.assert_close(tuple(result), tuple(linear_token_logprobs(tensors[0], tensors[1], tensors[3])))
    last = dist.new_group([world - 2, world - 1])
    if rank >= world - 2:
        held = rows_of(rank - (world - 2), (6, 4))
        result = linear_token_logprobs_parallel(tensors[0], tensors[1][held], tensors[3], group=last)
        torch.testing.assert_close(tuple(result), tuple(linear_token_logprobs(tensors[0], tensors[1], tensors[3])))
    else:
        with pytest.raises(TypeError, match="that holds this process"):
            linear_token_logprobs_parallel(tensors[0], tensors[1], tensors[3], group=last)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[str]]]:
    """Return the function from a number of processes to what went wrong in them; each group runs once."""
    found: dict[int, dict[str, list[str]]] = {}

    def outcome(world: int) -> dict[str, list[str]]:
        if world not in found:
            directory: Path = tmp_path_factory.mktemp(f"world{world}")
            found[world] = run_checks(world, CHECKS, directory)
        return found[world]

    return outcome


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("world", [2, 3])
def test_group(world: int, check: str, outcomes: Callable[[int], dict[str, list[str]]]) -> None:
    failures = outcomes(world)[check]
    assert not failures, "\n".join(failures)


def test_a_group_is_needed() -> None:
    hidden, weight, _, labels = draw(13, 6, 10)
    with pytest.raises(RuntimeError, match="init_process_group"):
        linear_token_logprobs_parallel(hidden, weight, labels, group=None)
