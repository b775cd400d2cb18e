"""fastrl inside slime: golden cases through its hook for custom losses, and its log-prob function replaced."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from golden import Case, cases
from oracle import assert_as_accurate
from torch import Tensor

from fastrl.integrations import slime as adapter
from fastrl.integrations.common.proof import AdapterMismatchError
from fastrl.losses.policy import PolicyLoss

# slime's off-policy sequence mask (use_opsm) is refused.
CASES = [case for case in cases("policy") if case.peer == "slime" and "opsm" not in case.id]


@pytest.fixture
def cap() -> float:
    """The host's softcap. At the default, 1e6, it changes nothing beyond rounding."""
    return 1e6


# slime's loss refers to these by name, in its module.
def get_log_probs_and_entropy(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the host's own loss reached the vocabulary")


def policy_loss_function(args, batch, logits, sum_of_sample_mean):
    _, rows = get_log_probs_and_entropy(logits, args=args)
    logprobs, old = torch.cat(rows["log_probs"]), torch.cat(batch["log_probs"])
    advantages = torch.cat(batch["advantages"])
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - args.eps_clip, 1 + args.eps_clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    return sum_of_sample_mean(loss) - args.entropy_coef * sum_of_sample_mean(torch.cat(rows["entropy"])), {}


@pytest.fixture
def host(stand_for: Any, cap: float) -> dict[str, ModuleType]:
    """Stand for slime's modules: the log-probs of a batch are its logits."""

    def get_log_probs_and_entropy(logits: Tensor, *, response_lengths: list[int], **kwargs: Any) -> Any:
        parts = list(logits[0, :, 0].split(response_lengths))
        return None, {"log_probs": parts, "entropy": [0.5 * part.detach() for part in parts]}

    def calculate_log_probs_and_entropy(
        logits, tokens, tp_group, with_entropy=False, chunk_size=-1, log_prob_keep_mask=None, with_entropy_grad=True
    ):
        assert len(logits) <= 32, "the host's own log-probs ran on more than the proof's rows"
        logits = cap * torch.tanh(logits / cap)
        plain = logits.log_softmax(-1)
        kept = logits if log_prob_keep_mask is None else torch.where(log_prob_keep_mask, logits, -torch.inf)
        entropy = -(plain.exp() * plain).sum(-1) if with_entropy else None
        return kept.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)), entropy

    modules = {name: ModuleType(f"slime.{name}") for name in ("ppo_utils", "loss")}
    for module in modules.values():
        vars(module)["calculate_log_probs_and_entropy"] = calculate_log_probs_and_entropy
    vars(modules["loss"])["get_log_probs_and_entropy"] = get_log_probs_and_entropy
    vars(modules["loss"])["get_rollout_top_p_logprob_kwargs"] = lambda args, batch: {}
    vars(modules["loss"])["policy_loss_function"] = policy_loss_function
    stand_for(adapter, modules)
    return modules


def arguments(**fields: Any) -> SimpleNamespace:
    defaults = {
        "eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": None, "advantage_estimator": "grpo", "use_kl_loss": False,
        "entropy_coef": 0.0, "use_rollout_logprobs": False, "fastrl_prove": False,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **fields})


def batch_of(x: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Return slime's batch and logits (1, N, 1) that stand for the log-probs. The rows have lengths T, T - 1, ..."""
    rows, width = x["mask"].shape
    advantages = x["advantages"]
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1).expand(rows, width)
    batch = {
        "advantages": list(advantages), "log_probs": list(x["old_logprobs"]), "loss_masks": list(x["mask"]),
        "response_lengths": [width] * rows, "total_lengths": [width + 2] * rows, "unconcat_tokens": None,
    }  # fmt: skip
    return batch, x["logprobs"].reshape(1, -1, 1)


