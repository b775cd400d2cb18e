"""fastrl inside NeMo-RL: golden cases through its loss's protocol, its own class beside it where it is installed."""

import pickle
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from golden import Case, cases
from hosts import losses, nemo_rl_losses
from hosts.nemo_rl_losses import batch, counts
from torch import Tensor

from fastrl.integrations import nemo_rl as adapter
from fastrl.integrations.common.proof import AdapterMismatchError

CASES = [case for case in cases("policy") if case.peer == "NeMo-RL"]
NEEDS = "needs nemo_rl with its loss_functions importable (torch, transformers, pydantic, hydra-core, ray)"


class Kind(Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"
    LOGPROB = "logprob"


class ClippedPGLossFn:
    """NeMo-RL's class as far as the adapter needs it; its loss is PPO's clip, mean over tokens."""

    bound = 1.2

    def __init__(self, cfg, use_fused_linear_logprobs=False) -> None:
        self.cfg = cfg
        self.input_type, self.loss_type = Kind.LOGPROB, Kind.TOKEN_LEVEL
        self.metric_normalizations: dict[str, Any] = {}

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
        ratio = (next_token_logprobs - data["prev_logprobs"][:, 1:]).exp()
        advantages = data["advantages"][:, 1:]
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, self.bound) * advantages)
        return (loss * mask).sum() / (global_valid_toks + 1e-8), {}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, stand_for: Any) -> dict[str, ModuleType]:
    """Stand for NeMo-RL's modules: where the class is defined, the package that exports it, a loop that imported it."""

    class Loss(ClippedPGLossFn):
        __init__ = ClippedPGLossFn.__init__
        __call__ = ClippedPGLossFn.__call__

    names = ("algorithms.loss.loss_functions", "algorithms.loss", "algorithms.grpo")
    modules = {name: ModuleType(f"nemo_rl.{name}") for name in names}
    for module in modules.values():
        vars(module)["ClippedPGLossFn"] = Loss
        monkeypatch.setitem(sys.modules, module.__name__, module)
    stand_for(adapter, {module.__name__: module for module in modules.values()})
    return modules


def shifted(x: Tensor) -> Tensor:
    """Return NeMo-RL's column of the whole sequence, whose first entry belongs to no log-prob."""
    return torch.cat([x[:, :1].detach() * 0, x.detach()], dim=1)


def data_of(x: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "advantages": "advantages", "old_logprobs": "prev_logprobs", "ref_logprobs": "reference_policy_logprobs",
        "rollout_logprobs": "generation_logprobs", "mask": "token_mask",
    }  # fmt: skip
    data = {theirs: shifted(x[ours]) for ours, theirs in names.items() if ours in x}
    data.setdefault("generation_logprobs", data["prev_logprobs"])
    data["sample_mask"] = torch.ones(len(x["mask"]))
    if "rewards" in x:
        data["rewards"] = x["rewards"]
    return data


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_loss_reproduces_nemo_rl(host: dict[str, ModuleType], case: Case) -> None:
    assert len(CASES) == 12
    x = case.leaves(torch.float64)
    seqs = torch.tensor(case.hyper["n_sequences"] or float(len(x["mask"])))
    toks = torch.tensor(case.hyper["n_tokens"] or float(x["mask"].sum()))
    loss_fn = adapter.ClippedPGLoss(SimpleNamespace(**case.peer_config), prove=False)
    loss, metrics = loss_fn(x["logprobs"], data_of(x), seqs, toks)
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(x)
    assert metrics["loss"] == pytest.approx(float(case.outputs["loss"]))
    assert metrics["kl_penalty"] == pytest.approx(case.metrics["kl_penalty"])
    assert all(isinstance(value, float) for value in metrics.values())


def test_what_stands_under_the_mask_has_no_effect(host: dict[str, ModuleType]) -> None:
    logprobs, data = batch()
    loss_fn = adapter.ClippedPGLoss(SimpleNamespace(), prove=False)
    expected, metrics = loss_fn(logprobs, data, *counts(data))
    dead = data["token_mask"] * data["sample_mask"].unsqueeze(-1) == 0
    broken = {name: torch.where(dead, torch.nan, x) if x.dim() == 2 else x for name, x in data.items()}
    broken["token_mask"] = data["token_mask"]
    result, again = loss_fn(torch.where(dead[:, 1:], torch.nan, logprobs), broken, *counts(data))
    assert torch.equal(result, expected)
    assert metrics == again


