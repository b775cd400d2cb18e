"""Preference losses: released trainers' numbers, formulas written out, gradients, masks, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from golden import Case, cases, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor

from fastrl.losses.preference import PreferenceLoss

PAIRED = [name for name in PreferenceLoss.presets() if not PreferenceLoss.preset(name).unpaired]
UNPAIRED = [name for name in PreferenceLoss.presets() if PreferenceLoss.preset(name).unpaired]
CONTRACT = [
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "cpo",
    "simpo",
    "alphapo",
    "orpo",
    "kto",
    "bco",
    "apo_zero_unpaired",
]
SCORE_FIELDS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def shift_of(name: str) -> dict[str, float]:
    return {"reference_point": 0.3} if name == "kto" else {}


# --- golden -----------------------------------------------------------------------------------------------------------


def loss_of(case: Case) -> PreferenceLoss:
    """Return the loss that a golden case's neutral hyper-parameters describe."""
    h = {k: v for k, v in case.hyper.items() if v is not None}
    name = h.pop("loss")
    for note in ("reduce", "layout", "reference_point", "baseline", "score"):
        h.pop(note, None)
    if case.family == "preference_scores" and not h.pop("reference", False):
        name = {"odds_ratio": "orpo", "sigmoid": "alphapo" if h.get("alpha") else "cpo"}.get(name, name)
        if name in ("hinge", "ipo"):
            h["reference"] = False
        elif name != "simpo" and name != "alphapo":
            h.pop("alpha", None)
    if isinstance(name, list):
        return PreferenceLoss.mixture([(part, weight) for part, weight in name], beta=h["beta"])
    if name == "kto_even":
        return PreferenceLoss.preset("kto", style="openrlhf", beta=h["beta"])
    if name == "ipo" and case.variant == "ipo":
        return PreferenceLoss.preset("ipo", style="openrlhf", beta=h["beta"])
    return PreferenceLoss.preset(name, **h)


def run_tokens(case: Case, leaves: dict[str, Tensor]) -> tuple[PreferenceLoss, object]:
    loss = loss_of(case)
    rows = slice(None)
    if case.hyper["layout"] == "interleaved":
        n = leaves["logprobs"].shape[0]
        rows = [*range(0, n, 2), *range(1, n, 2)]
    extra = {}
    if loss.unpaired:
        extra["desirable"] = leaves["label"]
        if loss.name == "kto":
            extra |= {"kl_logprobs": leaves["kl_logprobs"], "kl_ref_logprobs": leaves["kl_ref_logprobs"]}
    if "log_sum_squared_probs" in leaves:
        extra["log_sum_squared_probs"] = leaves["log_sum_squared_probs"]
    return loss, loss.from_logprobs(
        leaves["logprobs"][rows], leaves["mask"][rows], leaves["ref_logprobs"][rows], **extra
    )


