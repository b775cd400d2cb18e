"""Losses: functions of one log-prob per token, and the two large families of them as values.

policy/                    PolicyLoss: axes, presets, inputs, three entrances, the fused path, metrics
preference/                PreferenceLoss: axes, terms, presets, pairs, single rows, entrances, the fused path
advantages/                group-normalised advantages, estimators beyond them, returns and GAE
masks.py                   which tokens and sequences count, and rewards shaped by length
kl.py                      KL estimates, penalties and their controller
value.py  reward.py        the critic's loss, and losses of reward models, per sequence and per step
distillation.py            divergences to a teacher, over the vocabulary or over samples
regression.py              losses that regress a log-ratio on an advantage
gradient_coefficients.py   any policy loss as one coefficient per token
layout.py  output.py  scalars.py  preset.py    padded and packed tokens, the output of a loss, small helpers
catalogue.py               presets and functions by name, with formula and source
"""
