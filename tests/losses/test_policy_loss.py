"""`PolicyLoss`: construction, shapes, values under the mask, empty batches, metrics, and extreme inputs."""

import dataclasses
import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fastrl
from fastrl import PolicyLoss, RolloutCorrection, reference
from fastrl.losses.policy import axes
from fastrl.losses.policy import loss as policy_loss

NEEDS_NOTHING = ("sft", "rft", "dft")


def batch(rows: int = 4, time: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a padded batch with a gap, a fully masked row and ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    logprobs = -draw(rows, time).abs() - 0.1
    lengths = torch.tensor([time, 3, 0, time - 1] * rows)[:rows]
    mask = torch.arange(time) < lengths[:, None]
    mask[0, 2] = False
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.4 * draw(rows, time),
        "ref_logprobs": logprobs + 0.4 * draw(rows, time),
        "rollout_logprobs": logprobs + 0.4 * draw(rows, time),
        "advantages": draw(rows),
        "mask": mask,
        "entropy": draw(rows, time).abs(),
        "scores": draw(rows),
        "group_ids": torch.tensor([0, 0, 1, 1] * rows)[:rows],
    }


def evaluate(loss: PolicyLoss, inputs: dict[str, Tensor], **more: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, d/dlogprobs, d/dentropy)."""
    leaf = inputs["logprobs"].clone().requires_grad_()
    entropy = inputs["entropy"].clone().requires_grad_()
    left = ("logprobs", "entropy") if loss.surrogate == "topr" else ("logprobs", "entropy", "scores")
    others = {k: v for k, v in inputs.items() if k not in left}
    output = loss(leaf, entropy=entropy, **{**others, **more})  # type: ignore[arg-type]
    output.loss.backward()
    zero = torch.zeros_like(leaf)
    return output.loss.detach(), leaf.grad, zero if entropy.grad is None else entropy.grad


@pytest.mark.parametrize("name", PolicyLoss.presets())
def test_every_preset_runs_and_masked_data_cannot_matter(name: str) -> None:
    inputs = batch()
    dirty = {k: v.clone() for k, v in inputs.items()}
    for key, garbage in zip(
        ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy"),
        (math.nan, -math.inf, math.inf, math.nan, math.nan),
        strict=True,
    ):
        dirty[key][~inputs["mask"]] = garbage
    dirty["advantages"] = torch.where(inputs["mask"].any(1), inputs["advantages"], math.nan)
    loss = PolicyLoss.preset(name, entropy_coef=0.01)
    for a, b in zip(evaluate(loss, inputs), evaluate(loss, dirty), strict=True):
        assert torch.equal(a, b)
        assert bool(a.isfinite().all())


def test_presets_listed_by_the_contract_exist() -> None:
    listed = (
        "sft rft dft reinforce rloo gpg ppo grpo dr_grpo dapo bnpo gspo gspo_token gmpo cispo sapo vespo luspo opmd "
        "opmd_sequence topr dppo_tv dppo_kl clip_cov kl_cov"
    )
    assert set(listed.split()) <= set(PolicyLoss.presets())


def test_signatures_of_the_contract() -> None:
    parameters = inspect.signature(PolicyLoss.__call__).parameters
    wanted = (
        "advantages mask old_logprobs ref_logprobs rollout_logprobs entropy n_tokens n_sequences selection group_ids"
    )
    assert set(f"{wanted} scores cu_seqlens".split()) <= set(parameters)
    fields = {field.name: field.default for field in dataclasses.fields(PolicyLoss)}
    defaults = {
        "ratio_level": "token", "ratio_anchor": "old", "log_ratio_clamp": None, "sequence_log_ratio_max": None,
        "surrogate": "clip", "clip_low": 0.2, "clip_high": 0.2, "weight_low": None, "weight_high": None,
        "dual_clip": None, "max_ratio": None, "tau_pos": 1.0, "tau_neg": 1.05, "k_pos": 2, "k_neg": 3, "lambda_pos": 3,
        "lambda_neg": 2, "kl": None, "kl_coef": 0.0, "kl_to": "ref", "kl_gradient": "plain", "kl_log_ratio_clamp": None,
        "kl_value_clamp": None, "kl_ratio_max": None, "kl_ratio_anchor": None, "entropy_coef": 0.0, "correction": None,
        "aggregate": "token_mean", "constant": None,
    }  # fmt: skip
    assert {name: fields[name] for name in defaults} == defaults


EXTRAS = {
    "advantages": PolicyLoss.preset("sft"),
    "old_logprobs": PolicyLoss.preset("reinforce"),
    "ref_logprobs": PolicyLoss.preset("dapo"),
    "rollout_logprobs": PolicyLoss.preset("dapo"),
    "entropy": PolicyLoss.preset("dapo"),
    "group_ids": PolicyLoss.preset("dapo"),
    "n_tokens": PolicyLoss.preset("gspo"),
    "n_sequences": PolicyLoss.preset("dapo"),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_columns_that_a_loss_has_no_use_for_change_nothing_but_are_checked(name: str) -> None:
    inputs, loss = batch() | {"n_tokens": torch.tensor(99.0), "n_sequences": torch.tensor(7.0)}, EXTRAS[name]
    needed = {"mask": inputs["mask"], "advantages": inputs["advantages"], "old_logprobs": inputs["old_logprobs"]}
    needed.pop(name, None)

    def run(**more: Tensor) -> tuple[Tensor, Tensor]:
        leaf = inputs["logprobs"].clone().requires_grad_()
        output = loss(leaf, **needed, **more)
        return output.loss.detach(), torch.autograd.grad(output.loss, leaf)[0]

    for with_it, without in zip(run(**{name: inputs[name]}), run(), strict=True):
        assert torch.equal(with_it, without)
    with pytest.raises((ValueError, TypeError), match=name):
        run(**{name: torch.ones(3, 2, 5)})


@pytest.mark.parametrize("surrogate", [name for name in axes.SURROGATES if name != "topr"])
def test_scores_are_refused_where_nothing_reads_them(surrogate: str) -> None:
    level = "none" if surrogate in axes.OWN_SEQUENCE_RATIO else "token"
    loss, inputs = PolicyLoss(surrogate=surrogate, ratio_level=level), batch()
    given = {"advantages": inputs["advantages"], "mask": inputs["mask"], "old_logprobs": inputs["old_logprobs"]}
    loss(inputs["logprobs"], **given)
    with pytest.raises(ValueError, match=f"scores= is read by surrogate='topr' alone.*'{surrogate}'"):
        loss(inputs["logprobs"], scores=inputs["scores"], **given)


def test_advantages_in_every_accepted_shape_and_no_other() -> None:
    inputs = batch()
    loss = PolicyLoss.preset("grpo")
    want = evaluate(loss, inputs)
    for shaped in (inputs["advantages"].unsqueeze(1), inputs["advantages"].unsqueeze(1).expand(4, 6)):
        for a, b in zip(want, evaluate(loss, inputs, advantages=shaped), strict=True):
            assert torch.equal(a, b)
    for bad in (torch.ones(6), torch.ones(1), torch.ones(()), torch.ones(4, 5), torch.ones(1, 6), torch.ones(6, 4)):
        with pytest.raises(ValueError, match=r"advantages must have shape \(4,\), \(4, 1\) or \(4, 6\), got"):
            evaluate(loss, inputs, advantages=bad)


@pytest.mark.parametrize("name", PolicyLoss.presets())
def test_packed_equals_padded_bit_for_bit(name: str) -> None:
    inputs = batch()
    inputs["mask"][:] = torch.arange(6) < torch.tensor([6, 1, 0, 4])[:, None]
    keep = inputs["mask"]
    loss = PolicyLoss.preset(name, entropy_coef=0.01, **({"constant": 6.0} if name == "dr_grpo" else {}))
    padded = evaluate(loss, inputs)
    per_sequence = ("advantages", "scores", "group_ids")
    packed_inputs = {k: v if k in per_sequence else v[keep] for k, v in inputs.items()}
    packed = evaluate(loss, packed_inputs, cu_seqlens=torch.tensor([0, 6, 7, 7, 11], dtype=torch.int32))
    assert torch.equal(padded[0], packed[0])
    assert torch.equal(padded[1][keep], packed[1])
    assert torch.equal(padded[2][keep], packed[2])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8], ids=str)
def test_mask_dtypes(dtype: torch.dtype) -> None:
    inputs, loss = batch(), PolicyLoss.preset("dapo")
    want = evaluate(loss, inputs)[0]
    assert torch.equal(want, evaluate(loss, inputs, mask=inputs["mask"].to(dtype))[0])


def test_masks_that_mean_nothing_are_refused() -> None:
    inputs, loss = batch(), PolicyLoss.preset("dapo")
    with pytest.raises(ValueError, match="mask must hold only 0 and 1"):
        evaluate(loss, inputs, mask=inputs["mask"].float() * 0.5)
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 6\), got \(4, 7\)"):
        evaluate(loss, inputs, mask=torch.ones(4, 7))
    with pytest.raises(ValueError, match="selection must hold only 0 and 1"):
        evaluate(loss, inputs, selection=torch.full((4, 6), 0.3))


@pytest.mark.parametrize("name", ["grpo", "gspo", "vespo", "gmpo", "sft"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_live_token_gives_zero_that_is_attached(name: str, rows: int) -> None:
    inputs = {k: v[:rows] for k, v in batch().items()}
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    value, gradient, entropy_gradient = evaluate(PolicyLoss.preset(name, entropy_coef=0.1), inputs)
    assert value.item() == 0.0
    assert not gradient.any()
    assert not entropy_gradient.any()


def test_selection_leaves_the_denominator_alone() -> None:
    inputs, loss = batch(), PolicyLoss.preset("dapo")
    selection = torch.tensor([1, 0, 1, 1])
    value, gradient, _ = evaluate(loss, inputs, selection=selection)
    n_live = float(inputs["mask"].sum())
    removed = {k: v.clone() for k, v in inputs.items()}
    removed["mask"][1] = False
    want, want_gradient, _ = evaluate(loss, removed, n_tokens=n_live)
    assert torch.allclose(value, want, rtol=1e-6)
    assert torch.allclose(gradient, want_gradient, rtol=1e-6)
    assert torch.equal(value, evaluate(loss, inputs, selection=selection.unsqueeze(1))[0])
    assert torch.equal(value, evaluate(loss, inputs, selection=selection.unsqueeze(1).expand(4, 6).bool())[0])


@pytest.mark.parametrize("name", ["reinforce", "grpo", "cispo", "sapo", "dppo_tv", "gspo"])
def test_what_the_selection_leaves_out_cannot_poison_the_gradient(name: str) -> None:
    inputs, loss = batch(), PolicyLoss.preset(name)
    inputs["advantages"] = torch.where(torch.arange(4) == 1, math.nan, inputs["advantages"])
    value, gradient, _ = evaluate(loss, inputs, selection=torch.tensor([1, 0, 1, 1]))
    assert bool(value.isfinite())
    assert bool(gradient.isfinite().all())


def test_on_policy_ratio_is_one_and_has_the_reinforce_gradient() -> None:
    inputs = batch()
    del inputs["old_logprobs"]
    value = evaluate(PolicyLoss.preset("ppo"), inputs)
    plain = evaluate(PolicyLoss.preset("reinforce"), inputs)
    assert torch.allclose(value[1], plain[1], rtol=1e-6)
    output = PolicyLoss.preset("ppo")(inputs["logprobs"], advantages=inputs["advantages"], mask=inputs["mask"])
    total, count = output.metrics["ratio"]
    assert torch.equal(total, count)


@pytest.mark.parametrize("gradient", ["ratio_weighted", "straight_through_ratio"])
@pytest.mark.parametrize("surrogate", ["vespo", "geometric"])
def test_the_kl_is_weighted_by_the_ratio_of_the_token_not_by_the_surrogates_own(surrogate: str, gradient: str) -> None:
    inputs = batch(dtype=torch.float64)
    fields = {"surrogate": surrogate, "kl": "k3", "kl_gradient": gradient}
    results = [evaluate(PolicyLoss(**fields, kl_coef=coef), inputs)[:2] for coef in (0.5, 0.0)]  # type: ignore[arg-type]
    keep, logprobs = inputs["mask"].bool(), inputs["logprobs"].detach().clone().requires_grad_()
    log_ratio, x = (logprobs - inputs["old_logprobs"]), logprobs - inputs["ref_logprobs"]
    k3, k2 = (-x).exp() - 1 + x, x.square() / 2
    weighted = log_ratio.exp() * k3 if gradient == "ratio_weighted" else log_ratio.exp().detach() * k2
    value = weighted if gradient == "ratio_weighted" else k3
    count = keep.sum()
    (expected,) = torch.autograd.grad(0.5 * torch.where(keep, weighted, 0.0).sum() / count, logprobs)
    added = results[0][0] - results[1][0], results[0][1] - results[1][1]
    torch.testing.assert_close(added[0], 0.5 * torch.where(keep, value, 0.0).sum().detach() / count)
    torch.testing.assert_close(added[1], expected)


def test_vespo_clamps_token_log_ratios_where_it_is_told_to() -> None:
    inputs = batch(dtype=torch.float64)
    clamped = (inputs["logprobs"] - inputs["old_logprobs"]).clamp(-0.1, 0.1)
    near = {**inputs, "old_logprobs": inputs["logprobs"] - clamped}
    fields = {"surrogate": "vespo", "kl": "k3", "kl_coef": 0.1}
    result = evaluate(PolicyLoss(**fields, log_ratio_clamp=0.1), inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(result, evaluate(PolicyLoss(**fields), near))  # type: ignore[arg-type]


def test_extreme_log_ratios_are_finite_and_counted() -> None:
    logprobs = torch.tensor([[-1e4, -0.1, -5.0, -0.1]])
    old = torch.tensor([[-0.1, -1e4, -math.inf, -0.2]])
    for name, level in itertools.product(("grpo", "dapo", "sapo", "cispo"), ("token", "sequence", "sequence_sum")):
        loss = PolicyLoss.preset(name, kl="k3", kl_coef=0.1, kl_gradient="ratio_weighted", ratio_level=level)
        for sign in (1.0, -1.0):
            leaf = logprobs.clone().requires_grad_()
            output = loss(
                leaf, advantages=torch.tensor([sign]), mask=torch.ones(1, 4), old_logprobs=old, ref_logprobs=old.flip(1)
            )
            output.loss.backward()
            assert bool(output.loss.isfinite())
            assert bool(leaf.grad.isfinite().all())
            assert output.metrics["saturated"][0].item() >= 3
            assert output.metrics["nonfinite"][0].item() >= 1


@pytest.mark.parametrize("level", ["sequence", "sequence_sum", "sequence_token"])
def test_sequences_of_128k_tokens(level: str) -> None:
    n = 131_072
    logprobs = torch.full((1, n), -1.0, requires_grad=True)
    loss = PolicyLoss(ratio_level=level, correction=RolloutCorrection(level="sequence_sum", op="truncate", high=2.0))
    output = loss(
        logprobs,
        advantages=torch.tensor([-1.0]),
        mask=torch.ones(1, n),
        old_logprobs=torch.full((1, n), -1.1),
        rollout_logprobs=torch.full((1, n), -1.2),
    )
    output.loss.backward()
    assert bool(output.loss.isfinite())
    assert bool(logprobs.grad.isfinite().all())
    mean_ratio = PolicyLoss(ratio_level="sequence")(
        logprobs, advantages=torch.tensor([1.0]), mask=torch.ones(1, n), old_logprobs=torch.full((1, n), -1.1)
    ).metrics["ratio"]
    assert (mean_ratio[0] / mean_ratio[1]).item() == pytest.approx(math.exp(0.1), rel=1e-5)


def test_nan_on_a_live_token_stays_visible_and_is_counted() -> None:
    inputs = batch()
    inputs["advantages"] = inputs["advantages"].clone()
    inputs["advantages"][0] = math.nan
    output = PolicyLoss.preset("grpo")(
        inputs["logprobs"], **{k: v for k, v in inputs.items() if k not in ("logprobs", "scores", "group_ids")}
    )
    assert math.isnan(output.loss.item())
    assert output.metrics["nonfinite"][0].item() == float(inputs["mask"][0].sum())


def test_unknown_rollout_logprob_counts_as_weight_one() -> None:
    inputs = batch()
    inputs["rollout_logprobs"][0, 0] = math.nan
    spec = RolloutCorrection(level="token", op="mask", low=0.9, high=1.1)
    weights = spec.weights(inputs["old_logprobs"], inputs["rollout_logprobs"], inputs["mask"])
    assert weights[0, 0].item() == 1.0
    value = evaluate(PolicyLoss(correction=spec), inputs)
    assert bool(value[0].isfinite())


@pytest.mark.parametrize("name", ["ppo", "gspo", "cispo", "dppo_tv"])
def test_the_loss_without_metrics_is_the_loss(name: str, seed: int) -> None:
    loss = PolicyLoss.preset(name, kl="k3", kl_coef=0.1)
    columns = {key: -torch.rand(3, 5) for key in ("old_logprobs", "ref_logprobs", "rollout_logprobs")}
    x, mask = -torch.rand(3, 5), torch.tensor([5, 2, 0]).unsqueeze(1) > torch.arange(5)
    results = []
    for run in (
        lambda *args, **inputs: loss(*args, **inputs).loss,
        lambda *a, **k: policy_loss.loss_value(loss, *a, **k),
    ):
        leaf = x.clone().requires_grad_()
        value = run(leaf, advantages=torch.tensor([1.0, -1.0, 0.5]), mask=mask, **columns)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    with pytest.raises(TypeError, match="unexpected argument entropy"):
        policy_loss.loss_value(loss, x, advantages=x, mask=mask, entropy=x, **columns)


def test_metrics_against_brute_force() -> None:
    inputs = batch()
    spec = PolicyLoss(dual_clip=1.5, clip_high=0.3, kl="k3", kl_coef=0.1, entropy_coef=0.01)
    others = {k: v for k, v in inputs.items() if k not in ("scores", "group_ids")}
    metrics = {k: (s / c).item() for k, (s, c) in spec(others.pop("logprobs"), **others).metrics.items()}
    rows = [
        (a.item(), (lp - old).exp().item(), (old - lp).item(), (ref - lp).item(), h.item())
        for i, a in enumerate(inputs["advantages"])
        for lp, old, ref, h, live in zip(
            inputs["logprobs"][i], inputs["old_logprobs"][i], inputs["ref_logprobs"][i], inputs["entropy"][i],
            inputs["mask"][i], strict=True,
        )
        if live
    ]  # fmt: skip
    n = len(rows)
    assert metrics["clip_fraction_low"] == pytest.approx(sum(a < 0 and r < 0.8 for a, r, *_ in rows) / n)
    assert metrics["clip_fraction_high"] == pytest.approx(sum(a > 0 and r > 1.3 for a, r, *_ in rows) / n)
    assert metrics["dual_clip_fraction"] == pytest.approx(sum(a < 0 and max(r, 0.8) > 1.5 for a, r, *_ in rows) / n)
    assert metrics["approx_kl_old"] == pytest.approx(sum(x for _, _, x, _, _ in rows) / n, rel=1e-5)
    assert metrics["kl"] == pytest.approx(sum(math.exp(x) - 1 - x for *_, x, _ in rows) / n, rel=1e-4)
    assert metrics["entropy"] == pytest.approx(sum(h for *_, h in rows) / n, rel=1e-6)
    assert metrics["ratio"] == pytest.approx(sum(r for _, r, *_ in rows) / n, rel=1e-6)


def test_metrics_add_up_over_any_split() -> None:
    inputs = batch(8)
    spec = PolicyLoss.preset("grpo", entropy_coef=0.01)
    others = {k: v for k, v in inputs.items() if k not in ("scores", "group_ids")}
    whole = spec(**others).metrics
    parts = [
        spec(**{k: v[rows] for k, v in others.items()}).metrics for rows in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    for name, (total, count) in whole.items():
        assert sum(p[name][1] for p in parts).item() == count.item(), name
        assert sum(p[name][0] for p in parts).item() == pytest.approx(total.item(), rel=1e-6, abs=1e-9), name


BAD = {
    "surrogate": ("clipp", "CLIP", None),
    "ratio_level": ("seq", 1),
    "ratio_anchor": ("ref",),
    "aggregate": ("mean", "token-mean"),
    "kl": ("k4", "low_var_kl"),
    "kl_to": ("teacher",),
    "clip_low": (-0.1, 1.5, math.nan, math.inf),
    "clip_high": (-0.1, math.nan),
    "dual_clip": (1.0, 0.5, -3.0),
    "max_ratio": (1.1, 0.0),
    "entropy_coef": (math.nan, math.inf),
    "log_ratio_clamp": (0.0, -1.0),
    "denominator_eps": (-1e-8,),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in BAD.items() for v in values])
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=field):
        PolicyLoss(**{field: value})  # type: ignore[arg-type]


CONTRADICTIONS: list[tuple[str, dict[str, object]]] = [
    ("dual_clip", {"surrogate": "reinforce", "dual_clip": 3.0}),
    ("max_ratio", {"surrogate": "sapo", "max_ratio": 4.0}),
    ("weight_high", {"weight_high": 2.0}),
    ("weight_high", {"surrogate": "divergence_tv", "carrier": "ratio", "weight_high": 2.0}),
    ("carrier", {"carrier": "ratio"}),
    ("tau_pos", {"tau_pos": 0.5}),
    ("k_neg", {"k_neg": 1.0}),
    ("square_tau", {"square_tau": 0.5}),
    ("square_tau", {"surrogate": "square", "clip_low": None, "clip_high": None, "square_tau": 0.0}),
    ("ratio_level", {"surrogate": "square", "clip_low": None, "clip_high": None, "ratio_level": "none"}),
    ("clip_low", {"surrogate": "square", "clip_low": 0.3}),
    ("weight_high", {"surrogate": "square", "weight_high": 2.0}),
    ("clip_low", {"surrogate": "importance", "clip_low": 0.3}),
    ("kl_coef", {"kl_coef": 0.1}),
    ("kl_gradient", {"kl_gradient": "ratio_weighted"}),
    ("kl_value_clamp", {"kl_value_clamp": 10.0}),
    ("kl_value_clamp_order", {"kl": "k3", "kl_value_clamp": 10.0, "kl_value_clamp_order": "after"}),
    ("kl_value_clamp_order", {"kl": "k3", "kl_gradient": "ratio_weighted", "kl_value_clamp_order": "after"}),
    ("kl_ratio_max", {"kl": "k3", "kl_ratio_max": 10.0}),
    ("kl_ratio_anchor", {"kl": "k3", "kl_ratio_anchor": "self"}),
    ("kl_fraction", {"kl_fraction": 0.1}),
    ("constant", {"constant": 10.0}),
    ("denominator_eps", {"denominator_eps": 1e-8}),
    ("ratio_level", {"ratio_level": "none"}),
    ("ratio_level", {"surrogate": "divergence_kl", "ratio_level": "sequence"}),
    (
        "kl_ratio_anchor",
        {"surrogate": "vespo", "ratio_level": "sequence", "kl": "k3", "kl_gradient": "ratio_weighted"},
    ),
    ("sequence_log_ratio_max", {"sequence_log_ratio_max": 10.0}),
    ("clip_high", {"surrogate": "divergence_tv_symmetric", "clip_low": None, "clip_high": None}),
    ("max_ratio", {"max_ratio": 1.2, "clip_high": 0.28}),
]


@pytest.mark.parametrize(("field", "fields"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(field: str, fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=field):
        PolicyLoss(**fields)  # type: ignore[arg-type]


def test_corrections_that_correct_nothing_are_refused() -> None:
    for fields, message in (
        ({}, "low, high or both"),
        ({"low": 2.0, "high": 1.0}, "low must be <= correction.high"),
        ({"high": 2.0, "statistic": "tv"}, "op='gate'"),
        ({"high": 2.0, "level": "seq"}, "correction.level"),
        ({"high": math.nan}, "correction.high"),
        ({"high": -2.0}, "correction.high > 0"),
        ({"high": 0.0, "op": "mask"}, "correction.high > 0"),
        ({"low": -0.5, "high": 2.0, "op": "gate"}, "correction.low must be >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutCorrection(**fields)  # type: ignore[arg-type]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'GRPO'; known: sft, rft"):
        PolicyLoss.preset("GRPO")
    with pytest.raises(ValueError, match=r"no style 'xyz'; styles that differ from the paper: trl"):
        PolicyLoss.preset("grpo", style="xyz")
    with pytest.raises(ValueError, match=r"unknown field clip_hi of PolicyLoss; known: .*clip_high"):
        PolicyLoss.preset("dapo", clip_hi=0.3)


@pytest.mark.parametrize(
    ("name", "missing", "fields"),
    [
        ("ppo", "advantages", {}),
        ("grpo", "ref_logprobs", {}),
        ("ppo", "rollout_logprobs", {"ratio_anchor": "rollout"}),
        ("ppo", "rollout_logprobs", {"correction": RolloutCorrection(high=2.0)}),
        ("ppo", "group_ids", {"aggregate": "prompt_mean"}),
        ("ppo", "entropy", {"entropy_coef": 0.1}),
    ],
)
def test_missing_inputs_are_named(name: str, missing: str, fields: dict[str, object]) -> None:
    inputs = {k: v for k, v in batch().items() if k not in (missing, "scores")}
    with pytest.raises(ValueError, match=missing):
        PolicyLoss.preset(name, **fields)(**inputs)  # type: ignore[arg-type]


def test_wrong_shapes_devices_and_counts_are_named() -> None:
    inputs, loss = batch(), PolicyLoss.preset("ppo")
    del inputs["scores"], inputs["group_ids"]
    for change, message in (
        ({"old_logprobs": torch.zeros(4, 5)}, r"old_logprobs must have shape \(4, 6\), got \(4, 5\)"),
        ({"entropy": torch.zeros(6, 4)}, "entropy must have shape"),
        ({"logprobs": torch.zeros(24)}, "cu_seqlens"),
        ({"n_tokens": 0}, "n_tokens must be finite and > 0"),
        ({"n_tokens": math.nan}, "n_tokens must be finite"),
        ({"n_sequences": torch.ones(3)}, "n_sequences must be a number"),
        ({"cu_seqlens": torch.tensor([0, 24])}, "logprobs must be packed"),
        ({"mask": torch.zeros(4, 6, device="meta")}, "mask must be on cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(**(inputs | change))  # type: ignore[arg-type]
    packed = {k: v.reshape(-1) if v.dim() == 2 else v for k, v in inputs.items()}
    for offsets in ([0, 10, 23], [1, 10, 24], [0, 12, 10, 24]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N=24"):
            loss(**packed, cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.zeros(1)])
def test_a_count_of_zero_is_that_of_a_batch_without_live_tokens(count: float | Tensor) -> None:
    """A step passes `n_tokens=mask.sum()`, also if every completion was filtered out."""
    logits, mask = torch.randn(2, 3, 7, requires_grad=True), torch.zeros(2, 3)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    given = {"advantages": torch.ones(2), "n_tokens": count, "n_sequences": count}
    for name in ("dapo", "grpo", "ppo"):
        loss = PolicyLoss.preset(name, kl=None, kl_coef=0.0, entropy_coef=0.1)
        for output in (
            loss.from_logits(logits, labels, mask=mask, **given),
            loss.from_hidden(hidden, weight, labels, mask=mask, **given),
        ):
            assert float(output.loss.detach()) == 0.0
            grads = torch.autograd.grad(output.loss, (logits, hidden, weight), allow_unused=True)
            assert not any(bool(x.any()) for x in grads if x is not None)
        with pytest.raises(ValueError, match="must be finite and > 0, got 0"):
            loss.from_logits(logits, labels, mask=mask + 1, **given)


def test_global_counts_may_be_tensors() -> None:
    inputs, loss = batch(), PolicyLoss.preset("dapo")
    assert torch.equal(evaluate(loss, inputs, n_tokens=50)[0], evaluate(loss, inputs, n_tokens=torch.tensor(50.0))[0])
    assert torch.equal(evaluate(loss, inputs, n_tokens=50)[1], evaluate(loss, inputs, n_tokens=torch.tensor([50]))[1])


@pytest.mark.parametrize("label", [-100, -1, 7, -(2**31), 2**40])
def test_a_live_label_that_is_no_id_is_refused_and_a_masked_one_is_not(label: int) -> None:
    logits, mask = torch.randn(2, 3, 7), torch.tensor([[1, 1, 0], [1, 0, 0]])
    labels = torch.tensor([[1, 2, -100], [3, 99, -7]])
    loss = PolicyLoss.preset("reinforce")
    loss.from_logits(logits, labels, advantages=torch.ones(2), mask=mask)
    labels[0, 1] = label
    with pytest.raises(ValueError, match=r"labels must be in \[0, V=7\)"):
        loss.from_logits(logits, labels, advantages=torch.ones(2), mask=mask)
    with pytest.raises(ValueError, match=r"labels must be in \[0, V=7\)"):
        loss.from_hidden(torch.randn(2, 3, 4), torch.randn(7, 4), labels, advantages=torch.ones(2), mask=mask)


def test_from_hidden_refuses_what_it_does_not_know() -> None:
    hidden, weight, labels = torch.randn(2, 3, 4), torch.randn(7, 4), torch.zeros(2, 3, dtype=torch.int64)
    loss, mask = PolicyLoss.preset("reinforce"), torch.ones(2, 3)
    with pytest.raises(TypeError, match="unexpected argument advantage"):
        loss.from_hidden(hidden, weight, labels, advantage=torch.ones(2), mask=mask)
    with pytest.raises(TypeError, match="entropy= is computed here"):
        loss.from_hidden(hidden, weight, labels, advantages=torch.ones(2), mask=mask, entropy=torch.ones(2, 3))
    with pytest.raises(TypeError, match="mask= is needed"):
        loss.from_hidden(hidden, weight, labels, advantages=torch.ones(2))
    with pytest.raises(ValueError, match="tail_mass"):
        loss.from_hidden(hidden, weight, labels, advantages=torch.ones(2), mask=mask, tail_mass=1.5)


def test_from_hidden_path_is_reported() -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels, mask = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    inputs = {"advantages": torch.ones(2), "mask": mask, "old_logprobs": torch.zeros(2, 3)}

    def units(name: str, head: Tensor, **options: object) -> float:
        output = PolicyLoss.preset(name).from_hidden(hidden, head, labels, **inputs, **options)
        return output.metrics["path/gemm_units"][0].item()

    assert units("dapo", weight) == 3
    assert units("dapo", weight.detach()) == 2
    assert units("gspo", weight) == 3
    assert units("gspo", weight, chunk_tokens=1) == 3
    assert units("gspo", weight.detach()) == 2
    assert units("kl_cov", weight) == 4
    with torch.no_grad():
        assert units("dapo", weight) == 1


def test_zero_advantage_rows_skip_the_gradient_gemms() -> None:
    hidden, weight = torch.randn(1, 64, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.zeros(1, 64, dtype=torch.int64)
    advantages = torch.zeros(1, 64)
    advantages[0, 5] = 1.0
    with torch.profiler.profile(record_shapes=True) as profile:
        output = PolicyLoss.preset("dapo").from_hidden(
            hidden, weight, labels, advantages=advantages, mask=torch.ones(1, 64), chunk_tokens=32
        )
    shapes = [e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::addmm_")]
    assert [s for s in shapes if s[0] == [8, 9]], "the one live row alone goes through dX, padded to 8"
    assert not [s for s in shapes if s[0] == [32, 9]], "no full chunk goes through dX"
    output.loss.backward()
    assert int((hidden.grad[0] != 0).any(-1).sum()) == 1


@pytest.mark.parametrize("name", ["gspo", "vespo", "gmpo", "luspo"])
@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_sequences_longer_than_a_block_form_their_logits_twice(name: str, chunk: int) -> None:
    """Blocks of whole sequences, sequences longer than a block, and a call on log-probs agree."""
    inputs = batch(5, 12)
    hidden, weight = torch.randn(5, 12, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    labels = torch.randint(0, 9, (5, 12))
    spec = PolicyLoss.preset(name, entropy_coef=0.05)
    others = {k: v for k, v in inputs.items() if k not in ("logprobs", "entropy", "scores")}
    results = []
    for path in ("hidden", "logprobs"):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if path == "hidden":
            output = spec.from_hidden(leaf, head, labels, chunk_tokens=chunk, backend="torch", **others)
            units = output.metrics["path/gemm_units"][0].item()
        else:
            result = fastrl.linear_token_logprobs(leaf, head, labels, backend="torch")
            output = spec(result.logprobs, entropy=result.entropy, **others)
        output.loss.backward()
        results.append((output.loss.detach(), leaf.grad, head.grad))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    lengths = inputs["mask"].sum(1)
    long = lengths[lengths > 4 * chunk].sum() / lengths.sum()
    assert units == pytest.approx(3.0 + long.item())


@pytest.mark.parametrize("fused", [True, False])
def test_from_hidden_upstream_scale_and_repeated_backward(fused: bool) -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.randint(0, 7, (2, 3))
    inputs = {"advantages": torch.ones(2), "mask": torch.ones(2, 3), "old_logprobs": torch.full((2, 3), -2.0)}
    loss = PolicyLoss.preset("dapo" if fused else "gspo").from_hidden(hidden, weight, labels, **inputs).loss
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    more = torch.autograd.grad(loss * 3.7, (hidden, weight), retain_graph=True)
    for a, b in zip(once, more, strict=True):
        assert torch.allclose(3.7 * a, b, rtol=1e-6)
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_returned_logprobs_are_detached() -> None:
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.randint(0, 7, (2, 3))
    output = PolicyLoss.preset("reinforce").from_hidden(
        hidden, weight, labels, advantages=torch.ones(2), mask=torch.ones(2, 3)
    )
    assert not output.logprobs.requires_grad
    assert not output.entropy.requires_grad
    want = fastrl.linear_token_logprobs(hidden, weight, labels)
    assert torch.equal(output.logprobs, want.logprobs.detach())
    assert torch.equal(output.entropy, want.entropy.detach())


def test_product_of_the_axes_is_computed_or_refused() -> None:
    """Every combination of the named axes raises at construction or gives finite values equal to the reference."""
    inputs = batch(dtype=torch.float64)
    computed = refused = 0
    settings = itertools.product(
        axes.SURROGATES, axes.RATIO_LEVELS, ("old", "rollout", "self"), (None, "k3"),
        ("plain", "ratio_weighted"), ("token_mean", "prompt_mean"), (None, RolloutCorrection(high=1.1)),
    )  # fmt: skip
    for surrogate, level, anchor, kl, gradient, aggregate, correction in settings:
        try:
            spec = PolicyLoss(
                surrogate=surrogate, ratio_level=level, ratio_anchor=anchor, kl=kl, kl_coef=0.1 if kl else 0.0,
                kl_gradient=gradient, aggregate=aggregate, correction=correction,
            )  # fmt: skip
        except ValueError:
            refused += 1
            continue
        computed += 1
        value, gradient_value, _ = evaluate(spec, inputs)
        flat = {k: v.reshape(-1) if v.dim() == 2 else v for k, v in inputs.items()}
        leaf = flat["logprobs"].clone().requires_grad_()
        want, _, _ = reference.policy_loss(
            spec,
            leaf,
            advantages=flat["advantages"].repeat_interleave(6),
            mask=flat["mask"],
            lengths=torch.full((4,), 6),
            entropy=flat["entropy"],
            old_logprobs=flat["old_logprobs"],
            ref_logprobs=flat["ref_logprobs"],
            rollout_logprobs=flat["rollout_logprobs"],
            positive=flat["scores"].repeat_interleave(6) > 0,
            group_ids=flat["group_ids"],
        )
        want.backward()
        assert torch.equal(value, want.detach()), spec
        assert torch.equal(gradient_value.view(-1), leaf.grad), spec
        assert bool(value.isfinite())
    assert computed > 500
    assert refused > 200


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64], ids=lambda kind: kind.__name__)
def test_numpy_scalars_are_numbers(number):
    logprobs, mask = -torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    options = {"advantages": torch.tensor([1.0, -1.0]), "mask": mask}
    given, plain = (
        PolicyLoss(surrogate="reinforce", ratio_level="none", entropy_coef=one)(
            logprobs, entropy=-logprobs, n_tokens=many, **options
        )
        for one, many in ((number(1), number(12)), (1.0, 12.0))
    )
    assert torch.equal(given.loss, plain.loss)
    logits = torch.randn(4, 7)
    labels = torch.tensor([0, 6, -1, 3])
    for of_numpy, of_python in zip(
        fastrl.token_logprobs(logits, labels, temperature=number(2), ignore_index=np.int64(-1)),
        fastrl.token_logprobs(logits, labels, temperature=2.0, ignore_index=-1),
        strict=True,
    ):
        assert torch.equal(of_numpy, of_python)
    assert fastrl.group_advantages(torch.randn(4), group_size=np.int64(2)).shape == (4,)


def test_a_group_of_strings_is_refused_by_name():
    with pytest.raises(TypeError, match="group_ids must be an int, got str 'a'"):
        fastrl.group_advantages(torch.randn(2), group_ids=["a", "b"])


@pytest.mark.parametrize("entrance", ["logprobs", "logits", "hidden"])
@pytest.mark.parametrize("family", ["policy", "preference"])
def test_an_invalid_mask_that_nobody_may_read_makes_the_loss_nan(
    entrance: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device the values of a mask are not read, as the host would wait: a mask of 2 must not pass for one of 1."""
    hidden, weight = torch.randn(4, 3, 5), torch.randn(7, 5)
    labels, mask = torch.randint(0, 7, (4, 3)), torch.ones(4, 3)
    logits = hidden @ weight.T
    logprobs = fastrl.token_logprobs(logits, labels).logprobs
    given = {"advantages": torch.ones(4)} if family == "policy" else {"ref_logprobs": logprobs - 0.1}
    loss = PolicyLoss.preset("dapo") if family == "policy" else fastrl.PreferenceLoss.preset("sigmoid")
    trained = weight.clone().requires_grad_()

    def value(mask: Tensor) -> Tensor:
        if entrance == "hidden":
            return loss.from_hidden(hidden, trained, labels, mask=mask, **given).loss
        if entrance == "logits":
            return loss.from_logits(logits.clone().requires_grad_(), labels, mask=mask, **given).loss
        call = loss if family == "policy" else loss.from_logprobs
        return call(logprobs, mask=mask, **given).loss

    monkeypatch.setattr(fastrl.checks, "checks_values", lambda *tensors: False)
    assert value(mask).isfinite()
    assert value(2 * mask).isnan()
