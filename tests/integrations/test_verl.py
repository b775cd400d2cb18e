"""fastrl inside verl: golden cases through verl's signatures, and the installed verl beside it where there is one."""

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden import Case, cases
from oracle import assert_as_accurate
from torch import Tensor

from fastrl.integrations import verl as adapter
from fastrl.integrations.common.proof import AdapterMismatchError
from fastrl.integrations.verl import _fused, _losses
from fastrl.losses.policy import PolicyLoss, RolloutCorrection

NEEDS_VERL = "needs verl 0.9 and tensordict, omegaconf, hydra-core, codetiming, ray, torchdata"

# verl adds its KL outside the policy loss. Bypass mode computes weights and rejection before it calls one of these.
OUTSIDE = ("+kl_", "bypass_")
POLICY = [c for c in cases("policy") if c.peer == "verl" and not any(mark in c.id for mark in OUTSIDE)]
ADVANTAGE = {
    "grpo": "grpo", "dr_grpo": "grpo", "grpo_vectorized": "grpo", "opo": "opo", "gpg": "gpg", "passk": "grpo_passk",
    "rf++": "reinforce_plus_plus", "rf++b": "reinforce_plus_plus_baseline", "remax": "remax",
}  # fmt: skip


def loss_name(case: Case) -> str:
    name = case.id.removeprefix("policy__verl__").rpartition("__")[0]
    name = name.removesuffix("_token_advantages")
    return "fastrl_vanilla" if name.startswith("dual_clip") else f"fastrl_{name}"


def config_of(case: Case) -> SimpleNamespace:
    given = {k: v for k, v in case.peer_config.items() if v is not None}
    given["policy_loss"] = SimpleNamespace(**given.get("policy_loss", {}))
    return SimpleNamespace(**{"global_batch_info": {}, **given})


@pytest.mark.parametrize("case", POLICY, ids=lambda case: case.id)
def test_losses_reproduce_verl(case: Case) -> None:
    assert len(POLICY) == 35
    x = case.leaves(torch.float64)
    weights = None
    if case.hyper.get("correction"):
        names = {field.name for field in dataclasses.fields(RolloutCorrection)}
        correction = RolloutCorrection(**{k: v for k, v in case.hyper["correction"].items() if k in names})
        weights = correction.weights(x["old_logprobs"], x["rollout_logprobs"], x["mask"])
    mask = case.outputs.get("effective_mask", x["mask"])
    advantages = x["advantages"]
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1).expand(mask.shape)
    loss, metrics = adapter.LOSSES[loss_name(case)](
        old_log_prob=x["old_logprobs"],
        log_prob=x["logprobs"],
        advantages=advantages,
        response_mask=mask.bool(),
        loss_agg_mode=case.peer_config["loss_agg_mode"],
        config=config_of(case),
        rollout_is_weights=weights,
    )
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(x)
    assert all(not value.requires_grad and value.dim() == 0 for value in metrics.values())


def wider_clip(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights=None):
    """Stand for a verl whose PPO loss is another one: no dual clip, and a clip that is wider by config.extra."""
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio + config.extra)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return (loss * response_mask).sum() / response_mask.sum(), {}


def test_the_first_loss_is_compared_with_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(POLICY_LOSS_REGISTRY={"vanilla": wider_clip})
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", core)
    g = torch.Generator().manual_seed(0)
    old, advantages, mask = -3 * torch.rand(6, 9, generator=g), torch.randn(6, 9, generator=g), torch.ones(6, 9)
    call = (old, old, advantages, mask, "token-mean")
    proofs = _losses.proofs
    proofs.forget()
    with pytest.raises(AdapterMismatchError, match=r"fastrl_vanilla\) does not reproduce the host: .*prove=False"):
        adapter.LOSSES["fastrl_vanilla"](*call, SimpleNamespace(clip_ratio=0.2, clip_ratio_c=50.0, extra=0.1))
    with proofs.asked(False):
        adapter.LOSSES["fastrl_vanilla"](*call, SimpleNamespace(clip_ratio=0.2, clip_ratio_c=50.0, extra=0.1))
    same = SimpleNamespace(clip_ratio=0.2, clip_ratio_c=50.0, extra=0.0)
    adapter.LOSSES["fastrl_vanilla"](old, old, torch.zeros(6, 9), mask, "token-mean", same)
    assert not proofs._proved
    adapter.LOSSES["fastrl_vanilla"](*call, same)
    assert len(proofs._proved) == 1
    proofs.forget()


