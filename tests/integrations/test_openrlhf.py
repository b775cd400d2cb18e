"""fastrl inside OpenRLHF: golden cases through its loss's signature, and the installed OpenRLHF where there is one."""

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from golden import Case, cases
from oracle import assert_as_accurate
from torch import Tensor, nn

from fastrl.integrations import openrlhf as adapter
from fastrl.integrations.common.proof import AdapterMismatchError

CASES = [case for case in cases("policy") if case.peer == "OpenRLHF"]
CALL = ("dp_size", "batch_num_tokens", "global_batch_size")
NEEDS = "needs openrlhf 0.11 with deepspeed"


class HostLoss(nn.Module):
    """OpenRLHF's `PolicyLoss` as far as the patch needs it: the constructor and the signature."""

    def __init__(
        self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type="ppo",
        is_correction_level="off", is_correction_mode="mask", is_correction_gating="ratio",
        is_correction_threshold=(0.5, 5.0),
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in locals().copy().items():
            if name not in ("self", "__class__"):
                setattr(self, name, value)

    def forward(
        self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
        batch_num_tokens=None, global_batch_size=None,
    ):  # fmt: skip
        raise AssertionError("the host's own forward ran")


@pytest.fixture
def scale() -> float:
    """The host's factor on its logits."""
    return 1.0


@pytest.fixture
def host(stand_for: Any, scale: float) -> dict[str, Any]:
    class Loss(HostLoss):
        __init__ = HostLoss.__init__
        forward = HostLoss.forward

    def log_probs_from_logits(logits, labels, temperature=1.0):
        assert logits.shape[:-1].numel() <= 32, "the host's own log-probs ran on more than the proof's rows"
        logits.div_(temperature)
        return (scale * logits).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def compute_entropy(logits):
        assert logits.shape[:-1].numel() <= 32, "the host's own entropy ran on more than the proof's rows"
        logp = (scale * logits).log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    functions = {"log_probs_from_logits": log_probs_from_logits, "compute_entropy": compute_entropy}
    modules = {name: ModuleType(f"openrlhf.models.{name}") for name in ("loss", "utils", "actor")}
    vars(modules["loss"])["PolicyLoss"] = Loss
    for name in ("utils", "actor"):
        vars(modules[name]).update(functions)
    stand_for(adapter, modules)
    return modules


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_policy_loss_reproduces_openrlhf(host: dict[str, Any], case: Case) -> None:
    assert len(CASES) == 15
    x = case.leaves(torch.float64)
    given = {k: v for k, v in case.peer_config.items() if v is not None}
    module = host["loss"].PolicyLoss(**{k: v for k, v in given.items() if k not in CALL})
    with adapter.patched(prove=False):
        loss, clip_ratio, ppo_kl, vllm_kl, filtered = module(
            x["logprobs"], x["old_logprobs"], x["advantages"], action_mask=x["mask"],
            rollout_log_probs=x.get("rollout_logprobs"), **{k: v for k, v in given.items() if k in CALL},
        )  # fmt: skip
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(x)
    for name, value in [
        ("clip_fraction", clip_ratio), ("approx_kl_old", ppo_kl), ("rollout_kl", vllm_kl),
        ("filtered_fraction", filtered),
    ]:  # fmt: skip
        assert (value is None) == (name not in case.metrics), name
        if value is not None:
            assert float(value) == pytest.approx(case.metrics[name], rel=1e-6), name


def test_log_probs_and_entropy(host: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, 37, generator=g)[:, :15]
    labels = torch.randint(0, 37, (3, 15), generator=g)
    before = logits.clone()
    with adapter.patched():
        actor = host["actor"]
        logprobs, entropy = actor.log_probs_from_logits(logits, labels, 0.7), actor.compute_entropy(logits)
    assert torch.equal(logits, before)
    assert len(adapter._proofs._proved) == 2

    def exact(x: Tensor) -> tuple[Tensor, Tensor]:
        tempered, plain = (x / 0.7).log_softmax(-1), x.log_softmax(-1)
        return tempered.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(plain.exp() * plain).sum(-1)

    for got, want, plain in zip((logprobs, entropy), exact(logits.double()), exact(logits), strict=True):
        assert_as_accurate("rows", got, want, plain)


@pytest.mark.parametrize("scale", [0.9])
def test_a_host_that_scales_its_logits_is_refused(host: dict[str, Any]) -> None:
    logits, labels = torch.randn(4, 19, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    with adapter.patched():
        with pytest.raises(
            AdapterMismatchError, match=r"log_probs_from_logits\) does not reproduce the host: logprobs"
        ):
            host["actor"].log_probs_from_logits(logits, labels)
        with pytest.raises(AdapterMismatchError, match=r"compute_entropy\) does not .*: entropy .*enable\(prove=False"):
            host["actor"].compute_entropy(logits)
    with adapter.patched(prove=False):
        host["actor"].log_probs_from_logits(logits, labels)


def ppo(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
        batch_num_tokens=None, global_batch_size=None):  # fmt: skip
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    assert action_mask is not None
    return (loss * action_mask).sum() / action_mask.sum(), None, None, None, None


def test_a_loss_is_compared_with_the_hosts(host: dict[str, Any]) -> None:
    owner = host["loss"].PolicyLoss
    owner.forward = ppo
    g = torch.Generator().manual_seed(0)
    old = -3.0 * torch.rand(6, 9, generator=g)
    mask = torch.ones(6, 9)
    advantages = torch.randn(6, 9, generator=g)
    with adapter.patched():
        owner()(old, old, torch.zeros(6, 9), mask)
        assert not adapter._proofs._proved
        owner()(old, old, advantages, mask)
        assert len(adapter._proofs._proved) == 1
        with pytest.raises(AdapterMismatchError, match=r"PolicyLoss\) does not reproduce the host: the loss is"):
            owner(dual_clip=1.1)(old, old, advantages, mask)  # this host knows no dual clip
    with adapter.patched(prove=False):
        owner(dual_clip=1.1)(old, old, advantages, mask)
    assert adapter._proofs.wanted


def test_everything_comes_back(host: dict[str, Any]) -> None:
    def state() -> list[Any]:
        functions = [vars(host[path])[name] for path in ("utils", "actor")
                     for name in ("log_probs_from_logits", "compute_entropy")]  # fmt: skip
        return [host["loss"].PolicyLoss.__dict__["forward"], *functions]

    before = state()
    adapter.enable()
    with adapter.patched():
        assert all(now is not then for now, then in zip(state(), before, strict=True))
    assert adapter.enabled()
    adapter.disable()
    assert all(now is then for now, then in zip(state(), before, strict=True))
    assert not adapter.enabled()


def test_another_version_and_unknown_options_are_refused(host: dict[str, Any]) -> None:
    host["actor"].compute_entropy = lambda logits, temperature: logits
    with pytest.raises(RuntimeError, match=r"OpenRLHF .* is not supported: .*compute_entropy takes \(logits, temp"):
        adapter.enable()
    assert host["loss"].PolicyLoss.__dict__["forward"] is HostLoss.forward
    with pytest.raises(ValueError, match="policy_loss_type must be 'ppo' or 'gspo', got 'cispo'"):
        adapter.policy_loss(policy_loss_type="cispo")
    with pytest.raises(ValueError, match="is_correction_level must be"):
        adapter.policy_loss(is_correction_level="batch")
    with pytest.raises(ValueError, match="is_correction_mode must be"):
        adapter.policy_loss(is_correction_mode="drop")


def test_the_installed_openrlhf_agrees() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = pytest.importorskip("openrlhf.models.loss", reason=NEEDS, exc_type=ImportError)
    g = torch.Generator().manual_seed(0)
    old, advantages = -3.0 * torch.rand(4, 7, generator=g).double(), torch.randn(4, 7, generator=g).double()
    start = old + 0.3 * torch.randn(4, 7, generator=g).double()
    rollout = old + 0.2 * torch.randn(4, 7, generator=g).double()
    mask = torch.rand(4, 7, generator=g) > 0.3
    mask[:, 0] = True
    bands = [("off", "mask", "ratio", (0.5, 5.0)), ("token", "clip", "ratio", (0.8, 1.2)),
             ("token", "mask", "ratio", (0.8, 1.2)), ("seq", "mask", "ratio", (0.95, 1.05)),
             ("token", "mask", "tv", (0.0, 0.03)), ("seq", "mask", "binary_kl", (0.0, 0.01))]  # fmt: skip
    originals = [vars(loss.PolicyLoss)["forward"]]
    for kind in ("ppo", "gspo"):
        for dual in (None, 1.5):
            for by_token in (True, False):
                for level, mode, gating, band in bands:
                    module = loss.PolicyLoss(0.1, 0.2, dual, by_token, kind, level, mode, gating, band)
                    for counts in ({}, {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 9.0}):
                        results = []
                        for on in (False, True):
                            leaf = start.clone().requires_grad_()
                            call = (leaf, old, advantages, mask, rollout)
                            if on:
                                with adapter.patched():
                                    out = module(*call, **counts)
                            else:
                                out = module(*call, **counts)
                            out[0].backward()
                            results.append([*out, leaf.grad])
                        for theirs, ours in zip(*results, strict=True):
                            assert (theirs is None) == (ours is None)
                            if theirs is not None:
                                assert torch.allclose(ours.double(), theirs.double(), rtol=1e-6, atol=1e-9)
    assert vars(loss.PolicyLoss)["forward"] is originals[0]
