"""Preference losses as a value: `PreferenceLoss`.

axes.py      the fields, and the combinations that are refused
terms.py     features of the scores and the links over them
presets.py   the losses of the field by name
inputs.py    the inputs of a call beside the log-probs
rows.py      sums over the tokens of chosen and rejected rows
pairs.py     losses of pairs: scores, links, NLL, metrics
unpaired.py  losses of single rows: kto, apo_zero_unpaired, bco
tokens.py    the loss of per-token log-probs, of either kind
loss.py      the four entrances: sequence log-probs, per-token log-probs, logits, hidden states
fused.py     from hidden states with the gradient formed in the forward
"""

from fastrl.losses.preference.loss import PreferenceLoss as PreferenceLoss
