"""The policy loss with its fused arithmetic against the same loss in plain PyTorch, over the product of the axes; and
what must not depend on how a batch is cut, padded or reached: micro-batches, packing, logits, hidden states.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import fields_of, interpreted, judge, pairwise
from torch import Tensor

from fastrl.losses.policy import PolicyLoss, RolloutCorrection
from fastrl.losses.policy import loss as policy_loss
from fastrl.losses.policy.axes import AGGREGATES, KL_GRADIENTS, RATIO_LEVELS, SURROGATES

DTYPES = [torch.float32, torch.float64]
CORRECTIONS = {
    "none": None,
    "token truncate": RolloutCorrection(high=1.2),
    "token truncate, normalised": RolloutCorrection(low=0.5, high=1.5, batch_normalize=True),
    "token mask": RolloutCorrection(op="mask", low=0.7, high=1.3),
    "sequence truncate": RolloutCorrection(level="sequence", high=1.1, log_weight_clamp=0.4),
    "sequence_sum mask": RolloutCorrection(level="sequence_sum", op="mask", low=0.2, high=3.0),
    "gate tv": RolloutCorrection(op="gate", statistic="tv", high=0.1),
    "gate k1 of the sequence": RolloutCorrection(level="sequence", op="gate", statistic="k1", low=-0.2, high=0.2),
}
FACTORS: dict[str, Any] = {
    "surrogate": SURROGATES,
    "ratio": [*itertools.product(RATIO_LEVELS[:4], ("old", "rollout", "self")), ("none", "old")],
    "kl": (None, "k1", "k2", "k3", "abs"),
    "kl_gradient": KL_GRADIENTS,
    "kl_to": ("ref", "old", "rollout"),
    "kl_ratio_anchor": (None, "self", "rollout"),
    "correction": tuple(CORRECTIONS),
    "mask": ("full", "gaps", "empty row"),
    "aggregate": AGGREGATES,
    "entropy_coef": (0.0, 0.02),
    "clamps": (False, True),
    "clamp_order": ("before", "after"),
    "variant": (0, 1, 2, 3),
}


def allowed(row: dict[str, Any]) -> bool:
    """Return whether the values that a row has so far go together."""
    kl = row.get("kl", "k3")
    if kl is None and any(row.get(name, FACTORS[name][0]) != FACTORS[name][0] for name in ("kl_gradient", "kl_to")):
        return False
    if row.get("kl_ratio_anchor") is not None and (
        kl is None or "ratio" not in row.get("kl_gradient", "ratio_weighted")
    ):
        return False
    weighted = kl is not None and row.get("kl_gradient", "ratio_weighted") == "ratio_weighted"
    if row.get("clamp_order") == "after" and not (weighted and row.get("clamps", True)):
        return False
    surrogate, (level, _) = row.get("surrogate"), row.get("ratio", ("token", "old"))
    pooled = surrogate in ("vespo", "geometric") and level.startswith("sequence")
    own = row.get("kl_ratio_anchor", "self") is None and kl is not None
    if pooled and own and "ratio" in row.get("kl_gradient", "plain"):
        return False
    if level == "none":
        return surrogate in (None, "reinforce", "nll", "dft", "vespo", "geometric")
    return level == "token" or surrogate is None or not surrogate.startswith("divergence")


def axes_of(row: dict[str, Any]) -> PolicyLoss:
    """Return the loss of a row."""
    level, anchor = row["ratio"]
    fields = fields_of(row["surrogate"], row["variant"]) | {"ratio_level": level, "ratio_anchor": anchor}
    fields |= {
        "aggregate": row["aggregate"],
        "entropy_coef": row["entropy_coef"],
        "correction": CORRECTIONS[row["correction"]],
    }
    if row["aggregate"] == "constant":
        fields["constant"] = 9.0
    if row["aggregate"] == "sequence_mean" and row["clamps"]:
        fields["denominator_eps"] = 0.5
    if row["kl"] is not None:
        fields |= {"kl_coef": 0.3, **{name: row[name] for name in ("kl", "kl_gradient", "kl_to", "kl_ratio_anchor")}}
    if row["clamps"]:
        fields["log_ratio_clamp"] = 0.5
        if row["kl"] is not None:
            fields |= {"kl_log_ratio_clamp": 0.6, "kl_value_clamp": 0.2, "kl_value_clamp_order": row["clamp_order"]}
        if row["kl"] is not None and row["kl_gradient"] == "straight_through_ratio":
            fields["kl_ratio_max"] = 1.2
        if level in ("sequence", "sequence_token", "sequence_sum"):
            fields["sequence_log_ratio_max"] = 0.1
    return PolicyLoss(**fields)


ROWS = pairwise(FACTORS, allowed)
SHARDS = 6


def batch(seed: int, mask: str = "gaps", rows: int = 5, time: int = 7) -> dict[str, Tensor]:
    """Return a padded batch in float64; ratios on both sides of every bound."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -draw(rows, time).abs() - 0.1
    keep = torch.ones(rows, time, dtype=torch.bool)
    if mask != "full":
        keep = draw(rows, time) > -0.7
        keep[:, 0] = True
    if mask == "empty row":
        keep[1] = False
    return {
        "logprobs": logprobs,
        "entropy": draw(rows, time).abs(),
        "old_logprobs": logprobs + 0.3 * draw(rows, time),
        "ref_logprobs": logprobs + 0.4 * draw(rows, time),
        "rollout_logprobs": logprobs + 0.25 * draw(rows, time),
        "advantages": draw(rows, time),
        "mask": keep,
        "scores": draw(rows),
        "group_ids": torch.arange(rows) // 2,
    }


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def results(spec: PolicyLoss, inputs: dict[str, Tensor], dtype: torch.dtype, **more: Any) -> dict[str, Tensor]:
    """Return the loss, its gradients and its metrics at `dtype`."""
    given = {k: v for k, v in cast(inputs, dtype).items() if k != "scores" or spec.surrogate == "topr"}
    logprobs = given.pop("logprobs").clone().requires_grad_()
    entropy = given.pop("entropy").clone().requires_grad_()
    output = spec(logprobs, entropy=entropy, **{**given, **more})
    output.loss.backward()
    sums = {name: (total / count.clamp(min=1)).reshape(1) for name, (total, count) in output.metrics.items()}
    return {
        "loss": output.loss.detach().reshape(1),
        "grad_logprobs": logprobs.grad.reshape(-1),
        "grad_entropy": torch.zeros(logprobs.numel(), dtype=dtype)
        if entropy.grad is None
        else entropy.grad.reshape(-1),
        **sums,
    }


