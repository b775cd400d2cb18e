"""Log-probs over the tokens that a sampler left, and of logits rounded as an engine rounds them."""

from __future__ import annotations

import math

import pytest
import torch
from memory import MemoryWatch
from oracle import assert_as_accurate
from torch import Tensor
from vocabulary_cases import BACKENDS, upstream

import fastrl
from fastrl import TokenLogprobs, linear_token_logprobs, reference, token_logprobs, top_k_top_p_allowed
from fastrl.ops.sampling import TILE_ROWS, disallowed

NAMES = ("logprobs", "entropy", "logsumexp")
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "scale": {"logit_scale": -0.5, "temperature": 0.6},
    "softcap": {"logit_scale": 0.5, "softcap": 3.0, "temperature": 0.6},
}
FORMS = ("mask", "bits", "ids")


def in_form(mask: Tensor, form: str) -> Tensor:
    """Return a mask (..., V) as itself, as words of 32 bits or as ids padded with -1."""
    vocabulary = mask.shape[-1]
    if form == "mask":
        return mask
    if form == "bits":
        padded = torch.nn.functional.pad(mask, (0, -vocabulary % 32)).unflatten(-1, (-1, 32)).long()
        words = (padded << torch.arange(32)).sum(-1)
        return torch.where(words >= 2**31, words - 2**32, words).int()
    ids = torch.where(mask, torch.arange(vocabulary), vocabulary).sort(-1).values[..., : int(mask.sum(-1).max())]
    return torch.where(ids == vocabulary, -1, ids)


