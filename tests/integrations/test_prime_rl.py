"""fastrl inside prime-rl: golden cases through its hook for custom losses, its own losses beside them where it is."""

from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from golden import Case, cases
from hosts import losses, prime_rl_losses
from torch import Tensor

from fastrl.integrations import prime_rl as adapter
from fastrl.integrations.common.proof import AdapterMismatchError
from fastrl.losses.policy import PolicyLoss

CASES = [case for case in cases("policy") if case.peer == "prime-rl"]
NEEDS = "needs prime_rl (prime-rl-configs, jaxtyping, beartype, wandb)"
OPTIONS = {
    "default": ("dppo_mask_low", "dppo_mask_high", "adv_tau", "kl_tau"), "ipo": ("ipo_threshold", "adv_tau", "kl_tau"),
    "ref_kl": (), "ce": (),
}  # fmt: skip


@dataclass
class LossInputs:
    """prime-rl's columns of one sequence."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


def default_loss_fn(inputs, loss_config):
    """Stand for prime-rl's default loss; `bound` moves its trust region."""
    x = inputs.trainer_logprobs - inputs.inference_logprobs
    moved = inputs.trainer_logprobs.exp() - inputs.inference_logprobs.exp()
    bounds = (loss_config.dppo_mask_high + loss_config.bound, loss_config.dppo_mask_low)
    out = torch.where(inputs.advantages > 0, moved > bounds[0], moved < -bounds[1])
    gain = torch.where(out, 0.0, loss_config.adv_tau * inputs.advantages * x.exp())
    term = loss_config.kl_tau * x**2 - gain
    return LossOutputs((inputs.loss_mask * term).sum(), {})


@pytest.fixture
def host(stand_for: Any) -> ModuleType:
    module = ModuleType("loss")
    module.bound = 0.0  # type: ignore[attr-defined]
    vars(module).update(
        LossOutputs=LossOutputs,
        default_loss_fn=default_loss_fn,
        DefaultLossConfig=lambda **options: SimpleNamespace(**options, bound=module.bound),
    )
    stand_for(adapter, {"loss": module, "trainer": module})  # the losses, and their configurations
    return module


def rows(x: dict[str, Tensor]) -> list[LossInputs]:
    """Return a batch as prime-rl hands it over, sequence by sequence."""
    nothing = torch.zeros_like(x["logprobs"]).detach()
    return [
        LossInputs(
            x["logprobs"][i],
            x.get("rollout_logprobs", nothing)[i],
            x["ref_logprobs"][i] if "ref_logprobs" in x else None,
            x.get("advantages", nothing)[i],
            x["mask"][i] != 0,
        )
        for i in range(len(x["mask"]))
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_losses_reproduce_prime_rl(host: ModuleType, case: Case) -> None:
    assert len(CASES) == 4
    x = case.leaves(torch.float64)
    name = case.id.removeprefix("policy__prime_rl__").rpartition("__")[0]
    options = {key: case.peer_config[key] for key in OPTIONS[name]}
    outputs = [getattr(adapter, f"{name}_loss")(row, prove=False, **options) for row in rows(x)]
    loss = torch.stack([output.loss for output in outputs]).sum()
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(x)
    assert all(not value.requires_grad and value.dim() == 0 for o in outputs for value in o.metrics.values())


def row(seed: int = 0, weighted: bool = False, spread: float = 0.4) -> LossInputs:
    return LossInputs(**prime_rl_losses.sequence(seed, weighted, spread))


def test_the_first_call_is_compared_with_the_host(host: ModuleType) -> None:
    host.bound = 0.1  # type: ignore[attr-defined]
    with pytest.raises(AdapterMismatchError, match=r"default_loss\) does not reproduce the host: .*prove=false"):
        adapter.default_loss(row())
    adapter.default_loss(row(), prove=False)
    host.bound = 0.0  # type: ignore[attr-defined]
    adapter.default_loss(replace(row(), loss_mask=torch.zeros(24, dtype=torch.bool)))
    assert not adapter._proofs._proved
    adapter.default_loss(row())
    assert len(adapter._proofs._proved) == 1


def test_what_stands_under_the_mask_has_no_effect(host: ModuleType) -> None:
    inputs = row(weighted=True)
    broken = {
        name: torch.where(inputs.loss_mask, getattr(inputs, name), torch.nan)
        for name in ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages", "loss_weights")
    }
    for name in OPTIONS:
        function = getattr(adapter, f"{name}_loss")
        plain, other = function(inputs, prove=False), function(replace(inputs, **broken), prove=False)
        assert torch.equal(plain.loss, other.loss)
        assert plain.metrics == other.metrics


def test_any_loss_by_name(host: ModuleType) -> None:
    inputs = row()
    outputs = adapter.policy_loss(inputs, preset="cispo", weight_high=2.0)
    loss = PolicyLoss.preset("cispo", weight_high=2.0, aggregate="token_sum")
    offsets = torch.tensor([0, 24])
    expected = loss(
        inputs.trainer_logprobs, advantages=inputs.advantages, mask=inputs.loss_mask,
        old_logprobs=inputs.inference_logprobs, cu_seqlens=offsets,
    )  # fmt: skip
    assert torch.equal(outputs.loss, expected.loss)
    assert set(outputs.metrics) == {"policy_loss", "ratio", "clip_fraction"}
    weights = 2.0 * torch.ones(24).double()
    twice = adapter.policy_loss(replace(inputs, loss_weights=weights), preset="cispo", weight_high=2.0)
    assert torch.allclose(twice.loss, 2.0 * expected.loss)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"preset": "gspo", "aggregate": "token_mean"}, "must be 'token_sum', prime-rl dividing by its own count"),
        ({"preset": "ppo", "entropy_coef": 0.1}, "entropy_coef must be 0"),
        ({"preset": "dpo"}, "unknown preset 'dpo'"),
        ({"preset": "grpo", "kl": "k3", "kl_coef": 0.1}, "loss_weights with preset='grpo' are not supported"),
        ({"preset": "sft"}, "loss_weights with preset='sft' are not supported"),
    ],
)
def test_what_does_not_fit_is_refused(host: ModuleType, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.policy_loss(row(weighted=True), **kwargs)


def test_options_are_checked(host: ModuleType) -> None:
    with pytest.raises(ValueError, match="kl_tau"):
        adapter.default_loss(row(), kl_tau=-1.0)
    with pytest.raises(TypeError, match="ipo_threshold"):
        adapter.default_loss(row(), ipo_threshold=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="needs ref_logprobs, got None"):
        adapter.ref_kl_loss(replace(row(), ref_logprobs=None))


def test_another_version_is_refused(host: ModuleType) -> None:
    vars(host)["default_loss_fn"] = lambda logprobs, config: None
    with pytest.raises(
        RuntimeError, match=r"prime-rl .* is not supported: .*takes \(logprobs, config\), expected \(in"
    ):
        adapter.default_loss(row())


def test_the_installed_prime_rl_agrees() -> None:
    pytest.importorskip(adapter._MODULE, reason=NEEDS, exc_type=ImportError)
    pytest.importorskip(adapter._CONFIGS, reason=NEEDS, exc_type=ImportError)
    tally = losses.compare(prime_rl_losses.comparisons())
    assert tally.complaints == []
    assert tally.batches == 24
