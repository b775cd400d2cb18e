"""Distillation: released trainers' numbers, formulas, gradients in the forward, masks, memory, refusals."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from golden import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MemoryWatch
from oracle import assert_as_accurate, max_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.losses.distillation import (
    distillation_loss,
    distillation_loss_from_logits,
    divergence_rows,
    sampled_distillation_advantages,
)
from fastrl.ops.chunks import CPU_LOGIT_ROWS
from fastrl.ops.fused import ROUNDED_ROWS

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
GOLDEN = [*cases("distillation"), *cases("distillation_linear")]


def run(case: Case, leaves: dict[str, Tensor], **options: Any) -> Any:
    h = case.hyper
    shared = {"beta": h["beta"] or 0.0, "temperature": h["temperature"], **options}
    if case.family == "distillation":
        return distillation_loss_from_logits(
            leaves["student_logits"], leaves["teacher_logits"], leaves["mask"], **shared
        )
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight", "mask")
    caps = {"student_softcap": h["student_softcap"], "teacher_softcap": h["teacher_softcap"]}
    return distillation_loss(*(leaves[name] for name in names), **caps, **shared)


@pytest.mark.parametrize("case", GOLDEN, ids=[case.id for case in GOLDEN])
@pytest.mark.parametrize("chunk_tokens", [None, 4])
def test_golden_float64(case: Case, chunk_tokens: int | None) -> None:
    leaves = case.leaves(torch.float64)
    output = run(case, leaves, chunk_tokens=chunk_tokens)
    constant = 0.0
    if case.hyper["beta"] is None:  # the peer's cross-entropy: the forward KL plus the teacher's entropy
        log_t = torch.log_softmax(leaves["teacher_logits"], -1)
        constant = -(log_t.exp() * log_t).sum(-1)[leaves["mask"] != 0].mean()
    case.check("loss", output.loss + constant)
    output.loss.backward()
    case.check_gradients(leaves)
    if case.metrics:
        total, count = output.metrics["student_entropy"]
        assert float(total) == pytest.approx(case.metrics["student_entropy_sum"], rel=1e-5)
        assert float(count) == float(leaves["mask"].sum())


def eager(s: Tensor, t: Tensor, beta: float) -> Tensor:
    """Per-token divergence of logits by log_softmax and logsumexp, in any dtype."""
    s, t = torch.log_softmax(s, -1), torch.log_softmax(t, -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    if beta in (0.0, 1.0):
        return kl(t, s) if beta == 0.0 else kl(s, t)
    m = torch.logsumexp(torch.stack([s + math.log(1 - beta), t + math.log(beta)]), 0)
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def eager_loss(leaves: dict[str, Tensor], case: Case) -> Tensor:
    h, mask = case.hyper, leaves["mask"] != 0

    def logits(side: str) -> Tensor:
        if case.family == "distillation":
            return leaves[f"{side}_logits"] / h["temperature"]
        z, cap = leaves[f"{side}_hidden"] @ leaves[f"{side}_weight"].T, h[f"{side}_softcap"]
        return (z if cap is None else cap * torch.tanh(z / cap)) / h["temperature"]

    return eager(logits("student"), logits("teacher"), h["beta"] or 0.0)[mask].mean()


@pytest.mark.parametrize("case", GOLDEN, ids=[case.id for case in GOLDEN])
def test_golden_float32(case: Case) -> None:
    """At least as accurate as eager float32, by the oracle's rule."""
    results = []
    for dtype, function in ((torch.float32, run), (torch.float64, eager_loss), (torch.float32, eager_loss)):
        leaves = case.leaves(dtype)
        loss = run(case, leaves).loss if function is run else eager_loss(leaves, case)
        loss.backward()
        results.append((loss, *(leaves[name].grad for name in case.differentiated)))
    for name, *values in zip(("loss", *case.differentiated), *results, strict=True):
        assert_as_accurate(name, *values)


def batch(dtype: torch.dtype = torch.float64, n: tuple[int, ...] = (2, 5), v: int = 13) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    mask = torch.rand(*n, generator=generator) < 0.6
    mask[..., 0] = True
    return {
        "student_hidden": normal(*n, 6),
        "student_weight": normal(v, 6),
        "teacher_hidden": normal(*n, 4),
        "teacher_weight": normal(v, 4),
        "mask": mask,
    }


HEAD = {
    "student_logit_scale": 0.7,
    "teacher_logit_scale": 1.3,
    "student_softcap": 3.0,
    "teacher_softcap": 5.0,
    "temperature": 0.8,
}


