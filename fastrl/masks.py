"""Masks: which tokens, sequences and groups take part, and rewards shaped by length.

Of tokens and sequences, for `selection=` of a `PolicyLoss` (the denominator keeps every token):

    off_policy_sequence_mask    drop sequences with A < 0 that left the policy (DeepSeek-V3.2)
    high_entropy_mask           keep the tokens of highest entropy
    covariance_keep_mask        drop a random part of the tokens of high covariance (Clip-Cov)
    rollout_divergence_mask     keep tokens or sequences close to the rollout policy
    second_moment_mask          drop the tokens of largest (logp - rollout)^2

Of completions and groups:

    overlong_filter_mask        drop the tokens of truncated completions (DAPO)
    soft_overlong_punishment    a length penalty for the reward (DAPO)
    difficulty_mask             keep groups whose mean reward is between two bounds
    dynamic_sampling_mask       keep groups in which some completions pass and some fail (DAPO)
    zero_variance_mask          drop groups whose rewards are all equal
"""

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