def draw(n: int = 70, vocabulary: int = 77, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, labels and sets that hold the live labels; sets of one token and of all are among them."""
    generator = torch.Generator().manual_seed(n * vocabulary)
    logits = (3.0 * torch.randn(n, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    mask = torch.rand(n, vocabulary, generator=generator) < 0.3
    mask[torch.arange(n), labels] = True
    mask[3], mask[4] = True, torch.arange(vocabulary) == labels[4]
    labels[::7] = -100
    mask[7] = False
    return logits, labels, mask


def total(outputs: tuple[Tensor, ...], n: int, dtype: torch.dtype) -> Tensor:
    return sum((g.to(dtype) * x).sum() for g, x in zip(upstream(n), outputs, strict=True))  # type: ignore[return-value]


def exact(logits: Tensor, labels: Tensor, mask: Tensor, dtype: torch.dtype, **options: float) -> dict[str, Tensor]:
    leaf = logits.detach().to(dtype).requires_grad_()
    outputs = reference.token_logprobs(leaf, labels, **options, allowed=mask)  # type: ignore[arg-type]
    total(outputs, len(labels), dtype).backward()
    return dict(zip(NAMES, outputs, strict=True)) | {"logits": leaf.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS)
def test_logits_over_a_set(options: str, form: str, backend: str) -> None:
    logits, labels, mask = draw()
    leaf = logits.clone().requires_grad_()
    got = token_logprobs(leaf, labels, backend=backend, allowed=in_form(mask, form), **OPTIONS[options])
    total(got, len(labels), torch.float32).backward()
    want = exact(logits, labels, mask, torch.float64, **OPTIONS[options])
    eager = exact(logits, labels, mask, torch.float32, **OPTIONS[options])
    for name, value in (*zip(NAMES, got, strict=True), ("logits", leaf.grad)):
        assert_as_accurate(name, value, want[name], eager[name])
    assert not leaf.grad[~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", ["plain", "scale", "softcap"])
@pytest.mark.parametrize("frozen", [False, True])
def test_hidden_states_over_a_set(frozen: bool, options: str, form: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    _, labels, mask = draw(40, 77)
    hidden, weight = torch.randn(40, 12, generator=generator), torch.randn(77, 12, generator=generator)
    grads: dict[torch.dtype, tuple[Tensor, ...]] = {}
    for dtype in (torch.float64, torch.float32):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        outputs = reference.linear_token_logprobs(*leaves, labels, **OPTIONS[options], allowed=mask)  # type: ignore[arg-type]
        (outputs[0].sum() if frozen else total(outputs, 40, dtype)).backward()
        grads[dtype] = (*(x.detach() for x in outputs), leaves[0].grad, leaves[1].grad)  # type: ignore[assignment]
    states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    got = linear_token_logprobs(
        states, head, labels, chunk_tokens=16, backend=backend, allowed=in_form(mask, form), **OPTIONS[options]
    )
    (got.logprobs.sum() if frozen else total(got, 40, torch.float32)).backward()
    found = (*got, states.grad) if frozen else (*got, states.grad, head.grad)
    for name, a, b, c in zip(
        (*NAMES, "hidden", "weight"), found, grads[torch.float64], grads[torch.float32], strict=False
    ):
        assert_as_accurate(name, a, b, c)


@pytest.mark.parametrize("entry", ["logits", "hidden", "hidden, frozen head"])
def test_a_label_outside_its_set(entry: str) -> None:
    """Log-prob -inf and no gradient from it, while entropy and logsumexp keep theirs; refused inside `checked()`."""
    logits, labels, mask = draw(20)
    labels[labels < 0] = 5
    mask[:, [0, 5]] = True
    mask[2, labels[2]] = False
    leaf = logits.clone().requires_grad_()
    head = torch.eye(77).requires_grad_(entry == "hidden")

    def outputs() -> TokenLogprobs:
        if entry == "logits":
            return token_logprobs(leaf, labels, allowed=mask)
        return linear_token_logprobs(leaf, head, labels, allowed=mask, chunk_tokens=8)

    result = outputs()
    assert result.logprobs[2] == -math.inf
    assert bool(result.logprobs[[0, 1, 3]].isfinite().all())
    gradient, entropy = (torch.autograd.grad(outputs()[i].sum(), leaf)[0] for i in range(2))
    assert not gradient[2].any()
    assert gradient[1].any()
    assert entropy[2].any()
    with fastrl.checked(), pytest.raises(ValueError, match=r"labels must be in their allowed sets.*\[\[2\]\]"):
        outputs()


def test_a_set_of_everything_changes_nothing() -> None:
    logits, labels, _ = draw()
    full = token_logprobs(logits, labels, allowed=torch.ones_like(logits, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(full, token_logprobs(logits, labels), strict=True))


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 64, 100])
def test_forms_of_a_set_agree(vocabulary: int) -> None:
    mask = torch.rand(5, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) < 0.5
    mask[0] = True
    for form in FORMS:
        assert torch.equal(disallowed(in_form(mask, form), vocabulary), ~mask)
    assert bool(disallowed(torch.tensor([[-1, vocabulary, 2**40]]), vocabulary).all())


@pytest.mark.parametrize(("rounding", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("restricted", [False, True])
def test_rounded_logits(restricted: bool, rounding: str, dtype: torch.dtype) -> None:
    """The numbers of logits that came rounded; the gradient passes straight through, unrounded."""
    logits, labels, mask = draw()
    sets = {"allowed": mask} if restricted else {}
    leaf, rounded = logits.clone().requires_grad_(), logits.to(dtype).float().requires_grad_()
    got = token_logprobs(leaf, labels, logits_rounding=rounding, **sets)
    want = token_logprobs(rounded, labels, **sets)
    for outputs in (got, want):
        total(outputs, len(labels), torch.float32).backward()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(leaf.grad, rounded.grad)
    plain = token_logprobs(logits, labels, **sets)
    assert not torch.equal(plain.logprobs, got.logprobs)
    head = torch.eye(77).requires_grad_()
    states = logits.clone().requires_grad_()
    linear = linear_token_logprobs(states, head, labels, logits_rounding=rounding, chunk_tokens=16, **sets)
    total(linear, len(labels), torch.float32).backward()
    assert all(torch.equal(a, b) for a, b in zip(linear, got, strict=True))
    assert torch.allclose(states.grad, leaf.grad, rtol=1e-6, atol=1e-7)


def test_views_of_logits_and_leading_shapes() -> None:
    logits, labels, mask = draw(66)
    shaped = logits.view(6, 11, 77).clone().requires_grad_()
    got = token_logprobs(shaped[:, :-1], labels.view(6, 11)[:, :-1], allowed=mask.view(6, 11, 77)[:, :-1])
    want = token_logprobs(logits, labels, allowed=mask)
    assert torch.equal(got.logprobs, want.logprobs.view(6, 11)[:, :-1])
    got.logprobs.sum().backward()
    assert not shaped.grad[:, -1].any()
    heat = torch.linspace(0.5, 2.0, 66)
    hot = token_logprobs(logits, labels, allowed=mask, temperature=heat)
    assert torch.equal(
        hot.logprobs[9:10],
        token_logprobs(logits[9:10], labels[9:10], allowed=mask[9:10], temperature=heat[9:10]).logprobs,
    )
    empty = token_logprobs(logits[:0], labels[:0], allowed=mask[:0])
    assert empty.logprobs.shape == (0,)


def test_no_copy_of_all_logits() -> None:
    n, vocabulary = 1024, 2000
    logits = torch.randn(n, vocabulary, requires_grad=True)
    labels, ids = torch.zeros(n, dtype=torch.int64), torch.arange(8).expand(n, 8)
    backend = "cpu" if "cpu" in BACKENDS else "torch"
    with MemoryWatch() as watch:
        token_logprobs(logits, labels, allowed=ids, backend=backend).logprobs.sum().backward()
    gradient, tile = n * vocabulary * 4, TILE_ROWS * vocabulary * 4
    assert gradient <= watch.peak <= gradient + 2 * tile + 40 * n * 4 + (10 * tile if backend == "torch" else 0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"allowed": [1]}, TypeError, "allowed must be a torch.Tensor or None, got list"),
        ({"allowed": torch.ones(4, 9)}, TypeError, "allowed must be a bool mask .* got torch.float32"),
        (
            {"allowed": torch.ones(4, 8, dtype=torch.bool)},
            ValueError,
            r"a bool mask and must be \(4, 9\), got \(4, 8\)",
        ),
        (
            {"allowed": torch.ones(4, 2, dtype=torch.int32)},
            ValueError,
            r"int32 bitmask and must be \(4, 1\), got \(4, 2\)",
        ),
        (
            {"allowed": torch.ones(3, 2, dtype=torch.int64)},
            ValueError,
            r"int64 ids and must be \(4, 'K'\), got \(3, 2\)",
        ),
        ({"allowed": torch.full((4, 1), 9)}, ValueError, r"ids in \[0, V=9\), padded with -1, got 9 to 9"),
        ({"logits_rounding": "fp8"}, ValueError, "logits_rounding must be one of None, 'bf16', 'fp16', got 'fp8'"),
    ],
)
def test_bad_options_name_what_was_expected(options: dict, error: type, message: str) -> None:  # type: ignore[type-arg]
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(error, match=message):
        token_logprobs(torch.zeros(4, 9), labels, **options)
    with pytest.raises(error, match=message):
        linear_token_logprobs(torch.zeros(4, 3), torch.zeros(9, 3), labels, **options)


def test_sets_of_a_sampler() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -math.inf], [0.0, 0.0, 0.0, 0.0, 0.0]]).log_softmax(-1)
    p = logits.softmax(-1)
    assert top_k_top_p_allowed(logits, top_k=2).tolist() == [[True, True, False, False, False], [True] * 5]
    assert top_k_top_p_allowed(logits)[0].tolist() == [True, True, True, True, False]
    just_two = float(p[0, :2].sum())
    assert top_k_top_p_allowed(logits, top_p=just_two - 1e-4)[0].tolist() == [True, True, False, False, False]
    assert top_k_top_p_allowed(logits, top_p=just_two + 1e-4)[0].tolist() == [True, True, True, False, False]
    assert top_k_top_p_allowed(logits, top_p=1e-9)[0].tolist() == [True, False, False, False, False]
    # Hotter sampling spreads the probability; top-p counts what top-k left.
    assert int(top_k_top_p_allowed(logits, top_p=0.7, temperature=10.0)[0].sum()) == 3
    assert int(top_k_top_p_allowed(logits, top_k=2, top_p=0.7)[0].sum()) == 1
    assert top_k_top_p_allowed(logits.view(2, 1, 5), top_p=0.5, temperature=torch.ones(2, 1)).shape == (2, 1, 5)
    for bad in ({"top_k": 0}, {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"top_k|top_p|temperature"):
            top_k_top_p_allowed(logits, **bad)


def test_log_probs_of_what_was_sampled_from() -> None:
    """The set of the sampler gives the log-probs of the renormalised distribution."""
    logits, labels, _ = draw(60)
    labels = logits.argmax(-1)
    mask = top_k_top_p_allowed(logits, top_k=20, top_p=0.9, temperature=0.8)
    z = (logits.double() / 0.8).masked_fill(~mask, -math.inf).log_softmax(-1)
    got = token_logprobs(logits, labels, temperature=0.8, allowed=mask)
    assert torch.allclose(got.logprobs.double(), z.gather(-1, labels[:, None]).squeeze(-1), atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_masked_row_of_anything_has_no_effect_under_a_set(backend: str, softcap: float | None, bad: float) -> None:
    """The slope of the softcap at NaN is NaN, and must not reach the gradient of a row that does not count."""
    torch.manual_seed(0)
    clean = torch.randn(1, 3, 5)
    dirty = clean.clone()
    dirty[0, 1] = bad
    allowed = torch.ones(1, 3, 5, dtype=torch.bool)
    allowed[..., 4] = False
    found = []
    for logits in (clean, dirty):
        logits.requires_grad_()
        out = fastrl.PolicyLoss.preset("reinforce").from_logits(
            logits, torch.tensor([[0, 1, 2]]), advantages=torch.ones(1), mask=torch.tensor([[1, 0, 1]]),
            softcap=softcap, allowed=allowed, backend=backend,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, logits)
        found.append((out.loss.detach(), gradient))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert bool((found[1][1][0, 1] == 0).all())