ADVANTAGE_CASES = [
    (case, ADVANTAGE[name])
    for case in cases("advantage")
    if case.peer == "verl" and (name := case.id.removeprefix("advantage__verl__adv_").rpartition("__")[0]) in ADVANTAGE
]


@pytest.mark.parametrize(("case", "name"), ADVANTAGE_CASES, ids=lambda value: getattr(value, "id", value))
def test_estimators_reproduce_verl(case: Case, name: str) -> None:
    assert len(ADVANTAGE_CASES) == 9
    x = case.leaves(torch.float64)
    rewards = x.get("token_rewards")
    if rewards is None:
        rewards = torch.zeros(x["mask"].shape, dtype=torch.float64)
        rewards[:, -1] = x["rewards"]
    config = SimpleNamespace(gamma=case.hyper["gamma"], norm_adv_by_std_in_grpo=case.hyper["scale"] == "group")
    extra = {"reward_baselines": x["baseline_rewards"]} if name == "remax" else {}
    uids = [f"prompt-{i}" for i in x["group_ids"].tolist()] if "group_ids" in x else None
    advantages, returns = adapter.ESTIMATORS[f"fastrl_{name}"](
        token_level_rewards=rewards, response_mask=x["mask"], config=config, index=uids, **extra
    )
    case.check("advantages", advantages)
    if "returns" in case.outputs:
        case.check("returns", returns)


def batch(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(4, 6, generator=g, dtype=torch.float64) * 3.0
    mask = torch.rand(4, 6, generator=g) > 0.25
    mask[:, 0] = True
    return {
        "old_log_prob": old,
        "log_prob": (old + 0.4 * torch.randn(4, 6, generator=g, dtype=torch.float64)).clamp(max=-1e-3),
        "advantages": torch.randn(4, 6, generator=g, dtype=torch.float64),
        "response_mask": mask,
    }


def config(**fields: Any) -> SimpleNamespace:
    defaults = {
        "clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0, "tau_pos": 1.0,
        "tau_neg": 1.05, "global_batch_info": {}, "policy_loss": SimpleNamespace(dro_beta=0.5, kl_cov_ratio=0.2),
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **fields})


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_ranks_add_up_to_the_whole_batch(mode: str) -> None:
    whole = batch()
    loss = adapter.LOSSES["fastrl_vanilla"]
    expected, _ = loss(**whole, loss_agg_mode=mode, config=config())
    info = {"dp_size": 2, "batch_num_tokens": int(whole["response_mask"].sum()), "global_batch_size": 4}
    halves = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    parts = [loss(**half, loss_agg_mode=mode, config=config(global_batch_info=info))[0] for half in halves]
    assert_as_accurate("loss", sum(parts) / 2.0, expected, expected.float())


def test_extra_losses_are_those_of_the_presets() -> None:
    x = batch()
    arguments = {"advantages": x["advantages"], "mask": x["response_mask"], "old_logprobs": x["old_log_prob"]}
    for name, mode, fields in [
        ("dapo", "token-mean", {"clip_low": 0.2, "clip_high": 0.28}),
        ("luspo", "seq-mean-token-sum", {"clip_low": 0.2, "clip_high": 0.28}),
        ("vespo", "token-mean", {}),
        ("topr", "token-mean", {}),
    ]:
        result, _ = adapter.LOSSES[f"fastrl_{name}"](**x, loss_agg_mode=mode, config=config())
        assert result == PolicyLoss.preset(name, **fields)(x["log_prob"], **arguments).loss