def reducer(x: dict[str, Tensor], per_token: bool) -> Any:
    mask = x["mask"].double()
    denominators = torch.ones(len(mask)).double() if per_token else mask.sum(-1).clamp(min=1)

    def reduce(values: Tensor) -> Tensor:
        return ((values.view(mask.shape) * mask).sum(-1) / denominators).sum()

    return reduce


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_policy_loss_reproduces_slime(host: dict[str, ModuleType], case: Case) -> None:
    assert len(CASES) == 4
    x = case.leaves(torch.float64)
    name = case.id.removeprefix("policy__slime__").rpartition("__")[0]
    args = arguments(**case.peer_config, advantage_estimator=name if name in ("gspo", "cispo") else "grpo")
    per_token = case.hyper["aggregate"] == "token_mean"
    batch, logits = batch_of(x)
    loss, metrics = adapter.policy_loss(args, batch, logits, reducer(x, per_token))
    loss = loss / (case.hyper["n_tokens"] if per_token else case.hyper["n_sequences"])
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(x)
    assert set(metrics) == {"loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl"}
    assert not any(value.requires_grad for value in metrics.values())
    if "clip_fraction" in case.metrics and per_token:
        assert float(metrics["pg_clipfrac"]) / case.hyper["n_tokens"] == pytest.approx(case.metrics["clip_fraction"])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
def test_kl_and_entropy_are_slimes(host: dict[str, ModuleType], kind: str, weighted: bool) -> None:
    x = CASES[0].leaves(torch.float64)
    batch, logits = batch_of(x)
    reference = x["old_logprobs"] + 0.3
    batch["ref_log_probs"] = list(reference)
    reduce = reducer(x, False)
    options = {"use_kl_loss": True, "kl_loss_coef": 0.2, "kl_loss_type": kind, "use_unbiased_kl": weighted}
    plain, _ = adapter.policy_loss(arguments(), batch, logits, reduce)
    loss, metrics = adapter.policy_loss(arguments(entropy_coef=0.1, **options), batch, logits, reduce)
    gap = x["logprobs"] - reference
    value = {"k1": gap, "k2": gap.square() / 2, "k3": (-gap).exp() - 1 + gap, "low_var_kl": (-gap).exp() - 1 + gap}[
        kind
    ]
    if weighted:
        value = value * (x["logprobs"] - x["old_logprobs"]).exp()
    value = value.clamp(-10, 10) if kind == "low_var_kl" else value
    expected = plain + 0.2 * reduce(value) - 0.1 * reduce(0.5 * x["logprobs"].detach())
    assert_as_accurate("loss", loss, expected, expected.float())
    (ours,) = torch.autograd.grad(loss, x["logprobs"], retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, x["logprobs"])
    assert_as_accurate("gradient", ours, theirs, theirs.float())
    assert float(metrics["kl_loss"]) == pytest.approx(float(reduce(value.detach())))


def test_any_loss_can_be_a_hook(host: dict[str, ModuleType]) -> None:
    x = CASES[0].leaves(torch.float64)
    batch, logits = batch_of(x)
    loss = PolicyLoss.preset("sapo", aggregate="token_sum")
    result, _ = adapter.custom_loss(loss)(arguments(), batch, logits, reducer(x, True))
    expected = loss(
        x["logprobs"], advantages=x["advantages"], mask=x["mask"], old_logprobs=x["old_logprobs"]
    ).loss  # fmt: skip
    assert_as_accurate("loss", result, expected, expected.float())


def test_what_does_not_fit_is_refused(host: dict[str, ModuleType]) -> None:
    x = CASES[0].leaves(torch.float64)
    batch, logits = batch_of(x)
    for name, value in [("use_tis", True), ("use_opsm", True), ("get_mismatch_metrics", True)]:
        with pytest.raises(ValueError, match=f"does not support {name}; use --loss-type policy_loss"):
            adapter.policy_loss(arguments(**{name: value}), batch, logits, reducer(x, False))
    with pytest.raises(ValueError, match="context_parallel_size > 1"):
        adapter.policy_loss(arguments(context_parallel_size=2), batch, logits, reducer(x, False))
    with pytest.raises(ValueError, match="must be 'token_sum'"):
        adapter.custom_loss(PolicyLoss())
    with pytest.raises(ValueError, match=r"does not take kl .*, entropy_coef"):
        adapter.custom_loss(PolicyLoss(aggregate="token_sum", kl="k3", entropy_coef=0.1))
    vars(host["loss"])["calculate_log_probs_and_entropy"] = lambda logits: logits
    with pytest.raises(RuntimeError, match=r"slime .* is not supported: .*takes \(logits\)"):
        adapter.enable()
    group = SimpleNamespace(size=lambda: 2)
    with pytest.raises(ValueError, match="tensor-parallel group of 2 ranks"):
        adapter.calculate_log_probs_and_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), group)


