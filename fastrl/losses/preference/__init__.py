"""Preference losses as a value: `PreferenceLoss`.

terms.py     features of the scores and the links over them
presets.py   the losses of the field by name
checks.py    what contradicts
rows.py      chosen and rejected rows as scores
loss.py      the three entrances: log-probs, logits, hidden states
fused.py     from hidden states with the gradient formed in the forward
"""

from fastrl.losses.preference.loss import PreferenceLoss as PreferenceLoss
