"""`linear_token_logprobs` on every row backend: accuracy, paths, memory, and what users feed it."""

import math

import pytest
import torch
from memory import MemoryWatch
from oracle import assert_as_accurate
from torch import Tensor
from vocabulary_cases import BACKENDS, upstream, weighted_sum
from vocabulary_cases import draw_head as draw

from fastrl import linear_token_logprobs, reference, token_logprobs
from fastrl.backends.torch_rows import TILE_ROWS
from fastrl.ops.head import CPU_CHUNK_TOKENS

NAMES = ("logprobs", "entropy", "logsumexp", "hidden", "weight", "bias")


def run(tensors: tuple, grads: tuple, needs: str = "hidden weight bias", **options) -> dict[str, Tensor]:  # type: ignore[no-untyped-def,type-arg]
    hidden, weight, bias, labels = tensors
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {k: v.detach().clone().requires_grad_(k in needs.split()) for k, v in leaves.items() if v is not None}
    outputs = linear_token_logprobs(leaves["hidden"], leaves["weight"], labels, bias=leaves.get("bias"), **options)
    weighted_sum(outputs, grads, torch.float32).backward()
    return dict(zip(NAMES, outputs, strict=False)) | {k: v.grad for k, v in leaves.items() if v.requires_grad}


def exact(tensors: tuple, grads: tuple, dtype: torch.dtype, **options) -> dict[str, Tensor]:  # type: ignore[no-untyped-def,type-arg]
    hidden, weight, bias, labels = tensors
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves.items() if v is not None}
    outputs = reference.linear_token_logprobs(leaves["hidden"], leaves["weight"], labels, leaves.get("bias"), **options)
    weighted_sum(outputs, grads, dtype).backward()
    return dict(zip(NAMES, outputs, strict=False)) | {k: v.grad for k, v in leaves.items()}