def test_the_first_loss_is_compared_with_the_hosts(host: dict[str, ModuleType]) -> None:
    x = CASES[0].leaves(torch.float64)
    batch, logits = batch_of(x)
    reduce = reducer(x, False)
    proved = arguments(fastrl_prove=True, entropy_coef=0.1)
    nothing = {**batch, "advantages": [torch.zeros_like(row) for row in batch["advantages"]]}
    adapter.policy_loss(proved, nothing, logits, reduce)
    assert not adapter._loss_proofs._proved
    loss, _ = adapter.policy_loss(proved, batch, logits, reduce)
    assert len(adapter._loss_proofs._proved) == 1
    assert torch.equal(loss, adapter.policy_loss(arguments(entropy_coef=0.1), batch, logits, reduce)[0])
    dual = {"eps_clip_c": 1.1}  # this host knows no dual clip
    with pytest.raises(AdapterMismatchError, match=r"policy_loss\) does not reproduce the host: .*fastrl_prove: false"):
        adapter.policy_loss(arguments(fastrl_prove=True, **dual), batch, logits, reduce)
    adapter.policy_loss(arguments(**dual), batch, logits, reduce)


@pytest.mark.parametrize("cap", [2.0])
def test_a_host_with_a_softcap_is_refused(host: dict[str, ModuleType]) -> None:
    logits, tokens = torch.randn(40, 19, generator=torch.Generator().manual_seed(0)), torch.zeros(40, dtype=torch.long)
    with adapter.patched(), pytest.raises(AdapterMismatchError, match=r"logprobs of compared token .*enable\(prove=Fa"):
        host["loss"].calculate_log_probs_and_entropy(logits, tokens, None)
    with adapter.patched(prove=False):
        host["loss"].calculate_log_probs_and_entropy(logits, tokens, None)


def test_an_empty_micro_batch_keeps_its_graph(host: dict[str, ModuleType]) -> None:
    x = CASES[0].leaves(torch.float64)
    batch, _ = batch_of({name: value[:, :0] for name, value in x.items() if value.dim() == 2})
    logits = torch.zeros(1, 0, 1, requires_grad=True)
    loss, _ = adapter.policy_loss(arguments(), batch, logits, lambda values: values.sum())
    loss.backward()
    assert loss == 0
    assert logits.grad is not None


@pytest.mark.parametrize("kept", [False, True])
def test_log_probs_take_slimes_place(host: dict[str, ModuleType], kept: bool) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 19, generator=g, requires_grad=True)
    tokens = torch.randint(0, 19, (6,), generator=g)
    mask = torch.rand(6, 19, generator=g) > 0.4
    mask[torch.arange(6), tokens] = True
    before = [vars(module)["calculate_log_probs_and_entropy"] for module in host.values()]
    with adapter.patched():
        assert adapter.enabled()
        logprobs, entropy = host["loss"].calculate_log_probs_and_entropy(
            logits, tokens, None, with_entropy=True, log_prob_keep_mask=mask if kept else None
        )
        assert len(adapter._proofs._proved) == 1
    after = [vars(module)["calculate_log_probs_and_entropy"] for module in host.values()]
    assert all(now is then for now, then in zip(after, before, strict=True))
    assert logprobs.shape == (6, 1)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        picked = torch.where(mask, x, -torch.inf) if kept else x
        plain = x.log_softmax(-1)
        return picked.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)), -(plain.exp() * plain).sum(-1)

    exact = eager(logits.detach().double())
    for got, want, plain in zip((logprobs, entropy), exact, eager(logits.detach()), strict=True):
        assert_as_accurate("rows", got, want, plain)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
