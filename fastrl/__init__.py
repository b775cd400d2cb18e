"""Fused per-token log-probs, policy and preference losses for the post-training of language models."""

from fastrl.checks import checked as checked
from fastrl.losses.output import LossOutput as LossOutput
from fastrl.losses.policy import PolicyLoss as PolicyLoss
from fastrl.losses.policy import RolloutCorrection as RolloutCorrection
from fastrl.losses.selection import covariance_keep_mask as covariance_keep_mask
from fastrl.losses.selection import high_entropy_mask as high_entropy_mask
from fastrl.losses.selection import off_policy_sequence_mask as off_policy_sequence_mask
from fastrl.losses.selection import rollout_divergence_mask as rollout_divergence_mask
from fastrl.losses.selection import second_moment_mask as second_moment_mask
from fastrl.ops import TokenLogprobs as TokenLogprobs
from fastrl.ops import explain as explain
from fastrl.ops import linear_token_logprobs as linear_token_logprobs
from fastrl.ops import token_logprobs as token_logprobs

__version__ = "0.1.0"