def without_luck(
    spec: PolicyLoss, mask: str, seed: int, exact: dict[str, Tensor], eager: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return `eager` with the largest error of each scalar over a few like batches: one scalar can be right by luck."""
    errors = {name: (eager[name].double() - x).abs() for name, x in exact.items() if x.numel() == 1}
    for other in range(1, 4):
        rounded = cast(batch(seed + 1000 * other, mask), torch.float32)
        plain, wide = (results(spec, rounded, dtype) for dtype in DTYPES)
        errors = {name: torch.maximum(x, (plain[name].double() - wide[name]).abs()) for name, x in errors.items()}
    return eager | {name: exact[name] + error for name, error in errors.items()}


def test_pairs_are_covered() -> None:
    """Every pair of values that go together occurs in a row, and the rows are far fewer than the product."""
    assert len(ROWS) < 400
    seen = {(a, row[a], b, row[b]) for row in ROWS for a, b in itertools.combinations(FACTORS, 2)}
    for a, b in itertools.combinations(FACTORS, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            if (a, x, b, y) not in seen:
                assert not allowed({a: x, b: y}), f"no row has {a}={x!r} with {b}={y!r}"


@pytest.mark.parametrize("shard", range(SHARDS))
def test_fused_equals_plain_over_pairs_of_axes(shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients and metrics of the fused arithmetic are as accurate as plain PyTorch's, at both precisions."""
    plain = policy_loss.fused_policy_terms
    for i, row in list(enumerate(ROWS))[shard::SHARDS]:
        spec = axes_of(row)
        dtype = DTYPES[(i // SHARDS) % 2]
        inputs = batch(i, row["mask"])
        rounded = cast(inputs, torch.float32)
        judged = rounded if dtype == torch.float32 else inputs
        exact = results(spec, judged, torch.float64)
        eager = without_luck(spec, row["mask"], i, exact, results(spec, rounded, torch.float32))
        monkeypatch.setattr(policy_loss, "fused_policy_terms", interpreted)
        result = results(spec, judged, dtype)
        monkeypatch.setattr(policy_loss, "fused_policy_terms", plain)
        judge(f"row {i} {row}", result, exact, eager, dtype, {"all": slice(None)})


SPLITTABLE = [name for name in AGGREGATES if name != "prompt_mean"]


@pytest.mark.parametrize("aggregate", SPLITTABLE)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([n for n in PolicyLoss.presets() if n != "kl_cov"]),
    cuts=st.sets(st.integers(1, 6), max_size=4),
    seed=st.integers(0, 10),
)
def test_micro_batches_add_up(name: str, aggregate: str, cuts: set[int], seed: int) -> None:
    """With global counts, losses and gradients of any split into micro-batches sum to those of the whole batch."""
    constant = 11.0 if aggregate == "constant" else None
    spec = PolicyLoss.preset(name, aggregate=aggregate, constant=constant, entropy_coef=0.05)
    rows = 7
    inputs = batch(seed, "empty row", rows=rows)
    live = inputs["mask"].any(1)
    counts = {"n_tokens": float(inputs["mask"].sum()), "n_sequences": float(live.sum())}
    whole = results(spec, inputs, torch.float64)
    edges = [0, *sorted(cuts), rows]
    parts = [
        results(spec, {k: v[a:b] for k, v in inputs.items()}, torch.float64, **counts)
        for a, b in itertools.pairwise(edges)
    ]
    summed = {
        "loss": sum(part["loss"] for part in parts),
        "grad_logprobs": torch.cat([part["grad_logprobs"] for part in parts]),
        "grad_entropy": torch.cat([part["grad_entropy"] for part in parts]),
    }
    for key, value in summed.items():
        largest = float(whole[key].abs().max())
        assert float((value - whole[key]).abs().max()) <= 1e-13 * max(largest, 1e-3), key


@pytest.mark.parametrize("name", PolicyLoss.presets())
def test_fused_packing_and_masked_garbage_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the kernel too: packed is padded, and NaN, infinities or 1e30 under the mask change no bit."""
    monkeypatch.setattr(policy_loss, "fused_policy_terms", interpreted)
    spec = PolicyLoss.preset(name, entropy_coef=0.05)
    inputs = batch(3, "empty row")
    padded = results(spec, inputs, torch.float32)
    keep = inputs["mask"]
    junk = {"logprobs": math.nan, "old_logprobs": math.inf, "ref_logprobs": -math.inf, "rollout_logprobs": math.nan}
    junk |= {"entropy": math.inf, "advantages": 1e30}
    dirty = {k: torch.where(keep, v, junk[k]) if k in junk else v for k, v in inputs.items()}
    for key, value in results(spec, dirty, torch.float32).items():
        assert torch.equal(value, padded[key]), key
    rows, time = keep.shape
    packed = {k: v.reshape(-1) for k, v in inputs.items() if v.shape == keep.shape}
    packed |= {k: v for k, v in inputs.items() if v.shape != keep.shape}
    offsets = torch.arange(0, rows * time + 1, time)
    more = {"constant": float(time)} if spec.aggregate == "constant" else {}
    loss = dataclasses.replace(spec, **more)
    for key, value in results(loss, packed, torch.float32, cu_seqlens=offsets).items():
        assert torch.equal(value, padded[key]), key


@pytest.mark.parametrize(
    "name",
    ["grpo", "dapo", "cispo", "sapo", "dppo_kl", "opmd", "sft", "gspo", "gspo_token", "gmpo", "vespo", "opmd_sequence"],
)
@pytest.mark.parametrize("bonus", [0.0, 0.03])
def test_three_entries_agree(name: str, bonus: float) -> None:
    """From log-probs, logits and hidden states the loss and the gradient at the hidden states are the same."""
    spec = PolicyLoss.preset(name, entropy_coef=bonus)
    rows, time, width, vocabulary = 3, 5, 6, 11
    torch.manual_seed(0)
    head = torch.randn(vocabulary, width, dtype=torch.float64)
    start = torch.randn(rows, time, width, dtype=torch.float64)
    labels = torch.randint(0, vocabulary, (rows, time))
    inputs = batch(5, "empty row", rows=rows, time=time)
    own = torch.log_softmax(start @ head.T, -1).gather(-1, labels[..., None]).squeeze(-1)
    shift = own - inputs["logprobs"]
    given = {
        k: v + shift if k.endswith("_logprobs") else v
        for k, v in inputs.items()
        if k not in ("logprobs", "entropy", "scores")
    }

    def run(entry: str) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = start.clone().requires_grad_(), head.clone().requires_grad_()
        if entry == "hidden":
            loss = spec.from_hidden(hidden, weight, labels, chunk_tokens=4, **given).loss
        elif entry == "logits":
            loss = spec.from_logits(hidden @ weight.T, labels, **given).loss
        else:
            logp = torch.log_softmax(hidden @ weight.T, -1)
            entropy = -(logp.exp() * logp).sum(-1)
            loss = spec(logp.gather(-1, labels[..., None]).squeeze(-1), entropy=entropy, **given).loss
        (3.7 * loss).backward(retain_graph=True)
        once = hidden.grad.clone()
        (3.7 * loss).backward()
        assert torch.allclose(hidden.grad, 2.0 * once, rtol=1e-12, atol=0.0)
        return loss.detach(), once, weight.grad / 2.0

    want = run("logprobs")
    for entry in ("logits", "hidden"):
        for name_of, got, exact in zip(("loss", "grad hidden", "grad weight"), run(entry), want, strict=True):
            error, largest = float((got - exact).abs().max()), float(exact.abs().max())
            assert error <= 1e-12 * max(largest, 1e-6), f"{entry} {name_of}: error {error:.2e} of {largest:.2e}"
