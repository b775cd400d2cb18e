"""Rows of the gradient as short lists: the bound on every row against float64, and what the lists may not change."""

import math

import pytest
import torch
from memory import MemoryWatch
from oracle import assert_as_accurate
from sparse_cases import (
    OPTIONS,
    TAIL_MASS,
    UPSTREAM,
    assert_bound,
    dense_of,
    draw_logits,
    exact_gradient,
    find,
    row_scale,
    upstream,
)
from torch import Tensor
from vocabulary_cases import BACKENDS

from fastrl import PolicyLoss, PreferenceLoss, linear_token_logprobs, reference
from fastrl.backends import cpu
from fastrl.ops import sparse_rows
from fastrl.ops.chunks import Chunks
from fastrl.ops.fused import fused_gradient
from fastrl.ops.gradients import Gradients
from fastrl.ops.head import LinearRows
from fastrl_kernels import sparse_rows as kernels


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few Triton programs share the listed indices: each walks several, and the interpreter has less to do."""
    monkeypatch.setattr(kernels, "WALKERS", 5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", UPSTREAM)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_bound_holds_on_every_row(options: dict[str, float], which: str, backend: str) -> None:
    """What a list leaves out, in sum, is `left` times the row's scale, and that is at most tail_mass times it."""
    assert_bound(backend, which, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "share"), [("peaked", 1.0), ("flat", 0.0)])