def run_scores(case: Case, leaves: dict[str, Tensor]) -> tuple[PreferenceLoss, object]:
    loss = loss_of(case)
    if "logps" in leaves:
        wins = leaves["label"].bool()
        pairs = [leaves["logps"][wins], leaves["logps"][~wins], leaves["ref_logps"][wins], leaves["ref_logps"][~wins]]
        return loss, loss(*pairs, reference_point=leaves["kl_baseline"])
    extra = {}
    if "previous_rewards" in leaves:
        ratios = [leaves[f"{side}_logps"] - leaves[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
        extra["baseline"] = torch.cat([leaves["previous_rewards"], *(loss.beta * r.detach() for r in ratios)]).mean()
        case.check("baseline", extra["baseline"])
    return loss, loss(*(leaves.get(name) for name in SCORE_FIELDS), **extra)


RUNNERS: dict[str, Callable] = {"preference": run_tokens, "preference_scores": run_scores}
GOLDEN = [case for family in RUNNERS for case in cases(family)]


@pytest.mark.parametrize("case", GOLDEN, ids=[case.id for case in GOLDEN])
def test_golden_float64(case: Case) -> None:
    leaves = case.leaves(torch.float64)
    loss, output = RUNNERS[case.family](case, leaves)
    case.check("loss", output.loss)
    output.loss.backward()
    case.check_gradients(leaves)
    for side in ("chosen", "rejected"):
        if f"{side}_rewards" in case.outputs and loss.name != "orpo":
            total, _ = output.metrics[f"rewards/{side}"]
            case.check(f"{side}_rewards", total, case.outputs[f"{side}_rewards"].sum())
    names = {
        "chosen_reward_mean": "rewards/chosen",
        "rejected_reward_mean": "rewards/rejected",
        "reward_accuracy": "rewards/accuracies",
        "accuracy": "rewards/accuracies",
        "reward_margin_mean": "rewards/margins",
        "log_odds_ratio_mean": "log_odds_chosen",
    }
    for name, value in case.metrics.items():
        total, count = output.metrics[names[name]]
        assert float(total / count) == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("case", GOLDEN, ids=[case.id for case in GOLDEN])
def test_golden_float32(case: Case) -> None:
    """In float32 the loss and every gradient are as close to float64 as the oracle grants a rounded result."""
    exact_leaves, leaves = case.leaves(torch.float64), case.leaves(torch.float32)
    exact = RUNNERS[case.family](case, exact_leaves)[1].loss
    result = RUNNERS[case.family](case, leaves)[1].loss
    assert result.dtype == torch.float32
    assert_as_accurate("loss", result, exact, exact.float())
    exact.backward()
    result.backward()
    for name in case.differentiated:
        want = exact_leaves[name].grad
        assert_as_accurate(f"grad_{name}", leaves[name].grad, want, want.float())


# --- formulas ---------------------------------------------------------------------------------------------------------


def scores(n: int = 6, scale: float = 3.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    policy = [(-scale * torch.rand(n, generator=generator, dtype=torch.float64) - 0.2) for _ in range(2)]
    ref = [p + torch.randn(n, generator=generator, dtype=torch.float64) for p in policy]
    return [*(p.requires_grad_() for p in policy), *ref]


def ls(z: Tensor) -> Tensor:
    return F.logsigmoid(z)


# Name -> (options, loss per pair), from the papers: w, x are the log-ratios of the chosen and the rejected completion,
# c, r their log-probs, rc, rr the reference's.
FORMULAS: dict[str, tuple[dict, Callable[..., Tensor]]] = {
    "sigmoid": ({"beta": 0.4}, lambda w, x, **_: -ls(0.4 * (w - x))),
    "sigmoid_norm": ({"beta": 0.4}, lambda w, x, **_: -ls(0.4 * (w - x))),
    "hinge": ({"beta": 0.7}, lambda w, x, **_: (1 - 0.7 * (w - x)).clamp(min=0)),
    "ipo": ({"beta": 0.2}, lambda w, x, **_: (w - x - 2.5) ** 2),
    "robust": (
        {"beta": 0.4, "label_smoothing": 0.2},
        lambda w, x, **_: (-0.8 * ls(0.4 * (w - x)) + 0.2 * ls(-0.4 * (w - x))) / 0.6,
    ),
    "exo_pair": (
        {"beta": 0.4, "label_smoothing": 0.05},
        lambda w, x, **_: (
            torch.sigmoid(0.4 * (w - x)) * (ls(0.4 * (w - x)) - math.log(0.95))
            + torch.sigmoid(-0.4 * (w - x)) * (ls(-0.4 * (w - x)) - math.log(0.05))
        ),
    ),
    "nca_pair": ({"beta": 0.4}, lambda w, x, **_: -ls(0.4 * w) - 0.5 * ls(-0.4 * w) - 0.5 * ls(-0.4 * x)),
    "bco_pair": ({"beta": 0.4}, lambda w, x, **_: -ls(0.4 * w) - ls(-0.4 * x)),
    "sppo_hard": ({"beta": 0.4}, lambda w, x, **_: (w - 1.25) ** 2 + (x + 1.25) ** 2),
    "apo_zero": ({"beta": 0.4}, lambda w, x, **_: 1 - torch.sigmoid(0.4 * w) + torch.sigmoid(0.4 * x)),
    "apo_down": ({"beta": 0.4}, lambda w, x, **_: torch.sigmoid(0.4 * w) + 1 - torch.sigmoid(0.4 * (w - x))),
    "discopop": (
        {"beta": 0.4, "tau": 0.5},
        lambda w, x, **_: (
            -ls(0.4 * (w - x)) * (1 - torch.sigmoid(0.8 * (w - x)))
            + torch.exp(-0.4 * (w - x)) * torch.sigmoid(0.8 * (w - x))
        ),
    ),
    "aot": (
        {"beta": 0.4, "label_smoothing": 0.1},
        lambda w, x, c, r, rc, rr: (
            -0.9 * ls(0.4 * ((c - r).sort().values - (rc - rr).sort().values))
            - 0.1 * ls(-0.4 * ((c - r).sort().values - (rc - rr).sort().values))
        ),
    ),
    "aot_unpaired": ({"beta": 0.4}, lambda w, x, **_: -ls(0.4 * (w.sort().values - x.sort().values))),
    "cpo": (
        {"beta": 0.4, "label_smoothing": 0.1},
        lambda c, r, **_: -0.9 * ls(0.4 * (c - r)) - 0.1 * ls(-0.4 * (c - r)),
    ),
    "simpo": ({"beta": 1.5, "gamma": 0.7}, lambda c, r, **_: -ls(1.5 * (c - r) - 0.7)),
    "alphapo": (
        {"beta": 1.5, "alpha": 0.5},
        lambda c, r, **_: -ls(1.5 * ((1 - c.exp() ** -0.5) / 0.5 - (1 - r.exp() ** -0.5) / 0.5)),
    ),
    "orpo": (
        {"beta": 0.3},
        lambda c, r, **_: -0.3 * ls((c - torch.log1p(-c.exp())) - (r - torch.log1p(-r.exp()))),
    ),
    "kto": (
        {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.6},
        lambda w, x, **_: torch.cat([1.3 * torch.sigmoid(-0.4 * (w - 0.3)), 0.6 * torch.sigmoid(0.4 * (x - 0.3))]),
    ),
    "apo_zero_unpaired": (
        {"beta": 0.4},
        lambda w, x, **_: torch.cat([torch.sigmoid(-0.4 * w), torch.sigmoid(0.4 * x)]),
    ),
    "bco": (
        {"beta": 0.4},
        lambda w, x, **_: torch.cat(
            [
                -ls(0.4 * w - 0.4 * torch.cat([w, x]).mean().detach()),
                -ls(-(0.4 * x - 0.4 * torch.cat([w, x]).mean().detach())),
            ]
        ),
    ),
}


def inputs_of(loss: PreferenceLoss, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors if loss.reference else tensors[:2]


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_formula(name: str) -> None:
    options, formula = FORMULAS[name]
    loss = PreferenceLoss.preset(name, **options)
    rounded = [x.detach().float() for x in scores()]

    def judged(dtype: torch.dtype, run: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        c, r, rc, rr = (x.to(dtype) for x in rounded)
        value = run(c.requires_grad_(), r.requires_grad_(), rc, rr)
        return value.detach(), *torch.autograd.grad(value, (c, r))

    def written(c: Tensor, r: Tensor, rc: Tensor, rr: Tensor) -> Tensor:
        return formula(w=c - rc, x=r - rr, c=c, r=r, rc=rc, rr=rr).mean()

    results = judged(torch.float32, lambda *tensors: loss(*inputs_of(loss, tensors), **shift_of(name)).loss)
    exact, eager = judged(torch.float64, written), judged(torch.float32, written)
    for what, *values in zip(("loss", "grad_chosen", "grad_rejected"), results, exact, eager, strict=True):
        assert_as_accurate(what, *values)
    precise = judged(torch.float64, lambda *tensors: loss(*inputs_of(loss, tensors), **shift_of(name)).loss)
    for got, want in zip(precise, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_every_preset_has_a_formula() -> None:
    assert set(FORMULAS) | {"sft"} == set(PreferenceLoss.presets()) == set(CONTRACT)


DIVERGENCES = {
    "reverse_kl": lambda s: s,
    "forward_kl": lambda s: 1 - torch.exp(-s),
    "js_divergence": lambda s: torch.log(2 * s.exp() / (s.exp() + 1)),
    "alpha_divergence": lambda s: (torch.exp(-0.3 * s) - 1) / -0.3,
}


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "discopop", "ipo"])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_f_divergence(name: str, divergence: str) -> None:
    """A transformed score enters the loss where the log-ratio did."""
    alpha = {"alpha": 0.7} if divergence == "alpha_divergence" else {}
    tensors = scores()
    c, r, rc, rr = tensors
    result = PreferenceLoss.preset(name, f_divergence=divergence, **alpha)(*tensors).loss
    g = DIVERGENCES[divergence]
    exact = PreferenceLoss.preset(name)(g(c - rc), g(r - rr), torch.zeros_like(rc), torch.zeros_like(rr)).loss
    torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)


def test_alpha_divergence_at_its_limit_is_dpo() -> None:
    tensors = scores()
    limit = PreferenceLoss.preset("sigmoid", f_divergence="alpha_divergence", alpha=1.0)(*tensors).loss
    assert torch.equal(limit, PreferenceLoss.preset("sigmoid")(*tensors).loss)


def token_batch(pairs: int = 3, t: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -2.0 * torch.rand(2 * pairs, t, generator=generator, dtype=dtype) - 0.05
    ref = logprobs + 0.3 * torch.randn(2 * pairs, t, generator=generator, dtype=dtype)
    mask = torch.rand(2 * pairs, t, generator=generator) < 0.7
    mask[:, 1] = True
    return logprobs, mask, ref


@pytest.mark.parametrize("name", PAIRED)
def test_tokens_agree_with_sequences(name: str) -> None:
    """from_logprobs is the call on sums with lengths."""
    logprobs, mask, ref = token_batch()
    loss = PreferenceLoss.preset(name)
    refs = ref if loss.reference else None
    n, lengths = 3, mask.sum(1)
    sums = torch.where(mask, logprobs, 0).sum(1)
    ref_sums = torch.where(mask, ref, 0).sum(1)
    pair = [sums[:n], sums[n:], *([ref_sums[:n], ref_sums[n:]] if loss.reference else [])]
    by_sequence = loss(*pair, chosen_lengths=lengths[:n], rejected_lengths=lengths[n:])
    by_token = loss.from_logprobs(logprobs, mask, refs)
    torch.testing.assert_close(by_token.loss, by_sequence.loss, rtol=1e-12, atol=1e-12)
    for key, (total, count) in by_sequence.metrics.items():
        torch.testing.assert_close(by_token.metrics[key][0], total, rtol=1e-10, atol=1e-12)
        assert torch.equal(by_token.metrics[key][1], count)


@pytest.mark.parametrize("name", UNPAIRED)
def test_rows_agree_with_sides(name: str) -> None:
    """Rows with labels, in any order, are the call on the two sides."""
    logprobs, mask, ref = token_batch()
    labels = torch.tensor([True, False, True, True, False, True])
    loss = PreferenceLoss.preset(name, desirable_weight=1.5)
    s, r = torch.where(mask, logprobs, 0).sum(1), torch.where(mask, ref, 0).sum(1)
    sides = loss(s[labels], s[~labels], r[labels], r[~labels], **shift_of(name))
    rows = loss.from_logprobs(logprobs, mask, ref, desirable=labels, **shift_of(name))
    torch.testing.assert_close(rows.loss, sides.loss, rtol=1e-12, atol=1e-12)
    for key, (total, count) in sides.metrics.items():
        torch.testing.assert_close(rows.metrics[key][0], total, rtol=1e-10, atol=1e-12)
        assert torch.equal(rows.metrics[key][1], count)


@pytest.mark.parametrize("normalise", [None, "length", "tokens"])
def test_nll(normalise: str | None) -> None:
    logprobs, mask, ref = token_batch()
    nll = -torch.where(mask, logprobs, 0)[:3]
    counts = mask[:3].sum(1)
    want = {
        None: nll.sum(1).mean(),
        "length": (nll.sum(1) / counts).mean(),
        "tokens": nll.sum() / counts.sum(),
    }[normalise]
    plain = PreferenceLoss.preset("sigmoid").from_logprobs(logprobs, mask, ref).loss
    both = (
        PreferenceLoss.preset("sigmoid", sft_coef=0.7, sft_normalise=normalise).from_logprobs(logprobs, mask, ref).loss
    )
    torch.testing.assert_close(both - plain, 0.7 * want)


def test_mean_scores_with_a_reference() -> None:
    """The mean log-ratio: policy and reference are divided by the same length."""
    logprobs, mask, ref = token_batch()
    one = PreferenceLoss.preset("sigmoid", reduce="mean").from_logprobs(logprobs, mask, ref).loss
    other = PreferenceLoss.preset("sigmoid_norm").from_logprobs(logprobs, mask, ref).loss
    torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


def test_orpo_and_cpo_add_the_nll_where_tokens_are_known() -> None:
    logprobs, mask, _ = token_batch()
    nll = -torch.where(mask, logprobs, 0)[:3].sum() / mask[:3].sum()
    for name in ("orpo", "cpo"):
        with_nll = PreferenceLoss.preset(name).from_logprobs(logprobs, mask).loss
        without = PreferenceLoss.preset(name, sft_coef=0.0).from_logprobs(logprobs, mask).loss
        torch.testing.assert_close(with_nll - without, nll)
    with pytest.raises(ValueError, match="needs chosen_lengths"):
        PreferenceLoss.preset("cpo", sft_coef=1.0)(*scores()[:2])


def test_length_desensitisation() -> None:
    """Tokens beyond the shorter completion of the pair count `ld_alpha`, in the policy and in the reference."""
    logprobs, mask, ref = token_batch()
    n, weights = 3, torch.zeros_like(logprobs)
    for row in range(6):
        shared = min(int(mask[row].sum()), int(mask[(row + n) % (2 * n)].sum()))
        for rank, position in enumerate(mask[row].nonzero().flatten().tolist()):
            weights[row, position] = 1.0 if rank < shared else 0.3
    s, r = (weights * logprobs).sum(1), (weights * ref).sum(1)
    want = PreferenceLoss.preset("sigmoid")(s[:n], s[n:], r[:n], r[n:]).loss
    got = PreferenceLoss.preset("sigmoid", ld_alpha=0.3).from_logprobs(logprobs, mask, ref).loss
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_mixture_is_the_weighted_sum() -> None:
    logprobs, mask, ref = token_batch()
    parts = [("ipo", 0.5), ("exo_pair", 0.3), ("sft", 2.0)]
    mixed = PreferenceLoss.mixture(parts, beta=0.3, label_smoothing=0.02).from_logprobs(logprobs, mask, ref).loss
    options = {"ipo": {}, "exo_pair": {"label_smoothing": 0.02}, "sft": {}}
    apart = sum(
        w * PreferenceLoss.preset(n, beta=0.3, **options[n]).from_logprobs(logprobs, mask, ref).loss for n, w in parts
    )
    torch.testing.assert_close(mixed, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in PreferenceLoss.presets() if n not in ("aot", "aot_unpaired")])
def test_split_invariance(name: str) -> None:
    """Micro-batches with the global counts give the loss and the gradients of the whole."""
    logprobs, mask, ref = token_batch(pairs=4)
    loss = PreferenceLoss.preset(name)
    labels = torch.tensor([True, False] * 4)
    extra = shift_of(name) | ({"baseline": 0.2} if name == "bco" else {})

    def run(rows: list[int], n_pairs: int, n_tokens: int | None) -> tuple[Tensor, Tensor]:
        leaf = logprobs[rows].clone().requires_grad_()
        more = extra | ({"desirable": labels[rows]} if loss.unpaired else {"n_tokens": n_tokens})
        out = loss.from_logprobs(leaf, mask[rows], ref[rows] if loss.reference else None, n_pairs=n_pairs, **more)
        out.loss.backward()
        return out.loss.detach(), leaf.grad

    total = 8 if loss.unpaired else 4
    n_tokens = int(mask[:4].sum())
    whole, whole_grad = run(list(range(8)), total, None)
    first, first_grad = run([0, 1, 4, 5], total, n_tokens)
    second, second_grad = run([2, 3, 6, 7], total, n_tokens)
    torch.testing.assert_close(first + second, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first_grad, whole_grad[[0, 1, 4, 5]], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(second_grad, whole_grad[[2, 3, 6, 7]], rtol=1e-12, atol=1e-14)


# --- gradients, masks, extremes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PreferenceLoss.presets())
def test_gradcheck(name: str) -> None:
    loss = PreferenceLoss.preset(name)
    logprobs, mask, ref = token_batch()
    extra = {"desirable": torch.tensor([True, False] * 3)} if loss.unpaired else {}
    extra |= shift_of(name) | ({"baseline": 0.2} if name == "bco" else {})

    def run(x: Tensor) -> Tensor:
        return loss.from_logprobs(x, mask, ref if loss.reference else None, **extra).loss

    assert torch.autograd.gradcheck(run, (logprobs.requires_grad_(),))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", PreferenceLoss.presets())
def test_masked_data_cannot_matter(name: str, poison: float) -> None:
    loss = PreferenceLoss.preset(name)
    logprobs, mask, ref = token_batch(dtype=torch.float32)
    extra = {"desirable": torch.tensor([True, False] * 3)} if loss.unpaired else {}
    extra |= shift_of(name)

    def run(lp: Tensor, rf: Tensor) -> tuple[Tensor, Tensor, dict]:
        leaf = lp.clone().requires_grad_()
        out = loss.from_logprobs(leaf, mask, rf if loss.reference else None, **extra)
        out.loss.backward()
        return out.loss.detach(), leaf.grad, out.metrics

    clean = run(logprobs, ref)
    dirty = run(logprobs.masked_fill(~mask, poison), ref.masked_fill(~mask, poison))
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert bool((clean[1][~mask] == 0).all())
    assert all(torch.equal(value[0], dirty[2][key][0]) for key, value in clean[2].items())


@pytest.mark.parametrize(
    "options", [{"f_divergence": "forward_kl"}, {"f_divergence": "alpha_divergence", "alpha": 0.2}]
)
def test_f_divergences_are_exact_at_log_ratios_of_sixty(options: dict) -> None:
    c, r = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-70.0, -75.0))
    rc, rr = torch.tensor([-10.0], dtype=torch.float64), torch.tensor([-20.0], dtype=torch.float64)
    got = PreferenceLoss.preset("hinge", **options)(c, r, rc, rr).loss
    power = options.get("alpha", 0.0) - 1.0
    g = [((power * s).exp() - 1.0) / power for s in (c - rc, r - rr)]
    want = torch.relu(1.0 - 0.1 * (g[0] - g[1])).sum()
    assert_as_accurate("loss", got, want, want)
    for x, y in zip(torch.autograd.grad(got, (c, r)), torch.autograd.grad(want, (c, r)), strict=True):
        assert_as_accurate("gradient", x, y, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("difference", [-1e4, 1e4])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in PreferenceLoss.presets() if name != "sft"]
    + [("sigmoid", {"f_divergence": d}) for d in DIVERGENCES]
    + [("hinge", {"f_divergence": d}) for d in DIVERGENCES]
    + [("ipo", {"f_divergence": d}) for d in DIVERGENCES]
    + [("discopop", {"f_divergence": d}) for d in DIVERGENCES],
)
def test_finite_at_huge_differences(name: str, options: dict, difference: float, dtype: torch.dtype) -> None:
    loss = PreferenceLoss.preset(name, **options)
    low, high = torch.full((2,), -1e4, dtype=dtype), torch.full((2,), -1e-3, dtype=dtype)
    c, r = (high, low) if difference > 0 else (low, high)
    tensors = [c.clone().requires_grad_(), r.clone().requires_grad_(), r.clone(), c.clone()]
    out = loss(*inputs_of(loss, tensors), **shift_of(name))
    assert bool(out.loss.isfinite())
    out.loss.backward()
    assert all(bool(x.grad.isfinite().all()) for x in tensors[:2])


@pytest.mark.parametrize("logp", [0.0, -1e-38, -1e-12, -1e-4])
def test_odds_of_a_certain_completion(logp: float) -> None:
    """At p -> 1 of the chosen one the gradient tends to -beta odds_l. It is finite and right up to logp = 0."""
    c = torch.tensor([logp], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([-1.0], dtype=torch.float64)
    PreferenceLoss.preset("orpo", beta=0.5)(c, r).loss.backward()
    odds_l = math.exp(-1.0) / -math.expm1(-1.0)
    assert float(c.grad) == pytest.approx(-0.5 * odds_l, rel=1e-3 if logp == -1e-4 else 1e-9)


@pytest.mark.parametrize("name", PreferenceLoss.presets())
def test_empty_batch(name: str) -> None:
    loss = PreferenceLoss.preset(name)
    logprobs = torch.zeros(0, 5, requires_grad=True)
    mask, ref = torch.zeros(0, 5), torch.zeros(0, 5) if loss.reference else None
    extra = shift_of(name) | ({"desirable": torch.zeros(0, dtype=torch.bool)} if loss.unpaired else {})
    out = loss.from_logprobs(logprobs, mask, ref, **extra)
    assert float(out.loss.detach()) == 0.0
    out.loss.backward()
    assert logprobs.grad is not None


@pytest.mark.parametrize("name", PreferenceLoss.presets())
def test_all_masked_batch(name: str) -> None:
    loss = PreferenceLoss.preset(name)
    logprobs = torch.full((4, 5), math.nan, requires_grad=True)
    ref = torch.full((4, 5), math.nan) if loss.reference else None
    extra = shift_of(name) | ({"desirable": torch.tensor([True, False] * 2)} if loss.unpaired else {})
    out = loss.from_logprobs(logprobs, torch.zeros(4, 5), ref, **extra)
    out.loss.backward()
    assert bool(out.loss.isfinite())
    assert torch.equal(logprobs.grad, torch.zeros_like(logprobs))


def test_live_nan_stays_visible() -> None:
    logprobs, mask, ref = token_batch()
    logprobs[0, 1] = math.nan
    assert bool(PreferenceLoss.preset("sigmoid").from_logprobs(logprobs, mask, ref).loss.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast(dtype: torch.dtype) -> None:
    logprobs, mask, ref = (x.to(dtype) if x.is_floating_point() else x for x in token_batch())
    loss = PreferenceLoss.preset("sigmoid")
    leaf = logprobs.clone().requires_grad_()
    out = loss.from_logprobs(leaf, mask, ref).loss
    out.backward()
    assert out.dtype == torch.float32
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(out.double(), loss.from_logprobs(logprobs.double(), mask, ref.double()).loss)


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.integers(1, 5),
    t=st.integers(1, 6),
    pad=st.integers(0, 4),
    seed=st.integers(0, 1000),
    name=st.sampled_from([n for n in PAIRED if not n.startswith("aot")]),
)
def test_padding_and_order_do_not_matter(pairs: int, t: int, pad: int, seed: int, name: str) -> None:
    logprobs, mask, ref = token_batch(pairs, max(t, 2), seed, torch.float32)
    loss = PreferenceLoss.preset(name)

    def run(lp: Tensor, m: Tensor, rf: Tensor) -> Tensor:
        return loss.from_logprobs(lp, m, rf if loss.reference else None).loss

    whole = run(logprobs, mask, ref)
    padded = [F.pad(x, (0, pad), value=value) for x, value in ((logprobs, math.nan), (mask, False), (ref, math.nan))]
    torch.testing.assert_close(run(*padded), whole, rtol=1e-6, atol=1e-7)
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([order, order + pairs])
    torch.testing.assert_close(run(logprobs[rows], mask[rows], ref[rows]), whole, rtol=1e-6, atol=1e-7)


# --- vocabulary -------------------------------------------------------------------------------------------------------


def vocabulary_batch() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(17, 8, generator=generator, dtype=torch.float64)
    ref_hidden = hidden + 0.1 * torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 17, (4, 5), generator=generator)
    mask = torch.rand(4, 5, generator=generator) < 0.7
    mask[:, 0] = True
    return hidden, weight, ref_hidden, labels, mask


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1)