def head_logits(x: dict[str, Tensor], side: str, bias: Tensor | None, options: dict[str, float]) -> Tensor:
    z = x[f"{side}_hidden"] @ x[f"{side}_weight"].T
    z = (z if bias is None else z + bias) * options[f"{side}_logit_scale"]
    cap = options[f"{side}_softcap"]
    return cap * torch.tanh(z / cap) / options["temperature"]


@pytest.mark.parametrize("chunk_tokens", [None, 1, 3])
@pytest.mark.parametrize("beta", BETAS)
def test_head_options(beta: float, chunk_tokens: int | None) -> None:
    """Bias, scale, softcap and temperature, in that order: loss, entropy and every gradient against autograd."""
    x = batch()
    bias, teacher_bias = torch.linspace(-1, 1, 13, dtype=torch.float64), torch.linspace(1, -1, 13, dtype=torch.float64)
    leaves = [x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_(), bias.requires_grad_()]
    student = head_logits(x, "student", bias, HEAD)
    want = eager(student, head_logits(x, "teacher", teacher_bias, HEAD), beta)[x["mask"]].mean()
    got = distillation_loss(
        **x, beta=beta, student_bias=bias, teacher_bias=teacher_bias, chunk_tokens=chunk_tokens, **HEAD
    )
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-13)
    for a, b in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    log_probs = torch.log_softmax(student.detach(), -1)
    entropy = torch.where(x["mask"], -(log_probs.exp() * log_probs).sum(-1), 0.0)
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta: float, top_k: int | None) -> None:
    x = batch(n=(3,), v=7)
    leaves = (x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_())

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rest = {k: v for k, v in x.items() if k not in ("student_hidden", "student_weight")}
        return distillation_loss(hidden, weight, **rest, beta=beta, top_k=top_k, student_softcap=4.0).loss

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("top_k", [1, 4, 12])
@pytest.mark.parametrize("beta", BETAS)
def test_top_k_is_the_divergence_of_buckets(beta: float, top_k: int) -> None:
    generator = torch.Generator().manual_seed(5)
    s, t = (torch.randn(4, 13, generator=generator, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    mask = torch.ones(4)
    index = t.topk(top_k, -1).indices
    log_s, log_t = torch.log_softmax(s, -1), torch.log_softmax(t, -1)

    def buckets(p: Tensor) -> Tensor:
        kept = p.gather(-1, index)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1).log()

    want = eager(buckets(log_s.exp()), buckets(log_t.exp()), beta).mean()
    got = distillation_loss_from_logits(s, t, mask, beta=beta, top_k=top_k).loss
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, s), torch.autograd.grad(want, s), rtol=1e-9, atol=1e-11)
    whole = distillation_loss_from_logits(s, t, mask, beta=beta).loss
    assert got <= whole + 1e-12
    assert torch.equal(distillation_loss_from_logits(s, t, mask, beta=beta, top_k=13).loss, whole)


