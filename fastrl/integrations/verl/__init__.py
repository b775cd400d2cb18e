"""fastrl inside verl: its policy losses and advantage estimators by name, and the log-probs of its fused kernels.

    pip install -e FASTRL verl         # the entry point registers every name in every process
    actor_rollout_ref.actor.policy_loss.loss_mode=fastrl_gspo
    algorithm.adv_estimator=fastrl_rloo

    fastrl.integrations.verl.enable()  # use_fused_kernels=True with impl_backend torch then runs on fastrl

`fastrl_NAME` is verl's loss or estimator NAME: same options of verl's configuration, same value and gradient, same
metrics. The losses `fastrl_dapo`, `fastrl_luspo`, `fastrl_vespo` and `fastrl_topr` and the estimator `fastrl_maxrl` are
not in verl.

plugin.py       the entry point, which verl's loader imports in every process
_registry.py    verl's registries: put the names in, take them out
_losses.py      policy losses        _advantages.py  advantage estimators
_fused.py       log-probs of verl's fused kernels
"""

from fastrl.integrations.verl._advantages import ESTIMATORS as ESTIMATORS
from fastrl.integrations.verl._fused import disable as disable
from fastrl.integrations.verl._fused import enable as enable
from fastrl.integrations.verl._fused import enabled as enabled
from fastrl.integrations.verl._fused import fused_logprobs as fused_logprobs
from fastrl.integrations.verl._fused import patched as patched
from fastrl.integrations.verl._fused import sum_pi_squared as sum_pi_squared
from fastrl.integrations.verl._losses import LOSSES as LOSSES
from fastrl.integrations.verl._losses import policy_loss as policy_loss
from fastrl.integrations.verl._registry import register as register
from fastrl.integrations.verl._registry import register_loss as register_loss
from fastrl.integrations.verl._registry import unregister as unregister

__all__ = [
    "ESTIMATORS",
    "LOSSES",
    "disable",
    "enable",
    "enabled",
    "fused_logprobs",
    "patched",
    "policy_loss",
    "register",
    "register_loss",
    "sum_pi_squared",
    "unregister",
]
