"""fastrl inside SkyRL: golden cases through its losses' signature, its own losses beside them where it is installed."""

import pickle
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from golden import Case, cases
from hosts import losses, skyrl_losses
from hosts.skyrl_losses import batch
from oracle import assert_as_accurate

from fastrl.integrations import skyrl as adapter
from fastrl.integrations.common.proof import AdapterMismatchError
from fastrl.losses.policy import PolicyLoss

# The reductions are SkyRL's own: they scale the advantages before any loss is called. Cross-entropy is left to SkyRL.
CASES = [
    case for case in cases("policy")
    if case.peer == "SkyRL" and "reduction_" not in case.id and "cross_entropy" not in case.id
]  # fmt: skip
NAMES = {"dual": "dual_clip", "importance": "importance_sampling", "dppo_kl": "dppo", "tis_token": "regular",
         "tis_sequence": "regular"}  # fmt: skip
NEEDS = "needs skyrl (ray, jaxtyping, loguru, omegaconf)"


def correction(**fields: Any) -> SimpleNamespace:
    defaults = {
        "tis_ratio_type": None, "token_tis_ratio_clip_high": 1.1, "sequence_tis_ratio_clip_high": 1.3,
        "sequence_mask_metric": None, "geo_mask_high": 1.1, "geo_mask_low": 0.9, "product_mask_high": 1.6,
        "product_mask_low": 0.6, "outlier_token_is_threshold_low": None, "outlier_token_is_threshold_high": None,
        "token_mask_is_threshold_low": None, "token_mask_is_threshold_high": None,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **fields})


def config(**fields: Any) -> SimpleNamespace:
    defaults = {
        "policy_loss_type": "fastrl_regular", "eps_clip_low": 0.2, "eps_clip_high": 0.28, "clip_ratio_c": 1.5,
        "loss_reduction": "sequence_mean", "off_policy_correction": correction(),
        "sapo": SimpleNamespace(tau_pos=1.0, tau_neg=1.05),
        "cispo": SimpleNamespace(cispo_anchor="old", cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.3),
        "dppo": SimpleNamespace(dppo_type="binary_tv", delta_low=0.05, delta_high=0.1),
        "kl_cov": SimpleNamespace(kl_cov_frac=0.2, ppo_kl_coef=0.5),
        "clip_cov": SimpleNamespace(clip_ratio=0.2, clip_cov_lb=0.05, clip_cov_ub=5.0),
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **fields})


def config_of(case: Case) -> SimpleNamespace:
    given: dict[str, Any] = {
        key: SimpleNamespace(**value) if isinstance(value, dict) and key != "off_policy_correction" else value
        for key, value in case.peer_config.items()
    }
    given["off_policy_correction"] = correction(**case.peer_config["off_policy_correction"])
    return config(**given)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_losses_reproduce_skyrl(case: Case) -> None:
    assert len(CASES) == 13
    x = case.leaves(torch.float64)
    name = case.id.removeprefix("policy__skyrl__").rpartition("__")[0]
    loss, metrics = adapter.PolicyLossFunction(NAMES.get(name, name), prove=False)(
        x["logprobs"], x["old_logprobs"], x["advantages"], config_of(case), x["mask"], x.get("rollout_logprobs")
    )
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(x)
    if "clip_fraction" in case.metrics and "importance" not in name:
        assert metrics["clip_ratio"] == pytest.approx(case.metrics["clip_fraction"])
    assert all(isinstance(value, float) for value in metrics.values())


class Registry:
    """SkyRL's registry of one process, as far as the adapter needs it."""

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}

    def register(self, name: str, func: Any) -> None:
        if name in self.functions:
            raise ValueError(f"{name} already registered")
        self.functions[name] = func

    def unregister(self, name: str) -> None:
        del self.functions[name]

    def get(self, name: str) -> Any:
        return self.functions[name]

    def list_available(self) -> list[str]:
        return list(self.functions)


def ppo_policy_loss(log_probs, old_log_probs, advantages, config, loss_mask=None, rollout_logprobs=None):
    """Stand for SkyRL's PPO; `extra` widens its clip."""
    assert config.policy_loss_type == "regular"
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - config.eps_clip_low, 1 + config.eps_clip_high + getattr(config, "extra", 0.0))
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    assert loss_mask is not None
    return (loss * loss_mask).sum(), {"clip_ratio": 0.0}


@pytest.fixture
def host(stand_for: Any) -> Iterator[ModuleType]:
    module = ModuleType("ppo_utils")
    vars(module).update(ppo_policy_loss=ppo_policy_loss, PolicyLossRegistry=Registry())
    vars(module)["PolicyLossRegistry"].register("regular", ppo_policy_loss)
    stand_for(adapter, {"ppo_utils": module})
    yield module
    adapter.unregister()


