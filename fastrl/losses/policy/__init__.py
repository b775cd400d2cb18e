"""Every policy-gradient loss as a value: `PolicyLoss`.

axes.py         the fields, and the combinations that are refused
presets.py      the losses of the field by name, and the trainers' styles
inputs.py       the inputs of a call, checked and flat
loss.py         the three entrances: log-probs, logits, hidden states
fused.py        from hidden states with the gradient formed in the forward
correction.py   weights for the gap between inference engine and trainer
metrics.py      the metrics of a call
"""

from fastrl.losses.policy.correction import RolloutCorrection as RolloutCorrection
from fastrl.losses.policy.loss import PolicyLoss as PolicyLoss