@pytest.mark.parametrize("path", ["logits", "hidden"])
@pytest.mark.parametrize("name", ["sigmoid", "simpo", "kto", "wpo"])
def test_from_vocabulary(path: str, name: str) -> None:
    """Logits and hidden states give the loss and the gradients of log-probs by log_softmax, masked rows dropped."""
    options = {"use_weighting": True} if name == "wpo" else {}
    loss = PreferenceLoss.preset("sigmoid" if name == "wpo" else name, **options)
    hidden, weight, ref_hidden, labels, mask = vocabulary_batch()
    hidden.requires_grad_()
    temperature = 0.8
    everything = log_softmax(hidden @ weight.T, temperature)
    logprobs = everything.gather(-1, labels[..., None])[..., 0]
    ref = log_softmax(ref_hidden @ weight.T, temperature).gather(-1, labels[..., None])[..., 0]
    rows = {"desirable": torch.tensor([True, False, False, True])} if loss.unpaired else {}
    squared = {"log_sum_squared_probs": (2 * everything).logsumexp(-1)} if name == "wpo" else {}
    want = loss.from_logprobs(logprobs, mask, ref if loss.reference else None, **rows, **squared, **shift_of(name))
    (want_grad,) = torch.autograd.grad(want.loss, hidden)

    poisoned = torch.where(mask[..., None], hidden, math.nan)
    bad_labels = torch.where(mask, labels, 10**6)
    more = ({"desirable": rows["desirable"]} if rows else {}) | shift_of(name) | {"temperature": temperature}
    if path == "logits":
        refs = {"ref_logits": ref_hidden @ weight.T} if loss.reference else {}
        got = loss.from_logits(poisoned @ weight.T, bad_labels, mask, backend="torch", **refs, **more)
    else:
        refs = {"ref_hidden": ref_hidden} if loss.reference else {}
        got = loss.from_hidden(poisoned, weight, bad_labels, mask, backend="torch", **refs, **more)
    torch.testing.assert_close(got.loss, want.loss)
    (grad,) = torch.autograd.grad(got.loss, hidden)
    torch.testing.assert_close(grad, want_grad)
    torch.testing.assert_close(got.logprobs, torch.where(mask, logprobs, 0).detach())
    assert not got.entropy.requires_grad


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {}, "unknown preference loss 'dpo'; known: sigmoid, .*; DPO is 'sigmoid'"),
        ("Sigmoid", {}, "unknown preference loss"),
        ("sigmoid", {"bta": 0.1}, "unknown option 'bta'; known: "),
        ("sigmoid", {"beta": 0.0}, "beta must be"),
        ("sigmoid", {"beta": math.nan}, "beta must be"),
        ("sigmoid", {"style": "verl"}, "style of 'sigmoid' must be one of"),
        ("hinge", {"label_smoothing": 0.1}, "label_smoothing=0.1 does not go with"),
        ("robust", {"label_smoothing": 0.5}, "must be < 0.5"),
        ("robust", {"label_smoothing": 0.7}, "label_smoothing must be"),
        ("exo_pair", {"label_smoothing": 0.0}, "must be > 0"),
        ("nca_pair", {"f_divergence": "forward_kl"}, "f_divergence='forward_kl' does not go with"),
        ("aot", {"f_divergence": "forward_kl"}, "f_divergence"),
        ("sigmoid", {"f_divergence": "kl"}, "f_divergence must be one of 'reverse_kl'"),
        ("simpo", {"f_divergence": "forward_kl"}, "no reference"),
        ("sigmoid", {"alpha": 0.5}, "alpha=0.5 does not go with"),
        ("sigmoid", {"tau": 0.1}, "tau=0.1 does not go with"),
        ("discopop", {"tau": 0.0}, "tau must be"),
        ("apo_zero", {"gamma": 0.5}, "margin=0.5 does not go with"),
        ("sigmoid", {"gamma": 0.5, "margin": 0.5}, "margin was given twice"),
        ("nca_pair", {"score_normalise": "length"}, "score_normalise"),
        ("simpo", {"score_normalise": "length"}, "score_normalise"),
        ("simpo", {"ld_alpha": 0.5}, "length_desensitisation"),
        ("sigmoid", {"desirable_weight": 2.0}, "desirable_weight=2.0"),
        ("kto", {"sft_coef": 1.0}, "sft_coef=1.0"),
        ("kto", {"use_weighting": True}, "weighting='wpo'"),
        ("kto", {"reference": False}, "reference=False"),
        ("sft", {"use_weighting": True}, "weighting='wpo'"),
        ("sigmoid", {"reduce": "max"}, "reduce must be one of"),
        ("sft", {"sft_coef": 0.0}, "at least one term"),
    ],
)
def test_refused_at_construction(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceLoss.preset(name, **options)


def test_mixture_refusals() -> None:
    with pytest.raises(ValueError, match="at least one part"):
        PreferenceLoss.mixture([])
    with pytest.raises(ValueError, match="no part of the mixture has a use for tau"):
        PreferenceLoss.mixture([("sigmoid", 1.0)], tau=0.1)
    with pytest.raises(ValueError, match="plain losses of pairs"):
        PreferenceLoss.mixture([("kto", 1.0)])
    with pytest.raises(ValueError, match="sft_coef does not go with a mixture"):
        PreferenceLoss.mixture([("sigmoid", 1.0)], sft_coef=1.0)


def test_refused_at_call() -> None:
    c, r, rc, rr = scores(4)
    dpo, simpo, kto = (PreferenceLoss.preset(name) for name in ("sigmoid", "simpo", "kto"))
    vanilla = PreferenceLoss.preset("kto", style="openrlhf")
    logprobs, mask, ref = token_batch()
    refusals: list[tuple[str, Callable]] = [
        ("needs ref_chosen_logps and ref_rejected_logps", lambda: dpo(c, r)),
        ("needs ref_chosen_logps", lambda: dpo(c, r, rc)),
        ("reads no reference", lambda: simpo(c, r, rc, rr)),
        (r"rejected_logps must have shape \(4,\), got \(3,\)", lambda: dpo(c, r[:3], rc, rr[:3])),
        (r"must be 1-D.*got shape \(4, 1\)", lambda: dpo(c[:, None], r[:, None], rc, rr)),
        ("chosen_lengths and rejected_lengths go together", lambda: simpo(c, r, chosen_lengths=torch.ones(4))),
        (
            r"chosen_lengths must have shape",
            lambda: simpo(c, r, chosen_lengths=torch.ones(3), rejected_lengths=torch.ones(4)),
        ),
        ("reference_point is not used", lambda: vanilla(c, r, rc, rr, reference_point=0.0)),
        ("n_pairs or n_tokens must be", lambda: dpo(c, r, rc, rr, n_pairs=-1)),
        (r"n_pairs.*got shape \(2,\)", lambda: dpo(c, r, rc, rr, n_pairs=torch.ones(2))),
        (
            r"rejected_lengths must be >= 0, got \[-2\]",
            lambda: simpo(c, r, chosen_lengths=torch.ones(4), rejected_lengths=torch.tensor([3, -2, 1, 1])),
        ),
        (
            r"kl_logprobs must be \(B', T'\)",
            lambda: kto.from_logprobs(
                logprobs, mask, ref, desirable=mask[:, 0], kl_logprobs=ref[0], kl_ref_logprobs=ref[0]
            ),
        ),
        ("baseline is not used", lambda: kto(c, r, rc, rr, reference_point=0.0, baseline=0.0)),
        ("reference_point is for losses of rows", lambda: dpo(c, r, rc, rr, reference_point=0.0)),
        ("needs the tokens", lambda: PreferenceLoss.preset("sigmoid", ld_alpha=0.5)(c, r, rc, rr)),
        ("2P rows", lambda: dpo.from_logprobs(logprobs[:5], mask[:5], ref[:5])),
        (r"mask must have shape \(6, 7\)", lambda: dpo.from_logprobs(logprobs, mask[:, :6], ref)),
        ("mask must hold only 0 and 1", lambda: dpo.from_logprobs(logprobs, 0.5 * mask, ref)),
        ("needs ref_logprobs", lambda: dpo.from_logprobs(logprobs, mask)),
        (r"ref_logprobs must have shape \(6, 7\)", lambda: dpo.from_logprobs(logprobs, mask, ref[:, :6])),
        ("desirable is for losses of rows", lambda: dpo.from_logprobs(logprobs, mask, ref, desirable=mask[:, 0])),
        ("needs desirable=", lambda: kto.from_logprobs(logprobs, mask, ref, reference_point=0.0)),
        ("log_sum_squared_probs goes with", lambda: dpo.from_logprobs(logprobs, mask, ref, log_sum_squared_probs=ref)),
        (
            "kl_logprobs and kl_ref_logprobs",
            lambda: kto.from_logprobs(logprobs, mask, ref, desirable=mask[:, 0], kl_logprobs=ref),
        ),
    ]
    for message, call in refusals:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_global_count_below_one_divides() -> None:
    c, r, rc, rr = scores(1)
    dpo = PreferenceLoss.preset("sigmoid")
    whole = dpo(c, r, rc, rr).loss
    for half in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
        got = dpo(c, r, rc, rr, n_pairs=half).loss
        assert got.shape == ()
        assert got.item() == 2 * whole.item()


def test_kto_without_a_reference_point_takes_the_other_rows() -> None:
    c, r, rc, rr = scores(5)
    w, x = c - rc, r - rr
    want = torch.cat(
        [1 - torch.sigmoid(0.1 * (w - x.mean().relu())), 1 - torch.sigmoid(0.1 * (w.mean().relu() - x))]
    ).mean()
    for style in ("trl", "openrlhf"):
        got = PreferenceLoss.preset("kto", style=style)(c, r, rc, rr).loss
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(got, (c, r)), torch.autograd.grad(want, (c, r), retain_graph=True)
        )


