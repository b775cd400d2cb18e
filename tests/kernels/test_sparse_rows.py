"""The kernels of sparse rows: blocks and tails, bits, bad input, and faults that the checks must notice."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from device import DEVICE, on_device
from mutations import Mutation, load, mutated_source
from sparse_cases import OPTIONS, TAIL_MASS, UPSTREAM, assert_bound, draw_logits, find, upstream
from torch import Tensor
from vocabulary_cases import BACKENDS

from fastrl.backends import cpu, torch_rows
from fastrl.ops import sparse_rows
from fastrl_kernels import sparse_rows as triton_kernels
from fastrl_kernels.launch import Tile

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ kernels cannot be built here")
NAN, INF = math.nan, math.inf
RULE = {"tail_mass": 1e-3, "places": 64, "threshold": 2.0**-10, "candidates": 256, "min_entries": 16}


@pytest.fixture(autouse=True)
def few_walkers(poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Share the listed indices among three programs, so that each has several."""
    monkeypatch.setattr(triton_kernels, "WALKERS", 3)


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if "cpu" not in BACKENDS or not cpu.cpu_module().supports_isa(cpu.ISAS.index(request.param)):
        pytest.skip(f"{request.param} cannot run here")
    monkeypatch.setenv("FASTRL_CPU_ISA", request.param)
    return request.param


def lists_of(lists: sparse_rows.Lists) -> list[tuple[int, float, list[int], list[float]]]:
    """Return (count, left, indices, values) of each row."""
    columns = zip(lists.counts.tolist(), lists.left.tolist(), lists.indices, lists.values, strict=True)
    return [(n, left, index[: max(n, 0)].tolist(), value[: max(n, 0)].tolist()) for n, left, index, value in columns]


@pytest.mark.parametrize("vocabulary", [1, 7, 16, 17, 63, 64, 65, 511, 513, 2047, 2049, 5003])
def test_cpp_lists_are_those_of_its_gradient(isa: str, vocabulary: int) -> None:
    logits, labels = draw_logits("mixed", 9, vocabulary)
    for which in UPSTREAM:
        lists, gradient = find("cpu", logits, labels, upstream(which, 9), softcap=25.0 if which == "all" else 0.0)
        for i, (_, _, index, value) in enumerate(lists_of(lists)):
            assert index == sorted(index)
            assert value == gradient[i, index].tolist()
    assert int((lists.counts > 0).sum()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cpp_bits_depend_on_the_row_alone(isa: str, dtype: torch.dtype) -> None:
    logits, labels = draw_logits("mixed", 12, 1501, dtype)
    grads = upstream("entropy", 12)
    whole = lists_of(find("cpu", logits, labels, grads)[0])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    wide = torch.full((12, 1510), NAN, dtype=dtype)
    wide[:, 3:1504] = logits[order]
    shuffled = lists_of(
        find("cpu", wide[:, 3:1504], labels[order], tuple(g if g is None else g[order] for g in grads))[0]
    )  # type: ignore[arg-type]
    assert shuffled == [whole[i] for i in order.tolist()]


@needs_cpu
def test_cpp_errors_say_what_was_expected() -> None:
    logits, labels = draw_logits("mixed", 4, 90)
    outputs, grads = (torch.zeros(4),) * 4, (torch.ones(4), None, None)
    run = cpu.sparse_rows
    with pytest.raises(ValueError, match="logits must be float32 or float64"):
        run(logits.bfloat16(), labels, 1.0, outputs, grads, **RULE)
    with pytest.raises(ValueError, match=r"labels must be \(N,\) and contiguous"):
        run(logits, labels[:3], 1.0, outputs, grads, **RULE)
    with pytest.raises(ValueError, match=r"gradients must be \(N,\) and contiguous"):
        run(logits, labels, 1.0, outputs, (torch.ones(5), None, None), **RULE)
    lists = run(logits, labels, 1.0, outputs, grads, **RULE)
    with pytest.raises(ValueError, match=r"indices must be in \[0, V\)"):
        cpu.sparse_times_matrix(torch.ones(4, dtype=torch.int32), lists[1] * 0 + 90, lists[2], torch.ones(90, 8))
    with pytest.raises(ValueError, match="counts must be at most K"):
        cpu.sparse_accumulate(lists[0] * 0 + 65, lists[1], lists[2], torch.ones(4, 8), torch.ones(90, 8), None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_have_no_list(backend: str) -> None:
    """Labels outside the vocabulary and bad temperatures are dense, hence NaN; ignored rows have no gradient."""
    logits, labels = draw_logits("peaked", 6, 300)
    labels[1], labels[2], labels[3] = 300, -1, -100
    logits[3] = NAN
    heat = torch.tensor([1.0, 1.0, 1.0, 1.0, NAN, -1.0])
    lists, _ = find(backend, logits, labels, (torch.ones(6), None, None), temperature=heat)
    assert lists.counts[1:].tolist() == [-1, -1, 0, -1, -1]
    assert int(lists.counts[0]) > 0
    assert lists.left[1:].tolist() == [0.0] * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_upstream_gradient_selects_nothing(backend: str) -> None:
    """Whatever stands in the row; a label that cannot be goes dense, and is NaN there."""
    logits, labels = draw_logits("peaked", 5, 300)
    logits[1, 7], logits[2, 8] = NAN, INF
    labels[4] = 300
    grads = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    lists, _ = find(backend, logits, labels, (grads, None, None))
    assert lists.counts[1:].tolist() == [0, 0, 0, -1]
    assert int(lists.counts[0]) > 0
    assert lists.left[1:].tolist() == [0.0] * 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, -1e6])
