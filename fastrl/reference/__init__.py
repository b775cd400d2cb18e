"""Every operation that has a kernel, in plain PyTorch: the formulas, the float64 judge, and the fallback.

    logprobs.py     log-prob, entropy and logsumexp of rows
    columns.py      weights, anchors and pooled log-ratios of each token, for every policy loss
    terms.py        token arithmetic of the policy loss: surrogate, KL, entropy
    kl.py           KL estimates per token
    correction.py   weights for the gap between inference engine and trainer
    advantages.py   group-normalised advantages
    segments.py     sums and means over the tokens of a sequence
    numerics.py     exponentials that stay finite, one-sided clamps

Nothing here imports the rest of fastrl. All functions are dtype-generic and differentiable by autograd. In float64 they
are the judge (`tests/support/oracle.py`). At the working precision they are the token arithmetic wherever the fused
kernel does not run. There is no third realisation.
"""

from fastrl.reference.advantages import GroupAdvantages as GroupAdvantages
from fastrl.reference.advantages import batch_std as batch_std
from fastrl.reference.advantages import group_advantages as group_advantages
from fastrl.reference.advantages import leave_one_out_std as leave_one_out_std
from fastrl.reference.columns import TokenBatch as TokenBatch
from fastrl.reference.columns import TokenColumns as TokenColumns
from fastrl.reference.columns import aggregate_weights as aggregate_weights
from fastrl.reference.columns import covariances as covariances
from fastrl.reference.columns import geometric_log_ratio as geometric_log_ratio
from fastrl.reference.columns import log_ratio as log_ratio
from fastrl.reference.columns import policy_columns as policy_columns
from fastrl.reference.columns import pooled_columns as pooled_columns
from fastrl.reference.columns import sequence_log_ratio as sequence_log_ratio
from fastrl.reference.columns import top_covariance as top_covariance
from fastrl.reference.columns import vespo_log_weight as vespo_log_weight
from fastrl.reference.correction import correction_weights as correction_weights
from fastrl.reference.kl import BINARY_KL_EPS as BINARY_KL_EPS
from fastrl.reference.kl import binary_kl as binary_kl
from fastrl.reference.kl import kl_estimate as kl_estimate
from fastrl.reference.kl import kl_value as kl_value
from fastrl.reference.logprobs import linear_token_logprobs as linear_token_logprobs
from fastrl.reference.logprobs import scaled_logits as scaled_logits
from fastrl.reference.logprobs import token_logprobs as token_logprobs
from fastrl.reference.numerics import EXP_LIMIT as EXP_LIMIT
from fastrl.reference.numerics import LOG_RATIO_LIMIT as LOG_RATIO_LIMIT
from fastrl.reference.numerics import exp_linear as exp_linear
from fastrl.reference.numerics import exp_remainder as exp_remainder
from fastrl.reference.numerics import one_sided as one_sided
from fastrl.reference.segments import SegmentSum as SegmentSum
from fastrl.reference.segments import reverse_scan as reverse_scan
from fastrl.reference.segments import segment_mean as segment_mean
from fastrl.reference.segments import segment_sum as segment_sum
from fastrl.reference.segments import spread as spread
from fastrl.reference.segments import total as total
from fastrl.reference.terms import TokenTerms as TokenTerms
from fastrl.reference.terms import kl_ratio_per_token as kl_ratio_per_token
from fastrl.reference.terms import policy_loss as policy_loss
from fastrl.reference.terms import square_residual as square_residual
from fastrl.reference.terms import token_terms as token_terms
