"""The policy loss against released trainers: loss, gradients and metrics of every golden case."""

import pytest
import torch
from golden import Case, cases
from golden_policy import build, call, output_of
from oracle import assert_as_accurate
from policy_cases import interpreted
from torch import Tensor

from fastrl.losses.policy import loss as policy_loss
from fastrl.ops.segments import segment_sum
from fastrl.reference import segments


@pytest.mark.parametrize("case", cases("policy"), ids=lambda case: case.id)
def test_policy_matches_trainer_in_float64(case: Case) -> None:
    inputs = case.leaves(torch.float64)
    loss = call(case, build(case), inputs)
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(inputs)


def kernel_sum(x: Tensor, lengths: Tensor) -> Tensor:
    return segment_sum(x, lengths, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", cases("policy"), ids=lambda case: case.id)
def test_policy_in_float32_is_as_accurate_as_eager(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients on the trainers' inputs, by the oracle's rule; eager code adds up in float32."""

    def evaluate(dtype: torch.dtype) -> list[tuple[str, Tensor]]:
        inputs = case.leaves(dtype)
        loss = call(case, build(case), inputs)
        assert loss.dtype == dtype
        loss.backward()
        leaves = [(name, inputs[name]) for name in case.differentiated]
        grads = [(f"grad_{name}", torch.zeros_like(x) if x.grad is None else x.grad) for name, x in leaves]
        return [("loss", loss.detach()), *grads]

    exact = evaluate(torch.float64)
    with monkeypatch.context() as patched:
        patched.setattr(segments, "_accumulator", lambda x: x.dtype)
        eager = evaluate(torch.float32)
    if backend == "triton":
        monkeypatch.setattr(policy_loss, "fused_policy_terms", interpreted)
        monkeypatch.setattr(policy_loss, "segment_sum_for", lambda _: kernel_sum)
    for (name, want), (_, plain), (_, got) in zip(exact, eager, evaluate(torch.float32), strict=True):
        assert_as_accurate(name, got, want, plain)


METRICS = {
    "clip_fraction": "clip_fraction",
    "clip_fraction_low": "clip_fraction_low",
    "clip_fraction_high": "clip_fraction_high",
    "dual_clip_fraction": "dual_clip_fraction",
    "approx_kl_old": "approx_kl_old",
    "kl_mean": "kl",
    "entropy_mean": "entropy",
    "rollout_kl": "rollout_kl",
}


def same_definition(case: Case, name: str) -> bool:
    """TRL takes clip fractions of sequence ratios as means over sequences; gates of other surrogates differ."""
    if not name.startswith(("clip_", "dual_")):
        return True
    token_clip = case.hyper["surrogate"] == "clip" and case.hyper["ratio_level"] == "token"
    return token_clip and case.hyper.get("selection", None) is None and case.peer != "SkyRL"


@pytest.mark.parametrize(
    "case", [c for c in cases("policy") if set(c.metrics) & set(METRICS)], ids=lambda case: case.id
)
def test_metrics_match_trainer(case: Case) -> None:
    inputs = case.leaves(torch.float64)
    metrics = output_of(case, build(case), inputs).metrics
    for theirs, ours in METRICS.items():
        if theirs not in case.metrics or not same_definition(case, theirs):
            continue
        total, count = metrics[ours]
        assert (total / count).item() == pytest.approx(case.metrics[theirs], rel=1e-6, abs=1e-9), theirs