def test_what_does_not_fit_is_refused() -> None:
    x, losses = batch(), adapter.LOSSES
    with pytest.raises(ValueError, match="needs loss_agg_mode 'token-mean', got 'token-sum'"):
        losses["fastrl_dapo"](**x, loss_agg_mode="token-sum", config=config())
    with pytest.raises(ValueError, match=r"loss_agg_mode must be one of .*, got 'mean'"):
        losses["fastrl_vanilla"](**x, loss_agg_mode="mean", config=config())
    with pytest.raises(ValueError, match="needs batch_num_tokens when dp_size > 1"):
        losses["fastrl_vanilla"](**x, config=config(global_batch_info={"dp_size": 2}))
    with pytest.raises(ValueError, match=r"needs policy_loss\.dro_beta"):
        losses["fastrl_dro"](**x, config=config(policy_loss=None))
    with pytest.raises(ValueError, match="rollout_is_weights with fastrl_dro"):
        losses["fastrl_dro"](**x, config=config(), rollout_is_weights=torch.ones(4, 6))
    with pytest.raises(ValueError, match="config=None"):
        losses["fastrl_vanilla"](**x)
    with pytest.raises(ValueError, match="neither clip_ratio_low nor clip_ratio"):
        losses["fastrl_gspo"](**x, config=config(clip_ratio=None, clip_ratio_low=None))
    with pytest.raises(ValueError, match="kl_to='ref'"):
        adapter.policy_loss(PolicyLoss.preset("grpo"))
    with pytest.raises(ValueError, match="rollout log-probs"):
        adapter.policy_loss(PolicyLoss.preset("dppo_tv", style="prime"))
    with pytest.raises(ValueError, match="entropy_coef"):
        adapter.policy_loss(PolicyLoss(entropy_coef=0.1))
    with pytest.raises(ValueError, match="loss_agg_mode must be 'token-mean'"):
        adapter.policy_loss(PolicyLoss())(**x, loss_agg_mode="token-sum", config=config())
    with pytest.raises(ValueError, match="needs index"):
        adapter.ESTIMATORS["fastrl_grpo"](torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(TypeError, match="does not take values"):
        adapter.ESTIMATORS["fastrl_grpo"](torch.zeros(2, 3), torch.ones(2, 3), [0, 0], values=1)


class StandIn:
    """verl's `FusedLinearForPPO`, by its formula: the proof needs something to compare with."""

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logits = (hidden_states @ vocab_weights.t()).float() / temperature
        logprobs = logits.log_softmax(-1)
        return logprobs.gather(-1, input_ids.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


class Softcapped(StandIn):
    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logits = 2.0 * torch.tanh((hidden_states @ vocab_weights.t()) / 2.0).float() / temperature
        logprobs = logits.log_softmax(-1)
        return logprobs.gather(-1, input_ids.unsqueeze(-1)).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


@pytest.fixture
def stand_in(stand_for: Any) -> Any:
    def use(owner: type) -> None:
        stand_for(_fused, {"torch_functional": SimpleNamespace(FusedLinearForPPO=owner)})

    return use


def head(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, generator=g, dtype=torch.float64).to(dtype) for n in (40, 64))
    ids = torch.randint(0, 64, (40,), generator=g)
    return hidden.view(2, 20, 16), weight, ids.view(2, 20)


@pytest.mark.parametrize("temperature", [0.7, torch.linspace(0.5, 2.0, 40).view(2, 20)], ids=["one", "per_token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_logprobs_take_verls_place(stand_in: Any, dtype: torch.dtype, temperature: Any) -> None:
    class Owner(StandIn):
        forward = StandIn.forward

    original = Owner.__dict__["forward"]
    stand_in(Owner)
    hidden, weight, ids = head(dtype)
    hidden.requires_grad_()
    with adapter.patched():
        assert adapter.enabled()
        assert Owner.__dict__["forward"] is not original
        logprobs, entropy = Owner().forward(hidden, weight, ids, temperature)
    assert Owner.__dict__["forward"] is original
    assert not adapter.enabled()
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    exact = StandIn().forward(hidden.detach().double(), weight.double(), ids, scale)
    plain = StandIn().forward(hidden.detach().float(), weight.float(), ids, scale)
    assert_as_accurate("log_probs", logprobs, exact[0].double(), plain[0])
    assert_as_accurate("entropy", entropy, exact[1].double(), plain[1])
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    squares = adapter.sum_pi_squared(hidden, weight, ids, temperature)
    logits = (hidden.detach().double() @ weight.double().t()) / scale
    assert_as_accurate("sum_pi_squared", squares, logits.softmax(-1).square().sum(-1), squares.float())


def test_a_head_that_does_more_is_noticed(stand_in: Any) -> None:
    stand_in(Softcapped)
    hidden, weight, ids = head()
    with adapter.patched(), pytest.raises(AdapterMismatchError, match=r"verl\.disable"):
        Softcapped().forward(hidden, weight, ids)


def test_another_signature_is_refused_in_one_line(stand_in: Any) -> None:
    class Renamed:
        def forward(self, hidden, weight):
            return hidden, weight

    stand_in(Renamed)
    with pytest.raises(RuntimeError, match=r"verl .* is not supported: .*forward takes \(self, hidden, weight\)"):
        adapter.enable()
    assert not adapter.enabled()


def test_importing_the_adapter_does_not_import_verl() -> None:
    code = "import sys, fastrl.integrations.verl; assert 'verl' not in sys.modules; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is installed")
def test_registering_without_verl_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match=r"needs verl \(tested with 0\.9\.1\)"):
        adapter.register()


@pytest.fixture(scope="module")
def core() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("verl.trainer.ppo.core_algos", reason=NEEDS_VERL, exc_type=ImportError)
        yield module


def actor_config(loss_mode: str = "vanilla", **fields: Any) -> Any:
    from verl.workers.config import ActorConfig, PolicyLossConfig

    policy = PolicyLossConfig(
        loss_mode=loss_mode,
        clip_cov_ratio=1.0,
        clip_cov_lb=0.01,
        clip_cov_ub=5.0,
        kl_cov_ratio=0.2,
        ppo_kl_coef=0.5,
        dro_beta=0.5,
    )
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.28,
        policy_loss=policy, **fields,
    )  # fmt: skip


