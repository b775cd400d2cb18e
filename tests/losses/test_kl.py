"""KL to a reference: golden cases, exact zeros, large gaps, the penalty, the controller, the exact KL."""

import math
from typing import Any, ClassVar

import mpmath
import pytest
import torch
from golden import Case, cases
from oracle import assert_as_accurate
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl import reference
from fastrl.losses.kl import ESTIMATORS, GRADIENTS, AdaptiveKLController, full_kl, kl_estimate, kl_penalty_rewards


def compute(case: Case, x: dict[str, Tensor]) -> Tensor:
    hyper = case.hyper
    clamp = hyper["kl_log_ratio_clamp"]
    if hyper.get("kl_log_ratio_clamp_side"):
        clamp = (-clamp, None)
    return kl_estimate(
        x["logprobs"],
        x["ref_logprobs"],
        hyper["kl"],
        gradient=hyper["kl_gradient"],
        old_logprobs=x.get("old_logprobs"),
        mask=x["mask"] if hyper.get("zero_outside_mask") else None,
        log_ratio_clamp=clamp,
        value_clamp=hyper["kl_value_clamp"],
        ratio_max=hyper["kl_ratio_max"],
    )


@pytest.mark.parametrize("case", cases("kl"), ids=lambda case: case.id)
def test_kl_matches_trainer_in_float64_and_float32(case: Case) -> None:
    exact = case.leaves(torch.float64)
    value = compute(case, exact)
    case.check("kl", value)
    (exact["upstream"] * value).sum().backward()
    case.check_gradients(exact)
    single = case.leaves(torch.float32)
    result = compute(case, single)
    assert result.dtype == torch.float32
    (single["upstream"] * result).sum().backward()
    for got, want in ((result, value), (single["logprobs"].grad, exact["logprobs"].grad)):
        assert got is not None
        assert want is not None
        # A log-ratio at a clamp's edge may fall on either side of it after rounding; none of these cases has one.
        assert_as_accurate("kl or gradient", got, want, want.float())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("anchored", [False, True])