def test_kto_reference_point_of_mismatched_completions() -> None:
    """max(0, mean log-ratio of the mismatched rows), their masked tokens left out, detached."""
    logprobs, mask, ref = token_batch()
    labels, kto = mask[:, 0], PreferenceLoss.preset("kto")
    for sign in (1.0, -1.0):
        kl_ref = logprobs - 0.2 * sign
        kl_logprobs = logprobs.masked_fill(~mask, math.nan).requires_grad_()
        got = kto.from_logprobs(
            logprobs, mask, ref, desirable=labels, kl_logprobs=kl_logprobs, kl_ref_logprobs=kl_ref, kl_mask=mask
        )
        z0 = max(0.0, 0.2 * sign * float(mask.sum()) / 6)
        want = kto.from_logprobs(logprobs, mask, ref, desirable=labels, reference_point=z0)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
        assert not got.loss.requires_grad


def test_metrics() -> None:
    """Sums and counts, so that the quotient of sums over micro-batches is the mean of the whole."""
    logprobs, mask, ref = token_batch(pairs=4)
    loss = PreferenceLoss.preset("sigmoid", beta=0.2)
    metrics = loss.from_logprobs(logprobs, mask, ref).metrics
    s = torch.where(mask, logprobs - ref, 0).sum(1)
    w, x = 0.2 * s[:4], 0.2 * s[4:]
    wanted = {
        "rewards/chosen": w.mean(),
        "rewards/rejected": x.mean(),
        "rewards/margins": (w - x).mean(),
        "rewards/accuracies": (w > x).double().mean(),
        "logps/chosen": torch.where(mask, logprobs, 0).sum(1)[:4].mean(),
        "logps/rejected": torch.where(mask, logprobs, 0).sum(1)[4:].mean(),
        "nll_loss": -logprobs[:4][mask[:4]].mean(),
        "nonfinite": torch.zeros((), dtype=torch.float64),
    }
    assert set(metrics) == set(wanted)
    for name, (total, count) in metrics.items():
        assert not total.requires_grad
        torch.testing.assert_close(total / count, wanted[name])
    logprobs[1, 1] = -math.inf
    assert [float(x) for x in loss.from_logprobs(logprobs, mask, ref).metrics["nonfinite"]] == [1.0, 4.0]


def test_ids_of_golden_families() -> None:
    assert len(ids("preference")) == 26
    assert len(ids("preference_scores")) == 28


def test_labels_is_the_old_name_of_desirable() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = -torch.rand(4, 3, generator=generator), -torch.rand(4, 3, generator=generator)
    rows, mask, kto = torch.tensor([1, 0, 0, 1]), torch.ones(4, 3), PreferenceLoss.preset("kto")
    want = kto.from_logprobs(logprobs, mask, ref, desirable=rows, reference_point=0.1).loss
    assert torch.equal(kto.from_logprobs(logprobs, mask, ref, labels=rows, reference_point=0.1).loss, want)
    with pytest.raises(ValueError, match=r"labels= is the old name of desirable=, got both"):
        kto.from_logprobs(logprobs, mask, ref, desirable=rows, labels=rows, reference_point=0.1)


def test_a_misspelt_input_is_named_before_anything_is_computed() -> None:
    with pytest.raises(TypeError, match="unexpected argument n_pair; known: desirable"):
        PreferenceLoss.preset("sigmoid").from_logits(torch.ones(2, 3, 5), torch.ones(2, 3), torch.ones(2, 3), n_pair=2)