OWN = ("vanilla", "dppo_tv", "dppo_kl", "gspo", "sapo", "gpg", "clip_cov", "kl_cov", "geo_mean", "dro", "cispo")
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
INFO = {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 8, "loss_scale_factor": 5}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "rollout_is"])
@pytest.mark.parametrize("name", OWN)
def test_the_installed_verl_agrees(core: Any, name: str, weighted: bool) -> None:
    if weighted and name in ("dro", "kl_cov"):
        pytest.skip("refused: verl weighs the penalty of these losses too")
    adapter.register()
    try:
        for mode, info in itertools.product(MODES, ({}, INFO)):
            results = []
            for registered in (name, f"fastrl_{name}"):
                x = batch(3)
                x["log_prob"].requires_grad_()
                weights = torch.linspace(0.3, 2.0, 24, dtype=torch.float64).view(4, 6) if weighted else None
                options = actor_config()
                options.global_batch_info.update(info)
                fn = core.get_policy_loss_fn(registered)
                loss, metrics = fn(**x, loss_agg_mode=mode, config=options, rollout_is_weights=weights)
                loss.backward()
                results.append((loss.detach(), x["log_prob"].grad, metrics))
            (theirs, their_grad, their_metrics), (ours, our_grad, our_metrics) = results
            assert torch.allclose(ours, theirs, rtol=1e-7, atol=0.0), (mode, info)
            assert torch.allclose(our_grad, their_grad, rtol=1e-6, atol=1e-12), (mode, info)
            assert set(our_metrics) == set(their_metrics)
            for key, value in their_metrics.items():
                assert float(our_metrics[key]) == pytest.approx(value, rel=1e-5, abs=1e-7), key
    finally:
        adapter.unregister()


