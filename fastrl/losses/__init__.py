"""Losses: functions of one log-prob per token, and the two large families of them as values.

policy/                    PolicyLoss: axes, presets, inputs, three entrances, the fused path, metrics
preference/                PreferenceLoss: terms, presets, rows, three entrances, the fused path
advantages/                group-normalised advantages, estimators beyond them, returns and GAE
masks.py                   which tokens and sequences count, and rewards shaped by length
kl.py                      KL estimates, penalties and their controller
value.py  reward.py        the critic's loss; losses of reward models, per sequence and per step
distillation.py            divergences to a teacher, over the vocabulary or over samples
regression.py              losses that regress a log-ratio on an advantage
gradient_coefficients.py   any policy loss as one coefficient per token
layout.py  output.py  scalars.py  preset.py    batches and packed tokens; what a loss returns; small helpers
catalogue.py               the functions by name, with formula and source
"""
