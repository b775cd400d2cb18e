"""The public names and signatures: a contract. A change here is a change for every user."""

import importlib
import inspect
from types import ModuleType

import pytest

import fastrl

SIGNATURES = {
    "token_logprobs": "logits labels * temperature=1.0 logit_scale=1.0 softcap=None ignore_index=-100 backend='auto'",
    "linear_token_logprobs": (
        "hidden weight labels * bias=None temperature=1.0 logit_scale=1.0 softcap=None ignore_index=-100 "
        "chunk_tokens=None tail_mass=0.0 tp_group=None backend='auto'"
    ),
    "group_advantages": "rewards * group_ids=None group_size=None scale='group' baseline='group_mean' eps=0.0001",
    "gae": "rewards values mask * gamma lam whiten=False carry_over_masked=False",
    "kl_estimate": (
        "logprobs ref_logprobs estimator='k3' * gradient='plain' old_logprobs=None log_ratio_clamp=None "
        "value_clamp=None"
    ),
    "reward_model_loss": "chosen_scores rejected_scores margin=None centering_coef=0.0",
    "value_loss": "values old_values returns mask * clip=0.2 coefficient=0.5 aggregate='token_mean'",
    "distillation_loss": (
        "student_hidden student_weight teacher_hidden teacher_weight mask * beta temperature=1.0 student_softcap=None "
        "teacher_softcap=None"
    ),
}

NAMES = """
AdaptiveKLController GradientCoefficients LossOutput PolicyLoss PreferenceLoss RolloutCorrection RowStatistics
TokenLogprobs checked covariance_keep_mask describe difficulty_mask discounted_returns distillation_loss
distillation_loss_from_logits dynamic_sampling_mask explain full_kl gae gdpo_advantages gpg_advantages
gradient_coefficients group_advantages high_entropy_mask kl_estimate kl_penalty_rewards length_adaptive_lambda
linear_row_statistics linear_token_logprobs masked_whiten maxrl_advantages off_policy_sequence_mask opo_advantages
optimal_values otb_advantages overlong_filter_mask pass_at_k_advantages process_reward_loss
reinforce_plus_plus_advantages reinforce_plus_plus_baseline_advantages remax_advantages reward_metrics
reward_model_loss rollout_divergence_mask round_logits row_statistics sampled_distillation_advantages
second_moment_mask sequence_square_loss soft_overlong_punishment step_advantages td_lambda_returns token_logprobs
top_k_top_p_allowed value_loss zero_variance_mask
"""


def _spelled(function: object) -> list[str]:
    """Return a signature as words: names with their defaults, `*` where keyword-only parameters begin."""
    words, starred = [], False
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        words.append(parameter.name + default)
    return words


def test_signatures_of_the_contract() -> None:
    for name, expected in SIGNATURES.items():
        got, want = _spelled(getattr(fastrl, name)), expected.split()
        # A longer signature may follow the contract's, never stand before it.
        assert got[: len(want)] == want, f"{name}: expected {want}, got {got}"


def test_names() -> None:
    assert sorted(fastrl.__all__) == sorted(NAMES.split())
    assert fastrl.TokenLogprobs._fields == ("logprobs", "entropy", "logsumexp")
    assert fastrl.LossOutput._fields == ("loss", "metrics", "logprobs", "entropy")


FIRST = """
PolicyLoss PreferenceLoss RolloutCorrection LossOutput token_logprobs linear_token_logprobs TokenLogprobs
group_advantages gae kl_estimate value_loss reward_model_loss distillation_loss explain
"""


def test_the_names_that_most_programs_need_come_first() -> None:
    assert fastrl.__all__[:14] == FIRST.split()


@pytest.mark.parametrize("name", ["advantages", "masks", "distillation"])
def test_a_module_to_browse_hands_on_public_names_and_lists_each(name: str) -> None:
    module = importlib.import_module(f"fastrl.{name}")
    assert getattr(fastrl, name) is module
    names = [key for key, value in vars(module).items() if key[0] != "_" and not isinstance(value, ModuleType)]
    assert len(names) >= 3
    assert all(getattr(module, key) is getattr(fastrl, key) for key in names)
    listed = [line.split()[0] for line in (module.__doc__ or "").splitlines() if line.startswith("    ")]
    assert sorted(listed) == sorted(names)


def test_every_mask_and_every_estimator_of_advantages_can_be_browsed() -> None:
    masks = {name for name in fastrl.__all__ if name.endswith(("_mask", "_punishment"))}
    assert masks == {name for name in vars(fastrl.masks) if name in fastrl.__all__}
    advantages = {name for name in fastrl.__all__ if name.endswith(("_advantages", "_returns"))}
    assert advantages - set(vars(fastrl.advantages)) == {"sampled_distillation_advantages"}


def test_describe_knows_both_families_and_the_functions() -> None:
    policy, preference = fastrl.PolicyLoss, fastrl.PreferenceLoss
    assert fastrl.describe("dapo") == policy.describe("dapo")
    assert fastrl.describe("simpo") == preference.describe("simpo")
    both = fastrl.describe("sft")
    assert "a preset of PolicyLoss and one of PreferenceLoss" in both
    assert policy.describe("sft") in both
    assert preference.describe("sft") in both
    assert "delta_t = r_t + gamma V_{t+1} - V_t" in fastrl.describe("gae")
    for name in (*policy.presets(), *preference.presets()):
        assert name in fastrl.describe(name)
    with pytest.raises(ValueError, match=r"unknown loss 'GRPO'; close: grpo"):
        fastrl.describe("GRPO")
    with pytest.raises(ValueError, match=r"unknown loss '\?'; known: sft, rft"):
        fastrl.describe("?")
    with pytest.raises(ValueError, match="unknown preset 'simpo'"):
        policy.describe("simpo")
    with pytest.raises(ValueError, match="unknown preference loss 'dapo'"):
        preference.describe("dapo")


def test_losses_have_the_three_entrances() -> None:
    for loss in (fastrl.PolicyLoss, fastrl.PreferenceLoss):
        assert callable(loss.preset)
        assert callable(loss.presets)
        assert {"__call__", "from_logits", "from_hidden"} <= set(dir(loss))
    assert callable(fastrl.PreferenceLoss.from_logprobs)
    kinds = (
        "sigmoid ipo hinge robust exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
        "sigmoid_norm cpo simpo alphapo orpo kto bco"
    )
    assert set(kinds.split()) <= set(fastrl.PreferenceLoss.presets())


def test_every_public_name_is_documented() -> None:
    for name in fastrl.__all__:
        documentation = inspect.getdoc(getattr(fastrl, name))
        assert documentation, name
        assert len(documentation) > 40, name