def test_the_switch_and_what_it_builds(host: dict[str, ModuleType]) -> None:
    original = vars(host["algorithms.loss.loss_functions"])["ClippedPGLossFn"]
    with adapter.patched():
        assert adapter.enabled()
        for name in ("algorithms.loss", "algorithms.grpo"):
            assert vars(host[name])["ClippedPGLossFn"] is adapter.ClippedPGLoss
        assert vars(host["algorithms.loss.loss_functions"])["ClippedPGLossFn"] is original
        built = vars(host["algorithms.grpo"])["ClippedPGLossFn"](SimpleNamespace(), use_fused_linear_logprobs=True)
    assert all(vars(module)["ClippedPGLossFn"] is original for module in host.values())
    assert built.use_fused_linear_logprobs
    assert built.input_type is Kind.LOGPROB
    assert built.reference_policy_kl_penalty == 0.01
    built.host = None  # the stand-in's class lives in a function
    logprobs, data = batch()
    shipped = pickle.loads(pickle.dumps(built))
    built.prove = shipped.prove = False
    assert torch.equal(shipped(logprobs, data, *counts(data))[0], built(logprobs, data, *counts(data))[0])


def test_the_first_call_is_compared_with_the_host(host: dict[str, ModuleType]) -> None:
    logprobs, data = batch()
    cfg = SimpleNamespace(reference_policy_kl_penalty=0.0)
    owner = vars(host["algorithms.loss.loss_functions"])["ClippedPGLossFn"]
    owner.bound = 1.3
    with pytest.raises(AdapterMismatchError, match=r"ClippedPGLoss\) does not reproduce the host: .*disable\(\)"):
        adapter.ClippedPGLoss(cfg)(logprobs, data, *counts(data))
    adapter.ClippedPGLoss(cfg, prove=False)(logprobs, data, *counts(data))
    owner.bound = 1.2
    nothing = {**data, "advantages": torch.zeros_like(data["advantages"])}
    adapter.ClippedPGLoss(cfg)(logprobs, nothing, *counts(data))
    assert not adapter._proofs._proved
    adapter.ClippedPGLoss(cfg)(logprobs, data, *counts(data))
    assert len(adapter._proofs._proved) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_new_clip": 0.1}, "does not support the loss_fn option use_new_clip; known: disable_ppo_ratio"),
        ({"reference_policy_kl_type": "abs"}, "must be 'k1', 'k2' or 'k3', got 'abs'"),
        ({"sequence_level_importance_ratios": True}, "needs token_level_loss=False"),
        ({"use_cispo": True, "ratio_clip_c": 3.0}, "use_cispo=True needs"),
        ({"ratio_clip_c": 0.5}, "ratio_clip_c must be > 1"),
        ({"truncated_importance_sampling_ratio": 2.0}, "needs truncated_importance_sampling_type"),
        ({"truncated_importance_sampling_type": "tis"}, "needs use_importance_sampling_correction=True"),
        ({"truncated_importance_sampling_type": "mis"}, "must be None, 'tis', 'icepop' or 'seq-mask-tis', got 'mis'"),
        ({"kl_output_clamp_value": None}, "set kl_input_clamp_value to None"),
    ],
)
def test_what_is_not_supported_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.policy_loss(options)


def test_another_version_is_refused(host: dict[str, ModuleType]) -> None:
    owner = vars(host["algorithms.loss.loss_functions"])["ClippedPGLossFn"]
    owner.__call__ = lambda self, logits, data: None
    with pytest.raises(RuntimeError, match=r"NeMo-RL .* is not supported: .*__call__ takes \(self, logits, data\)"):
        adapter.enable()
    assert vars(host["algorithms.grpo"])["ClippedPGLossFn"] is owner
    with pytest.raises(RuntimeError, match=r"__call__ takes"):
        adapter.ClippedPGLoss(SimpleNamespace())
    owner.__call__ = ClippedPGLossFn.__call__
    logprobs, data = batch()
    data["curr_logprobs_unfiltered"] = logprobs
    with pytest.raises(ValueError, match="curr_logprobs_unfiltered"):
        adapter.ClippedPGLoss(SimpleNamespace())(logprobs, data, *counts(data))


def test_the_installed_nemo_rl_agrees() -> None:
    pytest.importorskip("nemo_rl.algorithms.loss.loss_functions", reason=NEEDS, exc_type=ImportError)
    tally = losses.compare(nemo_rl_losses.comparisons())
    assert tally.complaints == []
    assert tally.batches == 2 * (7 * 6 - 1) * 5