def test_the_installed_verl_runs_its_ppo_loss_on_it(core: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensordict import TensorDict
        from verl.workers.utils import losses

    lengths = [(3, 4), (2, 6), (5, 1)]
    g = torch.Generator().manual_seed(0)

    def nested(parts: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    adapter.register()
    try:
        tokens = [torch.randn(p + r, generator=g, dtype=torch.float64) - 3.0 for p, r in lengths]
        response = {
            name: nested([torch.randn(r, generator=g, dtype=torch.float64) + shift for _, r in lengths])
            for name, shift in (("old_log_probs", -3.0), ("advantages", 0.0))
        }
        results = []
        for mode in ("vanilla", "fastrl_vanilla"):
            leaves = [t.clone().requires_grad_() for t in tokens]
            data = TensorDict(
                {
                    "prompts": nested([torch.zeros(p, dtype=torch.long) for p, _ in lengths]),
                    "responses": nested([torch.zeros(r, dtype=torch.long) for _, r in lengths]),
                    "response_mask": nested([torch.ones(r, dtype=torch.long) for _, r in lengths]),
                    "attention_mask": nested([torch.ones(p + r, dtype=torch.long) for p, r in lengths]),
                    **response,
                },
                batch_size=[3],
            )
            for key, value in {"dp_size": 1, "batch_num_tokens": 11, "global_batch_size": 3}.items():
                data.set_non_tensor(key, value)
            options = actor_config(mode, use_kl_loss=False)
            loss, metrics = losses.ppo_loss(options, {"log_probs": nested(leaves)}, data)
            loss.backward()
            results.append((loss.detach(), torch.cat([t.grad for t in leaves]), set(metrics)))
        assert torch.allclose(results[0][0], results[1][0], rtol=1e-12)
        assert torch.allclose(results[0][1], results[1][1], rtol=1e-10)
        assert results[0][2] == results[1][2]
        assert results[0][1].abs().sum() > 0
    finally:
        adapter.unregister()


def test_the_installed_verls_registries_come_back(core: Any) -> None:
    before = [dict(core.POLICY_LOSS_REGISTRY), dict(core.ADV_ESTIMATOR_REGISTRY)]
    adapter.unregister()
    clean = [dict(core.POLICY_LOSS_REGISTRY), dict(core.ADV_ESTIMATOR_REGISTRY)]
    assert set(adapter.register()) == {*adapter.LOSSES, *adapter.ESTIMATORS}
    adapter.register()
    adapter.register_loss("mine", PolicyLoss.preset("dapo", clip_high=0.3))
    assert "mine" in core.POLICY_LOSS_REGISTRY
    with pytest.raises(ValueError, match="'vanilla' already"):
        adapter.register_loss("vanilla", PolicyLoss())
    with pytest.raises(ValueError, match="unknown name 'fastrl_nothing'"):
        adapter.register(["fastrl_nothing"])
    adapter.unregister()
    assert clean == [core.POLICY_LOSS_REGISTRY, core.ADV_ESTIMATOR_REGISTRY]
    for left, right in zip(before, clean, strict=True):
        assert all(left[name] is right[name] for name in right)


def test_the_installed_verls_fused_function_is_replaced_and_comes_back(core: Any) -> None:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    original = FusedLinearForPPO.__dict__["forward"]
    hidden, weight, ids = head()
    with adapter.patched():
        ours = FusedLinearForPPO().forward(hidden, weight, ids, 0.7)
    assert FusedLinearForPPO.__dict__["forward"] is original
    theirs = FusedLinearForPPO().forward(hidden, weight, ids, 0.7)
    exact = StandIn().forward(hidden.double(), weight.double(), ids, 0.7)
    for name, got, want, plain in zip(("log_probs", "entropy"), ours, exact, theirs, strict=True):
        assert_as_accurate(name, got, want.double(), plain)
