"""Fused per-token log-probs, policy and preference losses for the post-training of language models."""

from fastrl.checks import checked as checked
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
from fastrl.losses.advantages.group import group_advantages as group_advantages
from fastrl.losses.advantages.group import reward_metrics as reward_metrics
from fastrl.losses.advantages.returns import discounted_returns as discounted_returns
from fastrl.losses.advantages.returns import gae as gae
from fastrl.losses.advantages.returns import length_adaptive_lambda as length_adaptive_lambda
from fastrl.losses.advantages.returns import masked_whiten as masked_whiten
from fastrl.losses.advantages.returns import td_lambda_returns as td_lambda_returns
from fastrl.losses.distillation import distillation_loss as distillation_loss
from fastrl.losses.distillation import distillation_loss_from_logits as distillation_loss_from_logits
from fastrl.losses.distillation import sampled_distillation_advantages as sampled_distillation_advantages
from fastrl.losses.gradient_coefficients import GradientCoefficients as GradientCoefficients
from fastrl.losses.gradient_coefficients import gradient_coefficients as gradient_coefficients
from fastrl.losses.kl import AdaptiveKLController as AdaptiveKLController
from fastrl.losses.kl import full_kl as full_kl
from fastrl.losses.kl import kl_estimate as kl_estimate
from fastrl.losses.kl import kl_penalty_rewards as kl_penalty_rewards
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
from fastrl.losses.output import LossOutput as LossOutput
from fastrl.losses.policy import PolicyLoss as PolicyLoss
from fastrl.losses.policy import RolloutCorrection as RolloutCorrection
from fastrl.losses.policy.presets import describe as describe
from fastrl.losses.preference import PreferenceLoss as PreferenceLoss
from fastrl.losses.regression import optimal_values as optimal_values
from fastrl.losses.regression import sequence_square_loss as sequence_square_loss
from fastrl.losses.reward import process_reward_loss as process_reward_loss
from fastrl.losses.reward import reward_model_loss as reward_model_loss
from fastrl.losses.value import value_loss as value_loss
from fastrl.ops import TokenLogprobs as TokenLogprobs
from fastrl.ops import explain as explain
from fastrl.ops import linear_token_logprobs as linear_token_logprobs
from fastrl.ops import token_logprobs as token_logprobs
from fastrl.ops.row_statistics import RowStatistics as RowStatistics
from fastrl.ops.row_statistics import linear_row_statistics as linear_row_statistics
from fastrl.ops.row_statistics import round_logits as round_logits
from fastrl.ops.row_statistics import row_statistics as row_statistics
from fastrl.ops.sampling import top_k_top_p_allowed as top_k_top_p_allowed

__version__ = "0.1.0"
__all__ = [
    "AdaptiveKLController",
    "GradientCoefficients",
    "LossOutput",
    "PolicyLoss",
    "PreferenceLoss",
    "RolloutCorrection",
    "RowStatistics",
    "TokenLogprobs",
    "checked",
    "covariance_keep_mask",
    "describe",
    "difficulty_mask",
    "discounted_returns",
    "distillation_loss",
    "distillation_loss_from_logits",
    "dynamic_sampling_mask",
    "explain",
    "full_kl",
    "gae",
    "gdpo_advantages",
    "gpg_advantages",
    "gradient_coefficients",
    "group_advantages",
    "high_entropy_mask",
    "kl_estimate",
    "kl_penalty_rewards",
    "length_adaptive_lambda",
    "linear_row_statistics",
    "linear_token_logprobs",
    "masked_whiten",
    "maxrl_advantages",
    "off_policy_sequence_mask",
    "opo_advantages",
    "optimal_values",
    "otb_advantages",
    "overlong_filter_mask",
    "pass_at_k_advantages",
    "process_reward_loss",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "remax_advantages",
    "reward_metrics",
    "reward_model_loss",
    "rollout_divergence_mask",
    "round_logits",
    "row_statistics",
    "sampled_distillation_advantages",
    "second_moment_mask",
    "sequence_square_loss",
    "soft_overlong_punishment",
    "step_advantages",
    "td_lambda_returns",
    "token_logprobs",
    "top_k_top_p_allowed",
    "value_loss",
    "zero_variance_mask",
]