def test_names_come_and_go(host: ModuleType) -> None:
    registry = host.PolicyLossRegistry
    before = dict(registry.functions)
    assert set(adapter.register()) == {f"fastrl_{name}" for name in adapter.FORMS}
    adapter.register()
    adapter.register_loss("my_topr", PolicyLoss.preset("topr", aggregate="token_sum"))
    with pytest.raises(ValueError, match="has a policy loss 'regular' already"):
        adapter.register_loss("regular", PolicyLoss(aggregate="token_sum"))
    assert pickle.loads(pickle.dumps(registry.functions["fastrl_gspo"])) == registry.functions["fastrl_gspo"]
    adapter.unregister()
    assert registry.functions == before
    assert registry.functions["regular"] is ppo_policy_loss
    with pytest.raises(ValueError, match=r"unknown name 'ppo'; known: regular, dual_clip"):
        adapter.register(["ppo"])


def test_the_first_call_is_compared_with_the_host(host: ModuleType) -> None:
    logprobs, old, advantages, mask, _ = batch()
    adapter.register(["regular"])
    function = host.PolicyLossRegistry.get("fastrl_regular")
    with pytest.raises(AdapterMismatchError, match=r"fastrl_regular\) does not reproduce the host: .*prove=False"):
        function(logprobs, old, advantages, config(extra=0.05), mask)
    adapter.PolicyLossFunction("regular", prove=False)(logprobs, old, advantages, config(extra=0.05), mask)
    function(old, old, torch.zeros_like(advantages), config(extra=0.05), mask)
    loss, metrics = function(logprobs, old, advantages, config(), mask)
    assert len(adapter._proofs._proved) == 1
    known = config(policy_loss_type="regular")
    expected = ppo_policy_loss(logprobs, old, advantages, known, mask)[0]
    assert_as_accurate("loss", loss, expected, expected.float())
    assert set(metrics) == {"clip_ratio"}


def test_any_loss_can_be_registered(host: ModuleType) -> None:
    logprobs, old, advantages, mask, rollout = batch()
    loss = PolicyLoss.preset("dppo_kl", ratio_anchor="rollout", aggregate="token_sum")
    adapter.register_loss("mine", loss)
    result, metrics = host.PolicyLossRegistry.get("mine")(
        logprobs, old, advantages, config=config(), loss_mask=mask, rollout_logprobs=rollout
    )
    expected = loss(logprobs, advantages=advantages, mask=mask, old_logprobs=old, rollout_logprobs=rollout)
    assert torch.equal(result, expected.loss)
    clipped, count = expected.metrics["clip_fraction"]
    assert metrics == {"clip_ratio": pytest.approx(float(clipped / count))}
    for wrong, message in [
        (PolicyLoss(), "must be 'token_sum'"),
        (PolicyLoss(aggregate="token_sum", kl="k3", entropy_coef=0.1), r"do not take kl_to='ref' .*, entropy_coef"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapter.register_loss("wrong", wrong)
    with pytest.raises(TypeError, match="must be a PolicyLoss, got str"):
        adapter.register_loss("wrong", "gspo")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("rollout_is", {}, "fastrl_rollout_is needs rollout_logprobs, got None"),
        ("cispo", {"cispo": SimpleNamespace(cispo_anchor="mixed")}, "must be 'old' or 'rollout', got 'mixed'"),
        ("dppo", {"dppo": SimpleNamespace(dppo_type="top_k")}, "must be 'binary_tv' or 'binary_kl', got 'top_k'"),
        ("kl_cov", {"off_policy_correction": correction(tis_ratio_type="token")}, "has no effect in SkyRL's 'kl_cov'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, fields: dict[str, Any], message: str) -> None:
    logprobs, old, advantages, mask, _ = batch()
    with pytest.raises(ValueError, match=message):
        adapter.PolicyLossFunction(name, prove=False)(logprobs, old, advantages, config(**fields), mask)


def test_unknown_corrections_are_refused() -> None:
    logprobs, old, advantages, mask, rollout = batch()
    for option, value in (("tis_ratio_type", "batch"), ("sequence_mask_metric", "median")):
        wrong = config(off_policy_correction=correction(**{option: value}))
        with pytest.raises(ValueError, match=f"off_policy_correction.{option} must be None, .* got '{value}'"):
            adapter.PolicyLossFunction("gspo", prove=False)(logprobs, old, advantages, wrong, mask, rollout)


def test_another_version_is_refused(host: ModuleType) -> None:
    vars(host)["ppo_policy_loss"] = lambda log_probs, batch: None
    with pytest.raises(RuntimeError, match=r"SkyRL .* is not supported: .*takes \(log_probs, batch\), expected \(log_"):
        adapter.register()


def test_the_installed_skyrl_agrees() -> None:
    pytest.importorskip(adapter._MODULE, reason=NEEDS, exc_type=ImportError)
    tally = losses.compare(skyrl_losses.comparisons())
    assert tally.complaints == []
    assert tally.batches == 122