def test_a_common_offset_does_not_matter(offset: float, backend: str) -> None:
    logits, labels = draw_logits("peaked", 4, 300)
    logits = (logits * 8).round() / 8  # so that the offset can be added without rounding
    grads = (torch.ones(4), None, None)
    plain, moved = (lists_of(find(backend, x, labels, grads)[0]) for x in (logits, logits + offset))
    assert [row[2] for row in plain] == [row[2] for row in moved]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    lists, _ = find(backend, torch.zeros(0, 300), torch.zeros(0, dtype=torch.int64), (torch.zeros(0), None, None))
    assert lists.counts.shape == (0,)
    assert sparse_rows.times_matrix(backend, lists, torch.ones(300, 8)).shape == (0, 8)
    total = torch.ones(300, 8)
    sparse_rows.accumulate(backend, lists, torch.ones(0, 8), total, None)
    assert bool((total == 1).all())


@on_device
@pytest.mark.parametrize("vocabulary", [31, 32, 33, 100])
@pytest.mark.parametrize("which", UPSTREAM)
def test_triton_lists_are_those_of_its_gradient(which: str, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several small blocks and a tail; the listed entries have the bits of the gradient that is written."""
    monkeypatch.setattr(triton_kernels, "LIST_TILES", {4: ((2**31, Tile(32, 1)),)})
    logits, labels = draw_logits("mixed", 6, vocabulary)
    labels[0], labels[5] = 0, vocabulary - 1
    lists, gradient = find("triton", logits, labels, upstream(which, 6), softcap=25.0 if which == "all" else 0.0)
    found = lists_of(lists)
    assert any(count > 1 for count, *_ in found)
    for i, (count, _, index, value) in enumerate(found):
        assert count <= 0 or (index[0] == labels[i] and index[1:] == sorted(index[1:]))
        assert value == gradient[i, index].tolist()


@on_device
def test_triton_strided_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "LIST_TILES", {4: ((2**31, Tile(32, 1)),)})
    logits, labels = draw_logits("mixed", 6, 75)
    logits, labels, grads = logits.to(DEVICE), labels.to(DEVICE), (torch.ones(6, device=DEVICE), None, None)
    spread = torch.full((75, 12), NAN, device=DEVICE)
    spread[:, ::2] = logits.t()
    outputs = tuple(torch.zeros(6, device=DEVICE) for _ in range(4))
    plain, strided = (
        sparse_rows.Lists(*triton_kernels.list_entries(x, labels, 1.0, outputs, grads, **RULE))  # type: ignore[arg-type]
        for x in (logits, spread[:, ::2].t())
    )
    assert lists_of(plain) == lists_of(strided)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("places", [2, 9])
def test_a_row_that_takes_more_entries_than_there_are_places_is_dense(places: int, backend: str) -> None:
    """Exactly K entries, the label's included, fit; one more does not."""
    n = 4
    logits = torch.full((n, 200), -40.0)
    for i, heavy in enumerate((places - 2, places - 1, places, places + 5)):
        logits[i, 10 : 11 + heavy] = torch.linspace(0.0, -1.0, 1 + heavy)
    labels = torch.full((n,), 10)
    inverse, scalars = torch.ones(n), {"logit_scale": 1.0, "softcap": 0.0, "ignore_index": -100}
    outputs = sparse_rows_outputs(backend, logits, labels)
    problem = sparse_rows.RowInputs(labels, inverse, outputs, (torch.ones(n), None, None))
    rule = sparse_rows.Rule(1e-3, places, 2.0**-10, 4 * places, 1)
    assert sparse_rows.find(backend, logits, problem, rule, **scalars).counts.tolist() == [places - 1, places, -1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_entries_that_add_up_are_listed(backend: str) -> None:
    """Thirty entries, each of half the mass that may be left out: two of them may go, not more."""
    n = 3
    logits = torch.full((n, 3000), -60.0)
    logits[:, 7] = math.log(1 - 15 * TAIL_MASS)
    logits[:, 100:130] = math.log(0.5 * TAIL_MASS * (1 - 1e-4))
    lists, _ = find(backend, logits, torch.full((n,), 7), (torch.linspace(0.2, 3.0, n), None, None))
    assert bool(((lists.counts >= 29) & (lists.counts <= 47)).all())
    assert bool((lists.left <= TAIL_MASS).all())


def sparse_rows_outputs(backend: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from fastrl.ops.rows import forward_rows

    return forward_rows(backend, logits, labels, torch.ones(logits.shape[0]))


def replaced(name: str, old: str, part: str, by: str) -> Mutation:
    """Return the fault that replaces a part of `old`, which the source has once."""
    assert part in old
    return Mutation(name, old, old.replace(part, by))


TORCH = [
    replaced("residual mass dropped", "torch.zeros_like(rest)), -1) + rest", "+ rest", "+ 0 * rest"),
    replaced("limit without the scale", "limit = tail_mass * scale.unsqueeze(-1)", "tail_mass *", "tail_mass + 0 *"),
    replaced(
        "one entry too few", "(left_after > limit).sum(-1, keepdim=True)", ", keepdim=True)", ", True).sub(1).relu()"
    ),
    replaced("label's entry dropped", "torch.cat((gradient.gather(-1, label), gr", "(gradient", "(0 * gradient"),
    replaced("label counted as left out", "gradient.abs().scatter_(-1, label, 0.0)", ".scatter_(-1, label, 0.0)", ""),
    replaced("entropy's gradient out of the scale", "for grad in grads:\n        if", "grads:", "grads[:1]:"),
    replaced("temperature out of the scale", "abs(logit_scale) * inverse.double()", " * inverse.double()", ""),
    replaced("logit_scale out of the scale", "total * abs(logit_scale) *", " * abs(logit_scale)", ""),
    replaced("the smallest kept", "dim=-1)\n    rest =", "dim=-1", "dim=-1, largest=False"),
]
TRITON = [
    replaced("residual mass dropped", "left = tl.sum(rest.to(tl.float64), 0)", "= tl", "= 0 * tl"),
    replaced(
        "limit without the scale",
        "size *= tl.abs(gradient.scale).to(tl.float64)",
        "tl.abs(gradient.scale).to(tl.float64)",
        "1.0",
    ),
    replaced("what is cut is not counted", "left += tl.sum(tl.where(listed & (magnitudes <= cut)", "<= cut", "< 0"),
    replaced("cut on the other side", "kept = listed & (magnitudes > cut)", ">", "<="),
    replaced("threshold is the limit", "(limit * tl.full((), share, tl.float64))", "share", "1.0"),
    replaced("label listed twice", "index != label, index, threshold", "!= label", ">= 0"),
    replaced("label's entry dropped", "tl.store(values_ptr + out, at_label)", "at_label", "at_label * 0"),
    replaced("one place less", "(n_kept < K)", "K", "K - 1"),
    replaced("entropy's gradient out of the scale", "tl.abs(h).to(tl.float64)", "tl.abs(h)", "(0 * h)"),
    replaced("tail of the row not read", "if (start < V) & (count", "<", ">"),
]


def notices(check: Callable[[], None]) -> bool:
    """Return whether the check fails."""
    try:
        check()
    except (AssertionError, RuntimeError, IndexError):
        return True
    return False


def all_checks(backend: str) -> bool:
    """Return whether one of the checks notices something."""
    cases = [("logprob", "plain"), ("entropy", "softcap"), ("all", "scaled")]
    checks = [lambda case=case: assert_bound(backend, case[0], OPTIONS[case[1]]) for case in cases]
    checks.append(lambda: test_a_row_that_takes_more_entries_than_there_are_places_is_dense(9, backend))
    checks.append(lambda: test_small_entries_that_add_up_are_listed(backend))
    return any(notices(check) for check in checks)


def use(monkeypatch: pytest.MonkeyPatch, module) -> None:  # type: ignore[no-untyped-def]
    functions = sparse_rows._Kernels(module.list_entries, module.times_matrix, module.accumulate)
    monkeypatch.setattr(sparse_rows, "_kernels", lambda backend: functions)


@pytest.mark.parametrize("mutation", TORCH, ids=lambda mutation: mutation.name)
def test_a_fault_in_the_plain_rows_is_noticed(
    mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, load(mutated_source(mutation, (torch_rows,))[1], "faulty_sparse_rows_torch", tmp_path))
    assert all_checks("torch")


@pytest.mark.parametrize("mutation", TRITON, ids=lambda mutation: mutation.name)
def test_a_fault_in_the_triton_rows_is_noticed(
    mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, load(mutated_source(mutation, (triton_kernels,))[1], "faulty_sparse_rows_triton", tmp_path))
    assert all_checks("triton")
