"""Fused per-token log-probs, policy and preference losses for the post-training of language models.

    import fastrl
    loss = fastrl.PolicyLoss.preset("grpo")
    output = loss.from_hidden(hidden, weight, labels, advantages=advantages, mask=mask, old_logprobs=old_logprobs)
    output.loss.backward()

`fastrl.describe(name)` and the command `fastrl losses` describe each loss. To browse: `fastrl.advantages`,
`fastrl.masks`, `fastrl.distillation`.
"""

# The first names that most programs need.
from fastrl.losses.advantages.group import group_advantages as group_advantages
from fastrl.losses.advantages.returns import gae as gae
from fastrl.losses.distillation import distillation_loss as distillation_loss
from fastrl.losses.kl import kl_estimate as kl_estimate
from fastrl.losses.output import LossOutput as LossOutput
from fastrl.losses.policy import PolicyLoss as PolicyLoss
from fastrl.losses.policy import RolloutCorrection as RolloutCorrection
from fastrl.losses.preference import PreferenceLoss as PreferenceLoss
from fastrl.losses.reward import reward_model_loss as reward_model_loss
from fastrl.losses.value import value_loss as value_loss
from fastrl.ops import TokenLogprobs as TokenLogprobs
from fastrl.ops import explain as explain
from fastrl.ops import linear_token_logprobs as linear_token_logprobs
from fastrl.ops import token_logprobs as token_logprobs

# isort: split
# Advantages and returns: `fastrl.advantages` lists them with one line each.
from fastrl.losses.advantages.estimators import gdpo_advantages as gdpo_advantages
from fastrl.losses.advantages.estimators import gpg_advantages as gpg_advantages
from fastrl.losses.advantages.estimators import maxrl_advantages as maxrl_advantages
from fastrl.losses.advantages.estimators import opo_advantages as opo_advantages
from fastrl.losses.advantages.estimators import otb_advantages as otb_advantages
from fastrl.losses.advantages.estimators import pass_at_k_advantages as pass_at_k_advantages
from fastrl.losses.advantages.estimators import reinforce_plus_plus_advantages as reinforce_plus_plus_advantages
from fastrl.losses.advantages.estimators import (
    reinforce_plus_plus_baseline_advantages as reinforce_plus_plus_baseline_advantages,
)
from fastrl.losses.advantages.estimators import remax_advantages as remax_advantages
from fastrl.losses.advantages.estimators import step_advantages as step_advantages
from fastrl.losses.advantages.group import reward_metrics as reward_metrics
from fastrl.losses.advantages.returns import discounted_returns as discounted_returns
from fastrl.losses.advantages.returns import length_adaptive_lambda as length_adaptive_lambda
from fastrl.losses.advantages.returns import masked_whiten as masked_whiten
from fastrl.losses.advantages.returns import td_lambda_returns as td_lambda_returns

# isort: split
# Masks and rewards shaped by length: `fastrl.masks` lists them.
from fastrl.losses.masks import covariance_keep_mask as covariance_keep_mask
from fastrl.losses.masks import difficulty_mask as difficulty_mask
from fastrl.losses.masks import dynamic_sampling_mask as dynamic_sampling_mask
from fastrl.losses.masks import high_entropy_mask as high_entropy_mask
from fastrl.losses.masks import off_policy_sequence_mask as off_policy_sequence_mask
from fastrl.losses.masks import overlong_filter_mask as overlong_filter_mask
from fastrl.losses.masks import rollout_divergence_mask as rollout_divergence_mask
from fastrl.losses.masks import second_moment_mask as second_moment_mask
from fastrl.losses.masks import soft_overlong_punishment as soft_overlong_punishment
from fastrl.losses.masks import zero_variance_mask as zero_variance_mask

# isort: split
# More losses and KL terms, any loss by its name, and any loss as one coefficient per token.
from fastrl.losses.catalogue import describe as describe
from fastrl.losses.distillation import distillation_loss_from_logits as distillation_loss_from_logits
from fastrl.losses.distillation import sampled_distillation_advantages as sampled_distillation_advantages
from fastrl.losses.gradient_coefficients import GradientCoefficients as GradientCoefficients
from fastrl.losses.gradient_coefficients import gradient_coefficients as gradient_coefficients
from fastrl.losses.kl import AdaptiveKLController as AdaptiveKLController
from fastrl.losses.kl import full_kl as full_kl
from fastrl.losses.kl import kl_penalty_rewards as kl_penalty_rewards
from fastrl.losses.regression import optimal_values as optimal_values
from fastrl.losses.regression import sequence_square_loss as sequence_square_loss
from fastrl.losses.reward import process_reward_loss as process_reward_loss

# isort: split
# Old names of modules.
from fastrl import moved as _moved

# isort: split
# The engine beside token_logprobs: statistics of rows of logits, sampling sets, and checks of values.
from fastrl.checks import checked as checked
from fastrl.ops.row_statistics import RowStatistics as RowStatistics
from fastrl.ops.row_statistics import linear_row_statistics as linear_row_statistics
from fastrl.ops.row_statistics import round_logits as round_logits
from fastrl.ops.row_statistics import row_statistics as row_statistics
from fastrl.ops.sampling import top_k_top_p_allowed as top_k_top_p_allowed

# isort: split
# The same names by kind.
from fastrl import advantages as advantages
from fastrl import distillation as distillation
from fastrl import masks as masks

__version__ = "0.1.0"
# In the order of the groups above, which a reader wants to see, not of the alphabet.
__all__ = [  # noqa: RUF022
    "PolicyLoss",
    "PreferenceLoss",
    "RolloutCorrection",
    "LossOutput",
    "token_logprobs",
    "linear_token_logprobs",
    "TokenLogprobs",
    "group_advantages",
    "gae",
    "kl_estimate",
    "value_loss",
    "reward_model_loss",
    "distillation_loss",
    "explain",
    "gdpo_advantages",
    "gpg_advantages",
    "maxrl_advantages",
    "opo_advantages",
    "otb_advantages",
    "pass_at_k_advantages",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "step_advantages",
    "reward_metrics",
    "discounted_returns",
    "length_adaptive_lambda",
    "masked_whiten",
    "td_lambda_returns",
    "covariance_keep_mask",
    "difficulty_mask",
    "dynamic_sampling_mask",
    "high_entropy_mask",
    "off_policy_sequence_mask",
    "overlong_filter_mask",
    "rollout_divergence_mask",
    "second_moment_mask",
    "soft_overlong_punishment",
    "zero_variance_mask",
    "describe",
    "distillation_loss_from_logits",
    "sampled_distillation_advantages",
    "GradientCoefficients",
    "gradient_coefficients",
    "AdaptiveKLController",
    "full_kl",
    "kl_penalty_rewards",
    "optimal_values",
    "sequence_square_loss",
    "process_reward_loss",
    "checked",
    "RowStatistics",
    "linear_row_statistics",
    "round_logits",
    "row_statistics",
    "top_k_top_p_allowed",
]

_moved.install()