def test_peaked_rows_are_sparse_and_flat_rows_are_dense(kind: str, share: float, backend: str) -> None:
    logits, labels = draw_logits(kind, 12, 3000)
    grads = (torch.ones(12), None, None)
    rows, tile = find(backend, logits, labels, grads)
    assert float((rows.counts > 0).float().mean()) == share
    want = exact_gradient(logits, labels, grads)
    if kind == "flat":
        eager = exact_gradient(logits, labels, grads).float()
        assert_as_accurate("dlogits", tile, want, eager, dtype=torch.float32)
        assert bool((rows.left == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_few_entries_as_the_mass_allows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the smallest entries listed it would leave out too much, unless only `min_entries` are listed.

    Triton's cut is at a size with 8 bits, so that entries within 1 % of each other stay or go together.
    """
    monkeypatch.setattr(sparse_rows, "PLACES", {"cpu": ((1.0, 1024, 6),)})
    logits, labels = draw_logits("mixed", 12, 3000)
    rows, _ = find(backend, logits, labels, (torch.ones(12), None, None))
    p = torch.softmax(logits.double(), -1)
    checked = 0
    least = sparse_rows.rule_for(TAIL_MASS, 3000, logits.device).min_entries
    for i, count in enumerate(rows.counts.tolist()):
        if count > least + 1:
            others = p[i, rows.indices[i, :count].long()][rows.indices[i, :count] != labels[i]]
            smallest = others[others <= 1.01 * others.min()].sum()
            assert float(rows.left[i]) + float(smallest) > TAIL_MASS * (1 - 1e-6)
            checked += 1
    assert checked > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_finite_go_dense(backend: str) -> None:
    logits, labels = draw_logits("peaked", 6, 400)
    logits[1, 7] = math.nan
    logits[2] = -math.inf
    grads = torch.ones(6)
    grads[3] = math.nan
    grads[4] = math.inf
    rows, tile = find(backend, logits, labels, (grads, None, None))
    assert rows.counts[1:5].tolist() == [-1] * 4
    assert bool(tile[1].isnan().all() and tile[2].isnan().all() and tile[3].isnan().all())
    assert not bool(tile[4].isfinite().all())
    assert bool((rows.counts[[0, 5]] > 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_entries_and_rows_without_a_gradient(backend: str) -> None:
    logits, labels = draw_logits("peaked", 6, 400)
    banned = torch.arange(400) % 2 == 0
    banned[labels] = False
    logits[:, banned] = -math.inf
    grads = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    rows, _ = find(backend, logits, labels, (grads, None, None))
    assert bool((rows.counts[grads != 0] > 0).all())
    assert bool((rows.counts[grads == 0] == 0).all())
    assert bool(rows.values.new_tensor([float(rows.left[i]) for i in range(6)]).isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 17, 65])
def test_small_vocabularies(vocabulary: int, backend: str) -> None:
    logits, labels = draw_logits("mixed", 9, vocabulary)
    grads = (torch.ones(9), None, None)
    rows, tile = find(backend, logits, labels, grads)
    error = (dense_of(rows, tile).double() - exact_gradient(logits, labels, grads)).abs().sum(-1)
    assert bool((error <= rows.left + 1e-5).all())
    assert rows.indices.shape[1] <= vocabulary


def test_backends_list_the_same_entries() -> None:
    logits, labels = draw_logits("mixed", 12, 3000)
    results = {name: find(name, logits, labels, (torch.ones(12), None, None))[0] for name in BACKENDS}
    plain = results["torch"]
    for name, other in results.items():
        assert torch.equal(plain.counts < 0, other.counts < 0)
        for i, count in enumerate(plain.counts.clamp(min=0).tolist()):
            wanted = set(plain.indices[i, :count].tolist())
            listed = set(other.indices[i, : max(0, int(other.counts[i]))].tolist())
            assert wanted == listed or (name == "triton" and wanted < listed)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels cannot be built here")
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.cpu_module().supports_isa(cpu.ISAS.index(isa)):
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv("FASTRL_CPU_ISA", isa)
    logits, labels = draw_logits("mixed", 24, 1501, dtype)
    grads = upstream("entropy", 24)
    rows, tile = find("cpu", logits, labels, grads)
    scale = row_scale(torch.ones(24), grads, 1.0)
    error = (dense_of(rows, tile).double() - exact_gradient(logits, labels, grads)).abs().sum(-1)
    assert bool((error <= rows.left * scale + (1e-4 if dtype == torch.float32 else 1e-12)).all())
    matrix, states = torch.randn(1501, 37, dtype=dtype), torch.randn(24, 37, dtype=dtype)
    assert_products("cpu", rows, matrix, states)


def assert_products(backend: str, rows: sparse_rows.Lists, matrix: Tensor, states: Tensor) -> None:
    lists = torch.zeros(rows.counts.shape[0], matrix.shape[0], dtype=rows.values.dtype)
    for i, count in enumerate(rows.counts.tolist()):
        if count > 0:
            lists[i, rows.indices[i, :count].long()] = rows.values[i, :count]
    got = sparse_rows.times_matrix(backend, rows, matrix)
    wide = matrix.to(lists.dtype)
    assert_as_accurate("product", got, lists.double() @ matrix.double(), lists @ wide)
    total, sums = torch.ones_like(wide), torch.ones(matrix.shape[0], dtype=lists.dtype)
    sparse_rows.accumulate(backend, rows, states, total, sums)
    assert_as_accurate("total", total, 1 + lists.double().t() @ states.double(), 1 + lists.t() @ states)
    assert_as_accurate("sums", sums, 1 + lists.double().sum(0), 1 + lists.sum(0))
    alone = torch.ones_like(sums)
    sparse_rows.accumulate(backend, rows, states, None, alone)
    assert torch.equal(alone, sums)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [1, 37])
def test_products_of_the_lists(dim: int, dtype: torch.dtype, backend: str) -> None:
    logits, labels = draw_logits("mixed", 7, 300)
    labels[:] = labels[0]  # an index with an entry in every row
    rows, _ = find(backend, logits, labels, (torch.ones(7), None, None))
    generator = torch.Generator().manual_seed(dim)
    matrix = torch.randn(300, dim, generator=generator).to(dtype)
    assert_products(backend, rows, matrix, torch.randn(7, dim, generator=generator))


# --- the operation ----------------------------------------------------------------------------------------------------


def draw_head(n: int, dim: int = 16, vocabulary: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (hidden, weight, bias, labels): hidden states from short to long, so that rows go from flat to peaked."""
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(vocabulary, dim, generator=generator)
    hidden = torch.randn(n, dim, generator=generator) * torch.linspace(0.2, 6.0, n).unsqueeze(-1)
    bias = torch.randn(vocabulary, generator=generator)
    labels = (hidden @ weight.t()).argmax(-1)
    labels[::4] = torch.randint(0, vocabulary, (labels[::4].numel(),), generator=generator)
    labels[::7] = -100
    order = torch.randperm(n, generator=generator)
    return hidden[order], weight, bias, labels[order]


def gradients(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    needs: str,
    dtype: torch.dtype | None = None,
    entropy: float = 0.0,
    **options,  # type: ignore[no-untyped-def]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    hidden, weight, bias, labels = tensors
    leaves = {k: v for k, v in (("hidden", hidden), ("weight", weight), ("bias", bias)) if v is not None}
    leaves = {k: v.detach().clone().to(dtype or v.dtype).requires_grad_(k in needs.split()) for k, v in leaves.items()}
    given = (leaves["hidden"], leaves["weight"], labels)
    if dtype == torch.float64:
        outputs = reference.linear_token_logprobs(*given, leaves.get("bias"), **options)
    else:
        outputs = linear_token_logprobs(*given, bias=leaves.get("bias"), **options)
    g = torch.linspace(0.5, 1.5, labels.numel(), dtype=outputs[0].dtype)
    ((g * outputs[0]).sum() + (entropy * outputs[1].sum() if entropy else 0.0)).backward()
    return tuple(x.detach() for x in outputs), {k: v.grad for k, v in leaves.items() if v.requires_grad}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["hidden", "weight", "hidden weight bias"])
@pytest.mark.parametrize("entropy", [0.0, 0.4])
def test_the_bound_of_the_gradients(needs: str, entropy: float, backend: str) -> None:
    """Row by row: dhidden_t errs by tail_mass scale max |W_v|, dW_v by tail_mass sum_t scale_t |x_t| at most."""
    n = 24
    tensors = draw_head(n)
    hidden, weight, _, labels = tensors
    options = {"temperature": 0.8, "softcap": 60.0}
    outputs, got = gradients(
        tensors, needs, backend=backend, tail_mass=TAIL_MASS, chunk_tokens=16, entropy=entropy, **options
    )
    plain, exact = gradients(tensors, needs, backend=backend, chunk_tokens=16, entropy=entropy, **options)
    _, want = gradients(tensors, needs, torch.float64, entropy=entropy, **options)
    assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
    live = labels != -100
    scale = torch.where(live, (torch.linspace(0.5, 1.5, n) + entropy) / 0.8, 0.0).double()
    left = TAIL_MASS * scale
    bounds = {
        "hidden": left.unsqueeze(-1) * weight.double().norm(dim=-1).max(),
        "weight": (left * hidden.double().norm(dim=-1)).sum(),
        "bias": left.sum(),
    }
    for name, value in got.items():
        error = (value.double() - want[name]).norm(dim=-1 if value.dim() == 2 else 0)
        rounding = 4.0 * (exact[name].double() - want[name]).norm(dim=-1 if value.dim() == 2 else 0)
        assert bool((error <= bounds[name].squeeze() + rounding + 1e-5).all())
        assert not torch.equal(value, exact[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["hidden", "hidden weight bias"])
def test_zero_is_the_exact_path_bit_for_bit(needs: str, backend: str) -> None:
    tensors = draw_head(20)
    first = gradients(tensors, needs, backend=backend, chunk_tokens=8)
    zero = gradients(tensors, needs, backend=backend, chunk_tokens=8, tail_mass=0.0)
    assert all(torch.equal(first[1][name], zero[1][name]) for name in first[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", ["hidden", "hidden weight bias"])
def test_the_same_bits_every_time(needs: str, backend: str) -> None:
    tensors = draw_head(24)
    first, second = (
        gradients(tensors, needs, backend=backend, chunk_tokens=16, tail_mass=TAIL_MASS)[1] for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels cannot be built here")
def test_the_lists_do_not_depend_on_the_threads() -> None:
    logits, labels = draw_logits("mixed", 64, 3000)
    states, matrix = torch.randn(64, 24), torch.randn(3000, 24)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            rows, _ = find("cpu", logits, labels, (torch.ones(64), None, None))
            total = torch.zeros(3000, 24)
            sparse_rows.accumulate("cpu", rows, states, total, None)
            results.append((rows.counts, rows.left, sparse_rows.times_matrix("cpu", rows, matrix), total))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_cannot_matter(backend: str) -> None:
    hidden, weight, bias, labels = draw_head(24)
    poisoned = hidden.clone()
    poisoned[labels == -100] = math.nan
    how = {"backend": backend, "chunk_tokens": 16, "tail_mass": TAIL_MASS}
    clean = gradients((hidden, weight, bias, labels), "hidden weight bias", **how)[1]
    dirty = gradients((poisoned, weight, bias, labels), "hidden weight bias", **how)[1]
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_stays_visible_and_alone(backend: str) -> None:
    hidden, weight, _, labels = draw_head(30)
    row = int((labels != -100).nonzero()[3])
    hidden[row, 2] = math.nan
    how = {"backend": backend, "chunk_tokens": 16, "tail_mass": TAIL_MASS}
    got = gradients((hidden, weight, None, labels), "hidden", **how)[1]["hidden"]
    assert bool(got[row].isnan().all())
    assert bool(torch.cat((got[:row], got[row + 1 :])).isfinite().all())


def test_dense_rows_of_several_chunks_share_their_gemms() -> None:
    """Dense rows wait until they fill a chunk: here one in each of ten chunks, and two products of one shape."""
    n, vocabulary, dim = 160, 600, 8
    hidden, weight, _, _ = draw_head(n, dim, vocabulary)
    hidden = hidden / hidden.norm(dim=-1, keepdim=True) * 25
    hidden[::16] *= 0.01
    labels = (hidden @ weight.t()).argmax(-1)
    chunks = Chunks.of(LinearRows.checked(hidden, weight, labels, chunk_tokens=16, tail_mass=0.01, backend="torch"))
    held = Gradients(chunks, (True, True, False))
    shapes = []
    add = held.add_rows
    held.add_rows = lambda index, states, dlogits: (shapes.append(tuple(dlogits.shape)), add(index, states, dlogits))  # type: ignore[method-assign]
    for rows, states, logits in chunks:
        outputs = chunks.forward_rows(rows, logits)
        held.take(rows, states, logits, outputs, (torch.ones_like(outputs[0]), None, None))
    held.flush()
    assert shapes == [(16, vocabulary)]  # filled up with rows of zeros
    assert (int(held.sparse.stats.sparse), int(held.sparse.stats.dense)) == (150, 10)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels cannot be built here")
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_is_two_chunks_beside_the_gradients(frozen: bool) -> None:
    n, dim, vocabulary, chunk = 512, 8, 4000, 32
    hidden, weight, _, labels = draw_head(n, dim, vocabulary)
    hidden.requires_grad_()
    weight.requires_grad_(not frozen)
    with MemoryWatch() as watch:
        result = linear_token_logprobs(hidden, weight, labels, chunk_tokens=chunk, tail_mass=1e-4, backend="cpu")
        result.logprobs.sum().backward()
    tile, head = chunk * vocabulary * 4, vocabulary * dim * 4
    lists = chunk * max(sparse_rows.LEAST_PLACES, vocabulary // sparse_rows.VOCABULARY_PER_PLACE) * 8
    assert watch.peak <= 2 * tile + lists + (0 if frozen else head) + 8 * n * dim * 4


def test_the_fused_gradient_is_that_of_the_operation() -> None:
    hidden, weight, bias, labels = draw_head(40)
    rows = LinearRows.checked(hidden, weight, labels, bias=bias, chunk_tokens=16, tail_mass=TAIL_MASS, backend="torch")
    g = torch.linspace(0.5, 1.5, 40)
    stats = sparse_rows.SparseStats(hidden.device)
    every = (True, True, True)
    _, _, got, _ = fused_gradient(rows, every, lambda lp, e, block, at: (g[at], None), stats=stats)
    want = gradients(
        (hidden, weight, bias, labels), "hidden weight bias", backend="torch", chunk_tokens=16, tail_mass=TAIL_MASS
    )[1]
    assert all(torch.equal(a, b) for a, b in zip(got, want.values(), strict=True))
    assert int(stats.sparse) + int(stats.dense) == int((labels != -100).sum())
    assert int(stats.sparse) > 0
    assert int(stats.dense) > 0
    assert 0 < float(stats.left) <= TAIL_MASS


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.0, ValueError, r"tail_mass must be in \[0, 1\)"),
        (-0.1, ValueError, "tail_mass must be finite and >= 0"),
        (math.nan, ValueError, "tail_mass must be finite"),
        (math.inf, ValueError, "tail_mass must be finite"),
        (True, TypeError, "tail_mass must be a number"),
        ("0.1", TypeError, "tail_mass must be a number"),
        (None, TypeError, "tail_mass must be a number"),
    ],
)
def test_bad_tail_mass_is_refused_by_name(value: object, error: type, message: str) -> None:
    hidden, weight, labels = torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(error, match=message):
        linear_token_logprobs(hidden, weight, labels, tail_mass=value)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        PolicyLoss.preset("reinforce").from_hidden(
            hidden, weight, labels, advantages=torch.ones(2), mask=torch.ones(2), tail_mass=value,
            cu_seqlens=torch.tensor([0, 2]),
        )  # fmt: skip


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunk_tokens", [16, 8])
def test_policy_loss_from_hidden(preset: str, frozen: bool, chunk_tokens: int) -> None:
    """The loss is exact, its gradient within the bound of its own coefficients.

    Whole sequences are up to four chunks of 8 rows; half of them flat are more dense rows than wait for a product.
    """
    hidden, weight, _, labels = draw_head(40)
    if chunk_tokens == 8:
        hidden[::2] *= 0.01
    labels = torch.where(labels == -100, 0, labels)
    mask = torch.ones(4, 10)
    mask[1, 6:] = 0
    results = []
    for tail_mass in (0.0, TAIL_MASS):
        leaf, head = hidden.view(4, 10, 16).clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        output = PolicyLoss.preset(preset).from_hidden(
            leaf, head, labels.view(4, 10), mask=mask, advantages=torch.tensor([1.0, -1.0, 0.5, 2.0]),
            tail_mass=tail_mass, chunk_tokens=chunk_tokens, backend="torch",
        )  # fmt: skip
        output.loss.backward()
        results.append((output.loss.detach(), leaf.grad, head.grad))
    assert torch.equal(results[0][0], results[1][0])
    largest = results[0][1].abs().max()
    assert 0 < float((results[0][1] - results[1][1]).abs().max()) <= 20 * TAIL_MASS * float(largest)
    if not frozen:
        assert float((results[0][2] - results[1][2]).abs().max()) <= 20 * TAIL_MASS * float(results[0][2].abs().max())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("loss", ["gspo", "kl_cov", "sigmoid", "aot"])
def test_metrics_of_every_path(loss: str, frozen: bool) -> None:
    """Also of losses that take the log-probs first; the backward fills in what it is the first to know."""
    hidden, weight, _, labels = draw_head(40)
    labels = torch.where(labels == -100, 0, labels).view(4, 10)
    mask = torch.ones(4, 10)
    mask[1, 6:] = 0
    options = {"chunk_tokens": 16, "backend": "torch", "tail_mass": TAIL_MASS}
    given = (hidden.view(4, 10, 16).requires_grad_(), weight.requires_grad_(not frozen), labels)
    reference = torch.full((4, 10), -3.0)
    if loss in ("sigmoid", "aot"):
        output = PreferenceLoss.preset(loss).from_hidden(*given, mask, ref_logprobs=reference, **options)
    else:
        inputs = {"mask": mask, "advantages": torch.tensor([1.0, -1.0, 0.5, 2.0]), "ref_logprobs": reference}
        output = PolicyLoss.preset(loss).from_hidden(*given, **inputs, **options)
    in_backward = not frozen and loss in ("kl_cov", "aot")
    assert (output.metrics["sparse/rows"][1] == 0) == in_backward
    output.loss.backward()
    sparse, rows = output.metrics["sparse/rows"]
    largest, one = output.metrics["sparse/left_max"]
    assert rows == 36
    assert 0 < sparse < rows
    assert 0 < largest <= TAIL_MASS
    assert one == 1
    assert sparse_rows.current_sparse_stats() is None


@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_metrics_of_the_policy_loss(preset: str) -> None:
    """Sparse rows among those with a gradient, the largest mass left out, and the GEMM units that are left."""
    hidden, weight, _, labels = draw_head(40)
    labels = torch.where(labels == -100, 0, labels)
    mask = torch.ones(4, 10)
    mask[1, 6:] = 0
    inputs = {"mask": mask, "advantages": torch.tensor([1.0, -1.0, 0.0, 2.0])}
    options = {"chunk_tokens": 16, "backend": "torch"}
    given = (hidden.view(4, 10, 16).requires_grad_(), weight.requires_grad_(), labels.view(4, 10))
    output = PolicyLoss.preset(preset).from_hidden(*given, **inputs, **options, tail_mass=TAIL_MASS)
    sparse, rows = output.metrics["sparse/rows"]
    largest, one = output.metrics["sparse/left_max"]
    assert rows == 26  # a third sequence has advantage 0 and no gradient
    assert 0 < sparse < rows
    assert 0 < largest <= TAIL_MASS
    assert one == 1
    units, count = output.metrics["path/gemm_units"]
    assert units / count == pytest.approx(1 + 2 * float(rows - sparse) / 36)
    exact = PolicyLoss.preset(preset).from_hidden(*given, **inputs, **options)
    assert not {"sparse/rows", "sparse/left_max"} & set(exact.metrics)
    assert float(exact.metrics["path/gemm_units"][0]) == 3.0
