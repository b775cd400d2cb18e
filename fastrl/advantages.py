"""Advantages and returns: from the rewards of completions to one number per token.

    group_advantages            GRPO and its variants: (R - mean) / (std + eps) of the samples of a prompt
    gae                         generalised advantage estimation, with the returns of the critic
    discounted_returns          r_t + gamma G_{t+1}
    td_lambda_returns           r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1})
    length_adaptive_lambda      VAPO's lambda, which grows with the completion
    masked_whiten               mean 0 and standard deviation 1 over the live tokens
    reward_metrics              mean, spread and groups without a signal, for logs

Estimators beyond the group mean:

    opo_advantages              the optimal baseline: rewards weighted by length
    maxrl_advantages            (R - mean) / mean: maximum likelihood of success
    gpg_advantages              alpha (R - mean), alpha = rewards / nonzero rewards
    pass_at_k_advantages        (best - second) / (std + eps) for the best completion of a group
    gdpo_advantages             several rewards, normalised one by one
    step_advantages             rewards of steps, normalised over the group (process supervision)
    remax_advantages            against the reward of the greedy completion
    otb_advantages              the optimal token baseline
    reinforce_plus_plus_advantages             returns with a KL penalty, whitened over the batch
    reinforce_plus_plus_baseline_advantages    R - mean of the group, whitened over the batch
"""

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