def test_finite_forward_and_backward_up_to_1e4(estimator: str, gradient: str, anchored: bool) -> None:
    gaps = [0.0, 1e-8, 1.0, 30.0, 64.0, 88.0, 89.0, 100.0, 710.0, 1e3, 1e4]
    delta = torch.tensor([s * gap for gap in gaps for s in (-1.0, 1.0)])
    gradients = []
    for other in (torch.zeros(()), torch.tensor(1e4), torch.tensor(-1e4)):
        logprobs = delta.clone().requires_grad_()
        old = {}
        if anchored:
            if "ratio" not in gradient:
                return
            old = {"old_logprobs": other.expand(delta.shape)}
        value = kl_estimate(logprobs, torch.zeros_like(delta), estimator, gradient=gradient, **old)
        value.sum().backward()
        assert logprobs.grad is not None
        assert bool(value.isfinite().all()), value
        assert bool(logprobs.grad.isfinite().all()), logprobs.grad
        gradients.append(logprobs.grad)
        if estimator in ("k2", "k3", "abs"):
            assert bool((value >= 0).all())
    assert bool((gradients[0][2:] != 0).any())


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_kl_exactly_zero(estimator: str, gradient: str, seed: int) -> None:
    logprobs = (-5 * torch.rand(50)).requires_grad_()
    value = kl_estimate(logprobs, logprobs.detach().clone(), estimator, gradient=gradient)
    value.sum().backward()
    assert not bool(value.any())
    # k1 = x has slope 1 everywhere; straight-through has the slope of k2.
    want = torch.ones(50) if estimator == "k1" and gradient in ("plain", "ratio_weighted") else torch.zeros(50)
    assert torch.equal(logprobs.grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_k3_is_accurate_relative_to_itself(dtype: torch.dtype) -> None:
    """Within eight roundings of itself, and its slope too: at |x| = 1e-4 expm1(-x) + x alone errs 1e-3 in float32."""
    small = torch.logspace(-6 if dtype == torch.float32 else -12, 0, 80, dtype=torch.float64)
    edges = torch.tensor([0.5, 0.5 - 2**-20, 0.5 + 2**-20, 5.0, 30.0], dtype=torch.float64)
    x = torch.cat([small, -small, edges, -edges]).to(dtype).requires_grad_()
    value = kl_estimate(x, torch.zeros_like(x), "k3")
    (slope,) = torch.autograd.grad(value.sum(), x)
    with mpmath.workdps(60):
        for at, got, grad in zip(x.tolist(), value.tolist(), slope.tolist(), strict=True):
            wide = mpmath.mpf(at)
            exact, exact_slope = mpmath.expm1(-wide) + wide, -mpmath.expm1(-wide)
            eps = torch.finfo(dtype).eps
            assert abs(got - exact) <= 8 * eps * abs(exact), f"k3({at}) = {got}"
            assert abs(grad - exact_slope) <= 8 * eps * abs(exact_slope), f"slope of k3 at {at} = {grad}"


# PyTorch's own forward mode compiles with torch.jit.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_k3_is_differentiated_twice_forward_and_over_batches(seed: int) -> None:
    x = torch.linspace(-0.7, 0.7, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.kl_value(x, "k3"), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: reference.kl_value(x, "k3"), (x,))
    slope = torch.func.vmap(torch.func.grad(lambda x: reference.kl_value(x, "k3")))(x.detach())
    assert torch.allclose(slope, -torch.expm1(-x.detach()), rtol=1e-14)


def test_the_two_orders_of_clamp_and_ratio() -> None:
    logprobs = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([3.0], dtype=torch.float64)
    old = torch.tensor([-1.0], dtype=torch.float64)
    options: dict[str, Any] = {"gradient": "ratio_weighted", "old_logprobs": old, "value_clamp": 10.0}
    after = kl_estimate(logprobs, ref, "k3", **options)
    assert after.item() == 10.0
    assert torch.autograd.grad(after, logprobs)[0].item() == 0.0
    before = kl_estimate(logprobs, ref, "k3", value_clamp_order="before_ratio", **options)
    assert before.item() == pytest.approx(10.0 * math.e)
    assert torch.autograd.grad(before, logprobs)[0].item() == pytest.approx(10.0 * math.e)


def test_masked_tokens_are_zero_without_gradient_whatever_they_hold(seed: int) -> None:
    mask = torch.tensor([[1, 0, 1, 0]])
    logprobs = torch.tensor([[-1.0, math.nan, -2.0, math.inf]], requires_grad=True)
    ref = torch.tensor([[-1.5, -math.inf, -1.0, math.nan]], requires_grad=True)
    old = torch.tensor([[-1.0, math.nan, -1.9, -math.inf]])
    for gradient in GRADIENTS:
        anchor = {"old_logprobs": old} if "ratio" in gradient else {}
        value = kl_estimate(logprobs, ref, gradient=gradient, mask=mask, **anchor)
        (gradient_of,) = torch.autograd.grad(value.sum(), logprobs)
        for x in (value, gradient_of):
            assert x[0, [1, 3]].tolist() == [0.0, 0.0]
            assert bool(x.isfinite().all())
    live = kl_estimate(logprobs, ref)
    assert live.isnan().tolist() == [[False, True, False, True]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "k4"}, "k3"),
        ({"gradient": "weighted"}, "ratio_weighted"),
        ({"ref_logprobs": torch.zeros(2, 4)}, r"ref_logprobs must have shape \(2, 3\), got \(2, 4\)"),
        ({"old_logprobs": torch.zeros(2, 3)}, "old_logprobs has no effect"),
        ({"ratio_max": 2.0}, "ratio_max has no effect"),
        ({"value_clamp_order": "before_ratio"}, "no effect"),
        ({"value_clamp": 0.0}, "value_clamp"),
        ({"log_ratio_clamp": -1.0}, "log_ratio_clamp"),
        ({"log_ratio_clamp": (1.0, -1.0)}, "low <= high"),
        ({"log_ratio_clamp": (1.0,)}, r"\(low, high\)"),
        ({"mask": torch.full((2, 3), 2)}, "only 0 and 1"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_options_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"logprobs": torch.zeros(2, 3), "ref_logprobs": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=message):
        kl_estimate(**(given | change))


# --- in the reward ----------------------------------------------------------------------------------------------------


def test_the_penalty_is_taken_at_live_tokens_only(seed: int) -> None:
    rewards, mask = torch.randn(3, 5), torch.rand(3, 5) < 0.6
    logprobs, ref = -torch.rand(3, 5), -torch.rand(3, 5)
    dirty = torch.where(mask, logprobs, math.nan)
    for coef in (0.05, torch.tensor(0.05)):
        result = kl_penalty_rewards(rewards, dirty.requires_grad_(), ref, mask, coef=coef)
        assert torch.allclose(result, torch.where(mask, rewards - 0.05 * (logprobs - ref), rewards))
        assert not result.requires_grad
    clamped = kl_penalty_rewards(rewards, logprobs, ref, mask, coef=1.0, estimator="k2", value_clamp=0.01)
    assert torch.allclose(clamped, rewards - torch.where(mask, (0.5 * (logprobs - ref) ** 2).clamp(max=0.01), 0.0))
    with pytest.raises(ValueError, match="coef"):
        kl_penalty_rewards(rewards, logprobs, ref, mask, coef=-1.0)