def judge(tensors: tuple, needs: str, backend: str, grads: tuple | None = None, **options) -> None:  # type: ignore[no-untyped-def,type-arg]
    grads = grads or upstream(tensors[0].shape[0])
    reference_options = {k: v for k, v in options.items() if k != "chunk_tokens"}
    got = run(tensors, grads, needs, backend=backend, **options)
    want = exact(tensors, grads, torch.float64, **reference_options)
    eager = exact(tensors, grads, torch.float32, **reference_options)
    for name, value in got.items():
        dtype = tensors[0].dtype if name in ("hidden", "weight", "bias") else torch.float32
        assert_as_accurate(name, value, want[name], eager[name], dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunk_sizes_beside_the_number_of_rows(chunk: int, backend: str) -> None:
    judge(draw(23, 12, 91), "hidden weight bias", backend, chunk_tokens=chunk)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_head_options(dtype: torch.dtype, backend: str) -> None:
    options = {"temperature": 0.7, "logit_scale": 0.25, "softcap": 5.0}
    judge(draw(20, 16, 300, dtype), "hidden weight bias", backend, chunk_tokens=8, **options)
    hidden, weight, _, labels = draw(20, 16, 300, dtype)
    judge((hidden, weight, None, labels), "hidden weight", backend, chunk_tokens=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_bias_of_a_half_precision_head_is_not_rounded(dtype: torch.dtype, backend: str) -> None:
    hidden, weight, _, labels = draw(20, 16, 300, dtype)
    _, _, bias, _ = draw(20, 16, 300)
    judge((hidden, weight, bias, labels), "hidden weight bias", backend, chunk_tokens=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["hidden", "hidden weight bias"])
def test_a_temperature_for_each_token(needs: str, backend: str) -> None:
    """In both passes, with a frozen head and with one that trains."""
    temperature = torch.linspace(0.4, 2.5, 20)
    judge(draw(20, 16, 300), needs, backend, temperature=temperature, softcap=5.0, chunk_tokens=8)


@pytest.mark.parametrize("needs", ["hidden", "weight", "bias", "hidden weight", "weight bias"])
def test_partial_requires_grad(needs: str) -> None:
    judge(draw(20, 16, 300), needs, "torch", chunk_tokens=8)


@pytest.mark.parametrize("which", range(3), ids=NAMES[:3])
def test_frozen_head_takes_any_function_of_the_outputs(which: int) -> None:
    """The kept token gradients serve the log-prob alone. Entropy and logsumexp form the logits again."""
    grads = tuple(g if i == which else None for i, g in enumerate(upstream(20)))
    judge(draw(20, 16, 300), "hidden", "torch", grads=grads, chunk_tokens=8)


def test_frozen_head_backward_is_a_row_scale() -> None:
    """With a frozen head the backward of the log-prob runs no GEMM."""
    hidden, weight, _, labels = draw(20, 16, 300)
    leaf = hidden.requires_grad_()
    result = linear_token_logprobs(leaf, weight, labels, chunk_tokens=8)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(result.logprobs, leaf, torch.ones(20))
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::mm", "aten::addmm", "aten::matmul", "aten::addmm_"}


def test_frozen_head_holds_no_gradient_buffer_of_the_head() -> None:
    vocabulary, dim = 4096, 8
    hidden, weight, _, labels = draw(64, dim, vocabulary)
    leaf = hidden.requires_grad_()
    with MemoryWatch() as watch:
        linear_token_logprobs(
            leaf, weight, labels, chunk_tokens=16, backend="cpu" if "cpu" in BACKENDS else "torch"
        ).logprobs.sum().backward()
    assert watch.largest <= 16 * vocabulary * 4


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("mode", ["evaluation", "forward", "training", "frozen"])
def test_no_vocabulary_sized_temporary(mode: str, backend: str) -> None:
    """The formula of the docstring: one chunk of logits, the row kernels' tiles, the gradients, and a few (N, D)."""
    n, dim, vocabulary, chunk = 1024, 8, 2000, 64
    hidden, weight, _, labels = draw(n, dim, vocabulary)
    hidden.requires_grad_(mode in ("training", "frozen"))
    weight.requires_grad_(mode == "training")
    with MemoryWatch() as watch, torch.set_grad_enabled(mode != "evaluation"):
        result = linear_token_logprobs(hidden, weight, labels, chunk_tokens=chunk, backend=backend)
        if mode in ("training", "frozen"):
            (result.logprobs.sum() + (result.entropy.sum() if mode == "training" else 0.0)).backward()
    tile, head, states = chunk * vocabulary * 4, vocabulary * dim * 4, n * dim * 4
    rows = 10 * TILE_ROWS * vocabulary * 4 if backend == "torch" else 0
    gradients = head if mode == "training" else 0
    assert tile <= watch.largest < n * vocabulary * 4 / 8
    assert watch.peak <= tile + rows + gradients + 8 * states


def test_masked_rows_never_reach_the_head() -> None:
    hidden, weight, _, labels = draw(300, 8, 50)
    labels[:] = -100
    labels[7] = labels[201] = 3
    poisoned = hidden.clone()
    poisoned[labels == -100] = math.nan
    leaf, head = poisoned.requires_grad_(), weight.clone().requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        result = linear_token_logprobs(leaf, head, labels, chunk_tokens=4)
        (result.logprobs.sum() + result.entropy.sum()).backward()
    products = [e for e in profile.key_averages(group_by_input_shape=True) if e.key == "aten::mm"]
    assert sum(e.count for e in products) == 3
    assert bool(head.grad.isfinite().all())
    assert not leaf.grad[labels == -100].any()
    live = run(
        (hidden[[7, 201]], weight, None, labels[[7, 201]]),
        (torch.ones(2), torch.ones(2), None),
        "hidden weight",
        chunk_tokens=4,
    )
    assert torch.equal(result.logprobs[[7, 201]], live["logprobs"])
    assert torch.equal(leaf.grad[[7, 201]], live["hidden"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rows_bits_do_not_depend_on_the_batch(backend: str) -> None:
    """Fixed tiles of rows: any split, padding or order gives a row the same bits, and so a ratio of exactly 1."""
    hidden, weight, _, labels = draw(300, 64, 257)
    labels[labels == -100] = 5
    whole = linear_token_logprobs(hidden, weight, labels, backend=backend)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    shuffled = linear_token_logprobs(hidden[order], weight, labels[order], backend=backend)
    halves = [
        linear_token_logprobs(hidden[r], weight, labels[r], backend=backend) for r in (slice(0, 131), slice(131, 300))
    ]
    trained = linear_token_logprobs(
        hidden.clone().requires_grad_(), weight.clone().requires_grad_(), labels, backend=backend
    )
    for i in range(3):
        assert torch.equal(whole[i][order], shuffled[i])
        assert torch.equal(whole[i], torch.cat([h[i] for h in halves]))
        assert torch.equal(whole[i], trained[i].detach())
    padded = torch.zeros(CPU_CHUNK_TOKENS, 64)
    padded[:1] = hidden[40:41]
    logits = (padded @ weight.t())[:1]
    assert torch.equal(token_logprobs(logits, labels[40:41], backend=backend).logprobs, whole.logprobs[40:41])


def test_upstream_gradient_scale_and_second_backward() -> None:
    hidden, weight, _, labels = draw(20, 16, 300)
    leaf, head = hidden.requires_grad_(), weight.requires_grad_()
    result = linear_token_logprobs(leaf, head, labels, chunk_tokens=8)
    first = torch.autograd.grad(result.logprobs.sum() * 2.0, (leaf, head), retain_graph=True)
    second = torch.autograd.grad(result.logprobs.sum() * 4.0, (leaf, head))
    assert all(torch.equal(2.0 * a, b) for a, b in zip(first, second, strict=True))
    again = linear_token_logprobs(leaf, head, labels, chunk_tokens=8).logprobs.sum()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(again, leaf, create_graph=True)


def test_bias_that_bans_tokens() -> None:
    hidden, weight, bias, labels = draw(12, 16, 300)
    bias[:200] = -math.inf
    labels[:] = 250
    judge((hidden, weight, bias, labels), "hidden weight", "torch", chunk_tokens=8)
    judge((hidden, weight, bias, labels), "hidden weight", "triton", chunk_tokens=8)


@pytest.mark.parametrize("n", [0, 6])
def test_no_live_rows_give_zeros_that_are_attached(n: int) -> None:
    hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    bias = torch.zeros(9, requires_grad=True)
    result = linear_token_logprobs(hidden, weight, torch.full((n,), -100), bias=bias)
    sum(x.sum() for x in result).backward()
    assert all(not t.grad.any() and t.grad.shape == t.shape for t in (hidden, weight, bias))


def test_leading_shapes_and_per_token_temperature() -> None:
    hidden, weight, _, labels = draw(24, 16, 90)
    temperature = torch.linspace(0.5, 2.0, 24)
    flat = linear_token_logprobs(hidden, weight, labels, temperature=temperature)
    folded = linear_token_logprobs(
        hidden.view(2, 3, 4, 16), weight, labels.view(2, 3, 4), temperature=temperature.view(2, 3, 4)
    )
    assert folded.logprobs.shape == (2, 3, 4)
    assert all(torch.equal(a, b.view(-1)) for a, b in zip(flat, folded, strict=True))
    strided = hidden.view(2, 12, 16).transpose(0, 1)
    other = linear_token_logprobs(strided, weight, labels.view(2, 12).t(), temperature=temperature.view(2, 12).t())
    assert torch.equal(other.entropy.t().reshape(-1), flat.entropy)


def test_mixed_dtypes_are_promoted() -> None:
    hidden, weight, _, labels = draw(8, 16, 90)
    half = linear_token_logprobs(hidden.bfloat16(), weight, labels)
    assert torch.equal(half.logprobs, linear_token_logprobs(hidden.bfloat16().float(), weight, labels).logprobs)
    leaf = hidden.bfloat16().requires_grad_()
    linear_token_logprobs(leaf, weight, labels).logprobs.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


def test_tied_embedding_gets_both_gradients() -> None:
    _, weight, _, labels = draw(10, 16, 90)
    labels[labels == -100] = 1
    table = weight.clone().requires_grad_()
    ids = torch.arange(10)
    linear_token_logprobs(table[ids].tanh(), table, labels).logprobs.sum().backward()
    exact_table = weight.double().requires_grad_()
    reference.linear_token_logprobs(exact_table[ids].tanh(), exact_table, labels)[0].sum().backward()
    assert torch.allclose(table.grad.double(), exact_table.grad, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": torch.zeros(90, 15)}, ValueError, r"weight must be \(V, D=16\), got \(90, 15\)"),
        ({"weight": torch.zeros(0)}, ValueError, "weight is empty.*gather the sharded head"),
        ({"weight": torch.zeros(90, 16).to_sparse()}, TypeError, "weight must be a dense tensor"),
        ({"weight": torch.zeros(90, 16, dtype=torch.int8)}, TypeError, "weight must be float32"),
        ({"weight": torch.zeros(90, 16, device="meta")}, ValueError, "meta"),
        ({"bias": torch.zeros(91)}, ValueError, r"bias must have shape \(90,\), got \(91,\)"),
        ({"labels": torch.zeros(7, dtype=torch.int64)}, ValueError, r"labels must have shape \(8,\), got \(7,\)"),
        ({"labels": torch.full((8,), 90)}, ValueError, r"labels must be in \[0, V=90\)"),
        ({"tail_mass": 1.0}, ValueError, r"tail_mass must be in \[0, 1\)"),
        ({"tp_group": object()}, RuntimeError, "tp_group needs torch.distributed"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be an int >= 1"),
        ({"chunk_tokens": 2.5}, ValueError, "chunk_tokens must be an int >= 1"),
    ],
)
def test_bad_arguments_name_what_was_expected(arguments: dict, error: type, message: str) -> None:
    given = {"hidden": torch.zeros(8, 16), "weight": torch.zeros(90, 16), "labels": torch.zeros(8, dtype=torch.int64)}
    given |= arguments
    with pytest.raises(error, match=message):
        linear_token_logprobs(given.pop("hidden"), given.pop("weight"), given.pop("labels"), **given)


def test_opcheck() -> None:
    hidden, weight, bias, labels = draw(9, 8, 30)
    inv_temperature = torch.ones(9)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(), labels, bias.requires_grad_(), inv_temperature)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (*leaves, 1.0, 0.0, -100, 4, "torch", 0.0, False)
    torch.library.opcheck(torch.ops.fastrl.linear_token_logprobs.default, arguments, test_utils=checks)