@pytest.mark.parametrize("beta", BETAS)
def test_logits_and_hidden_agree(beta: float) -> None:
    x = batch()
    logits = x["student_hidden"] @ x["student_weight"].T, x["teacher_hidden"] @ x["teacher_weight"].T
    one = distillation_loss(**x, beta=beta, temperature=1.7)
    other = distillation_loss_from_logits(*logits, x["mask"], beta=beta, temperature=1.7)
    torch.testing.assert_close(one.loss, other.loss)
    torch.testing.assert_close(one.entropy, other.entropy)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_masked_data_cannot_matter(beta: float, poison: float) -> None:
    def grads(dirty: bool) -> list[Tensor]:
        x = batch(torch.float32)
        if dirty:
            for side in ("student_hidden", "teacher_hidden"):
                x[side] = x[side].masked_fill(~x["mask"][..., None], poison)
        leaves = [x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_()]
        output = distillation_loss(**x, beta=beta)
        z, t = (x[f"{s}_hidden"] @ x[f"{s}_weight"].T for s in ("student", "teacher"))
        z = z.detach().requires_grad_()
        by_logits = distillation_loss_from_logits(z, t, x["mask"], beta=beta)
        return [
            output.loss.detach(),
            output.entropy,
            *torch.autograd.grad(output.loss, leaves),
            by_logits.loss.detach(),
            *torch.autograd.grad(by_logits.loss, z),
        ]

    for clean, dirty in zip(grads(False), grads(True), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("beta", BETAS)
def test_banned_entries(beta: float) -> None:
    """-inf on both sides: loss and gradients equal the ones without these entries in the vocabulary."""
    generator = torch.Generator().manual_seed(6)
    s, t = (torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    banned = torch.tensor([True, False, True, False, False, False, False, False, True])
    want_s = s[:, ~banned].clone().requires_grad_()
    want = eager(want_s, t[:, ~banned], beta).mean()
    got_s = s.masked_fill(banned, -math.inf).requires_grad_()
    for top_k in (None, 8):
        got = distillation_loss_from_logits(
            got_s, t.masked_fill(banned, -math.inf), torch.ones(4), beta=beta, top_k=top_k
        )
        torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=1e-13)
        (grad,) = torch.autograd.grad(got.loss, got_s)
        torch.testing.assert_close(grad[:, ~banned], torch.autograd.grad(want, want_s, retain_graph=True)[0])
        assert bool((grad[:, banned] == 0).all())
        assert bool(got.entropy.isfinite().all())


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_teacher_bans_alone(beta: float) -> None:
    s = torch.randn(3, 6, generator=torch.Generator().manual_seed(7)).requires_grad_()
    t = torch.zeros(3, 6)
    t[:, 2] = -math.inf
    loss = distillation_loss_from_logits(s, t, torch.ones(3), beta=beta).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(s.grad.isfinite().all())
    with torch.no_grad():
        assert float(distillation_loss_from_logits(s, t, torch.ones(3), beta=1.0).loss) == math.inf


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_no_loss(beta: float) -> None:
    s = (30.0 * torch.randn(4, 50, generator=torch.Generator().manual_seed(8))).requires_grad_()
    loss = distillation_loss_from_logits(s, s.detach().clone(), torch.ones(4), beta=beta).loss
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert float(s.grad.abs().max()) < 1e-6
    if beta in (0.0, 1.0):
        assert float(loss.detach()) == 0.0
        assert float(s.grad.abs().max()) == 0.0


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_common_offset(beta: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(9)
    s, t = ((torch.randn(4, 40, generator=generator) + offset) for _ in range(2))

    def judged(dtype: torch.dtype, function: Any) -> tuple[Tensor, ...]:
        leaf = s.to(dtype).requires_grad_()
        loss = function(leaf, t.to(dtype))
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    got = judged(torch.float32, lambda a, b: distillation_loss_from_logits(a, b, torch.ones(4), beta=beta).loss)
    exact, plain = (judged(dtype, lambda a, b: eager(a, b, beta).mean()) for dtype in (torch.float64, torch.float32))
    for values in zip(got, exact, plain, strict=True):
        assert_as_accurate("offset", *values)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_close_models(beta: float) -> None:
    """The rounding of the normalisers does not reach the KL of nearly equal models: under half of eager's error."""
    generator = torch.Generator().manual_seed(10)
    s = 3.0 * torch.randn(32, 2000, generator=generator)
    t = s + 1e-3 * torch.randn(32, 2000, generator=generator)
    exact = eager(s.double(), t.double(), beta)
    value = divergence_rows(s.clone(), t.clone(), beta, None, False).divergence
    assert max_error(value, exact) < 0.5 * max_error(eager(s, t, beta), exact)


def test_live_nan_stays_visible() -> None:
    s, t = torch.zeros(2, 5), torch.zeros(2, 5)
    s[0, 1] = math.nan
    for beta in BETAS:
        assert bool(distillation_loss_from_logits(s, t, torch.ones(2), beta=beta).loss.isnan())


# --- the autograd contract --------------------------------------------------------------------------------------------


def test_upstream_factor_and_second_backward() -> None:
    x = batch()
    leaves = [x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_()]
    loss = distillation_loss(**x, beta=0.3).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    twice = torch.autograd.grad(2.5 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(once, twice, again, strict=True):
        torch.testing.assert_close(2.5 * a, b, rtol=1e-14, atol=0)
        assert torch.equal(a, c)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(distillation_loss(**x, beta=0.3).loss, leaves, create_graph=True)


def test_only_the_asked_gradients() -> None:
    x = batch()
    x["teacher_hidden"].requires_grad_()
    x["teacher_weight"].requires_grad_()
    for wanted in ("student_hidden", "student_weight"):
        leaves = {k: v.detach().clone() for k, v in x.items()}
        leaves[wanted].requires_grad_()
        distillation_loss(**leaves, beta=0.5).loss.backward()
        assert [k for k, v in leaves.items() if v.grad is not None] == [wanted]
    assert not distillation_loss(**x, beta=0.5).loss.requires_grad


class Storages(TorchDispatchMode):
    """Record the shapes of all tensors that are made, and the most bytes that were alive at once in large ones."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest
        self.shapes: set[tuple[int, ...]] = set()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.shapes.add(tuple(x.shape))
                self.watch(x.untyped_storage())
        return result

    def watch(self, storage: Any) -> None:
        key = storage._cdata
        if storage.nbytes() >= self.smallest and key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("top_k", [None, 5])
def test_no_vocabulary_sized_temporary(top_k: int | None, frozen: bool, beta: float) -> None:
    """No tensor of N x V elements nor gradient of a frozen head is made. Ten tiles of chunk x V and a bit suffice."""
    # More than one block of `chunk_logits`: a view of the whole head would look like its gradient.
    n, v, chunk = 64, CPU_LOGIT_ROWS + 77, 8
    x = batch(torch.float32, (n,), v)
    x["student_hidden"].requires_grad_()
    x["student_weight"].requires_grad_(not frozen)
    tile = 4 * chunk * v
    caps = {"student_softcap": 5.0, "teacher_softcap": 5.0}
    with Storages(smallest=tile // 8) as storages:
        distillation_loss(**x, beta=beta, chunk_tokens=chunk, top_k=top_k, **caps).loss.backward()
    assert int(x["mask"].sum()) > 2 * chunk
    assert max(math.prod(shape) for shape in storages.shapes if v in shape) == chunk * v
    assert ((v, 6) in storages.shapes) is not frozen
    gradients = 0 if frozen else 3 * 4 * v * 6
    assert storages.peak <= 10.5 * tile + gradients


@pytest.mark.parametrize("n", [(0,), (2, 0), (2, 3)])
def test_nothing_to_learn_from(n: tuple[int, ...]) -> None:
    x = batch(torch.float32, (2, 3))
    hidden = torch.full((*n, 6), math.nan).requires_grad_()
    weight = x["student_weight"].requires_grad_()
    teacher = torch.full((*n, 4), math.nan)
    output = distillation_loss(hidden, weight, teacher, x["teacher_weight"], torch.zeros(n), beta=0.5)
    output.loss.backward()
    assert torch.equal(output.loss.detach(), torch.tensor(0.0))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    logits = torch.full((*n, 13), math.nan).requires_grad_()
    loss = distillation_loss_from_logits(logits, logits.detach(), torch.zeros(n), beta=0.5).loss
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_split_invariance() -> None:
    x = batch()
    count = int(x["mask"].sum())
    rows = [{k: v[i] if k in ("student_hidden", "teacher_hidden", "mask") else v for k, v in x.items()} for i in (0, 1)]
    parts = sum(distillation_loss(**part, beta=0.4, n_tokens=count).loss for part in rows)
    torch.testing.assert_close(parts, distillation_loss(**x, beta=0.4).loss, rtol=1e-13, atol=0)


def test_half_precision() -> None:
    """A bfloat16 student is projected and compared in float32. Its gradients come back in bfloat16."""
    x = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch(torch.float32).items()}
    leaves = [x["student_hidden"].requires_grad_(), x["student_weight"].requires_grad_()]
    exact_x = {k: v.detach().double() if v.is_floating_point() else v for k, v in x.items()}
    exact_leaves = [exact_x["student_hidden"].requires_grad_(), exact_x["student_weight"].requires_grad_()]
    loss, exact = distillation_loss(**x, beta=0.5).loss, distillation_loss(**exact_x, beta=0.5).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-7)
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, exact_leaves), strict=True):
        assert got.dtype == torch.bfloat16
        assert_as_accurate("gradient", got, want, want.bfloat16())


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(1, 12),
    chunk=st.integers(1, 10),
    beta=st.sampled_from(BETAS),
    seed=st.integers(0, 999),
)
def test_logits_of_any_size_and_stride(n: int, v: int, chunk: int, beta: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(2, n + 1, v, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, n, generator=generator) < 0.7
    leaf = s.requires_grad_()
    got = distillation_loss_from_logits(leaf[:, :-1], t[:, 1:], mask, beta=beta, chunk_tokens=chunk).loss
    count = max(int(mask.sum()), 1)
    want = torch.where(mask, eager(leaf[:, :-1], t[:, 1:], beta), 0.0).sum() / count
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(got, leaf), torch.autograd.grad(want, leaf), rtol=1e-10, atol=1e-13)


def test_sampled_advantages() -> None:
    student = torch.tensor([-1.0, -2.0], requires_grad=True)
    teacher = torch.tensor([-0.5, -3.0])
    advantages = sampled_distillation_advantages(student, teacher)
    assert advantages.tolist() == [0.5, -1.0]
    assert not advantages.requires_grad
    with pytest.raises(ValueError, match=r"teacher_logprobs must have shape \(2,\), got \(1,\)"):
        sampled_distillation_advantages(student, teacher[:1])


def test_refusals() -> None:
    x = batch()
    refusals = [
        ("share a vocabulary, got V=13 and V=12", {"teacher_weight": x["teacher_weight"][:12]}),
        ("teacher_hidden must be", {"teacher_hidden": x["teacher_hidden"][:, :4]}),
        (r"mask must have shape \(2, 5\)", {"mask": x["mask"][:, :4]}),
        ("mask must hold only 0 and 1", {"mask": 0.5 * x["mask"]}),
        ("weight must be", {"student_weight": x["student_weight"][:, :5]}),
        ("beta must be", {"beta": 1.5}),
        ("beta must be", {"beta": math.nan}),
        ("temperature must be", {"temperature": 0.0}),
        ("softcap must be", {"student_softcap": -1.0}),
        ("logit_scale must not be 0", {"teacher_logit_scale": 0.0}),
        ("top_k must be", {"top_k": 0}),
        ("chunk_tokens must be", {"chunk_tokens": 0}),
    ]
    for message, change in refusals:
        with pytest.raises(ValueError, match=message):
            distillation_loss(**({**x, "beta": 0.5} | change))
    for name in ("teacher_hidden", "teacher_weight"):
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got list"):
            distillation_loss(**{**x, "beta": 0.5, name: x[name].tolist()})
    with pytest.raises(ValueError, match="share a vocabulary"):
        distillation_loss_from_logits(torch.zeros(2, 5), torch.zeros(2, 6), torch.ones(2), beta=0.5)
    with pytest.raises(ValueError, match="teacher_logits must be"):
        distillation_loss_from_logits(torch.zeros(2, 5), torch.zeros(3, 5), torch.ones(2), beta=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backward_copies_no_gradient(dtype: torch.dtype) -> None:
    """It scales float32 in place and allocates the results in another dtype. A kept graph keeps its gradient."""
    n, dim, vocabulary = 32, 64, 4000
    leaves = [torch.randn(n, dim).to(dtype).requires_grad_(), torch.randn(vocabulary, dim).to(dtype).requires_grad_()]
    teacher = torch.randn(n, dim), torch.randn(vocabulary, dim)
    allowed = 0 if dtype == torch.float32 else vocabulary * dim * 2 + ROUNDED_ROWS * dim * 4

    def formed() -> Tensor:
        return distillation_loss(*leaves, *teacher, torch.ones(n), beta=0.5).loss

    for factor in (1.0, 0.3):
        loss = factor * formed()
        with MemoryWatch() as watch:
            scaled = torch.autograd.grad(loss, leaves)
        assert watch.peak <= allowed + 64 * 1024
        kept = factor * formed()
        first = torch.autograd.grad(kept, leaves, retain_graph=True)
        for x in first:
            x.zero_()
        for a, b in zip(torch.autograd.grad(kept, leaves), scaled, strict=True):
            assert torch.equal(a, b)
            assert a.any()


def test_the_backward_of_logits_copies_no_gradient() -> None:
    made = torch.randn(16, 4000, requires_grad=True)
    loss = 0.3 * distillation_loss_from_logits(made, torch.randn(16, 4000), torch.ones(16), beta=0.5).loss
    with MemoryWatch() as watch:
        torch.autograd.grad(loss, made)
    assert watch.peak <= 16 * 1024


@pytest.mark.parametrize("entry", ["hidden", "logits"])
def test_float16_survives_the_loss_scale(entry: str) -> None:
    """Gradients below float16's smallest number are there once the loss scale has multiplied them."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 16, generator=generator), 0.25 * torch.randn(200, 16, generator=generator)
    teacher = torch.randn(12, 16, generator=generator), 0.25 * torch.randn(200, 16, generator=generator)

    def gradients(dtype: torch.dtype, factor: float) -> list[Tensor]:
        given = [hidden, weight] if entry == "hidden" else [hidden @ weight.t()]
        other = teacher if entry == "hidden" else (teacher[0] @ teacher[1].t(),)
        leaves = [x.half().to(dtype).requires_grad_() for x in given]
        function = distillation_loss if entry == "hidden" else distillation_loss_from_logits
        others = [x.half().to(dtype) for x in other]
        (factor * function(*leaves, *others, torch.ones(12), beta=0.5, n_tokens=1e8).loss).backward()
        return [x.grad for x in leaves]

    scale = 2.0**28
    exact, eager = gradients(torch.float64, scale), gradients(torch.float32, scale)
    for got, want, plain in zip(gradients(torch.float16, scale), exact, eager, strict=True):
        assert got.dtype == torch.float16
        assert_as_accurate("gradient", got, want, plain)
    assert not any(bool(x.any()) for x in gradients(torch.float16, 1.0))