def test_the_controller_follows_its_target() -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=1000)
    assert controller.update(6.6, 100) == pytest.approx(0.1 * (1 + 0.1 * 100 / 1000))
    up = controller.value
    assert controller.update(600.0, 500) == pytest.approx(up * (1 + 0.2 * 0.5))
    restored = AdaptiveKLController(1.0, 1.0, 1.0)
    restored.load_state_dict(controller.state_dict())
    assert restored.update(0.0, 500) == controller.update(-3.0, 500)
    for bad in ((math.nan, 1), (1.0, 5000), (1.0, -1)):
        with pytest.raises(ValueError, match=r"kl|n must"):
            controller.update(*bad)
    with pytest.raises(ValueError, match="target"):
        AdaptiveKLController(0.1, target=0.0)


# --- over the whole vocabulary ----------------------------------------------------------------------------------------


def eager_kl(logits: Tensor, ref: Tensor, temperature: float) -> Tensor:
    log_p, log_q = (logits / temperature).log_softmax(-1), (ref / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 257])
@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_full_kl_and_its_gradient_match_eager(vocabulary: int, chunk: int | None, seed: int) -> None:
    logits = 3 * torch.randn(2, 7, vocabulary)
    ref = logits + torch.randn(2, 7, vocabulary)
    upstream = torch.randn(2, 7)
    results = []
    for dtype in (torch.float64, torch.float32):
        for function in (eager_kl, lambda a, b, c: full_kl(a, b, temperature=c, chunk_tokens=chunk)):
            leaf = logits.to(dtype).requires_grad_()
            value = function(leaf, ref.to(dtype), 0.7)
            (value * upstream.to(dtype)).sum().backward()
            results.append((value.detach(), leaf.grad))
    exact, ours64, eager, ours = results
    for k, name in enumerate(("value", "gradient")):
        assert torch.allclose(ours64[k], exact[k], rtol=1e-12, atol=1e-13)
        assert_as_accurate(name, ours[k], exact[k], eager[k])


def test_full_kl_gradcheck(seed: int) -> None:
    logits, ref = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: full_kl(x, ref, chunk_tokens=2), logits.requires_grad_())
    value = full_kl(logits, ref).sum()
    first = torch.autograd.grad(value, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, logits, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(value, logits, create_graph=True)


def test_full_kl_at_its_edges(seed: int) -> None:
    logits = torch.randn(4, 6)
    logits[0, 2] = -math.inf
    ref = torch.randn(4, 6)
    ref[0, 2], ref[1, 3] = -math.inf, -math.inf
    logits[2], ref[3] = math.nan, math.nan
    mask = torch.tensor([1, 1, 0, 1])
    leaf = logits.clone().requires_grad_()
    value = full_kl(leaf, ref, mask)
    value[0].backward()
    kept = [0, 1, 3, 4, 5]
    assert value[0].item() == pytest.approx(eager_kl(logits[0, kept], ref[0, kept], 1.0).item(), rel=1e-5)
    assert value[1].item() == math.inf
    assert value[2].item() == 0.0
    assert math.isnan(value[3].item())
    assert leaf.grad is not None
    assert leaf.grad[0, 2].item() == 0.0
    assert not bool(leaf.grad[2].any())
    same = torch.randn(3, 9, requires_grad=True)
    zero = full_kl(same, same.detach())
    zero.sum().backward()
    assert not bool(zero.any())
    assert not bool(same.grad.any())
    assert full_kl(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_full_kl_holds_no_second_tensor_of_the_vocabulary(seed: int) -> None:
    class Large(TorchDispatchMode):
        storages: ClassVar[set[int]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, Tensor) and x.numel() >= 64 * 50:
                    self.storages.add(x.untyped_storage().data_ptr())
            return result

    logits, ref = torch.randn(64, 50, requires_grad=True), torch.randn(64, 50)
    given = {x.untyped_storage().data_ptr() for x in (logits, ref)}
    with Large() as seen:
        value = full_kl(logits, ref, chunk_tokens=8)
        assert seen.storages <= given
        value.backward(torch.ones(64))
    assert logits.grad is not None
    assert seen.storages - given == {logits.grad.untyped_storage().data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_kl_of_low_precision_logits_is_float32(dtype: torch.dtype, seed: int) -> None:
    logits, ref = torch.randn(3, 40).to(dtype).requires_grad_(), torch.randn(3, 40).to(dtype)
    value = full_kl(logits, ref)
    exact = eager_kl(logits.detach().double(), ref.double(), 1.0)
    assert_as_accurate("value", value, exact, eager_kl(logits.detach().float(), ref.float(), 1.0))
    value.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
