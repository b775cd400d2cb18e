"""Triton kernels. They import torch and triton, and nothing of fastrl.

token_logprobs.py   log-prob, entropy and log-sum-exp of rows, and the gradient of the logits
row_statistics.py   argmax, log sum p^2 and mean logit of rows
policy.py           token arithmetic of the policy loss
policy_logits.py    rows, token arithmetic and gradient in one launch
policy_parts.py     exponentials, gates, surrogates and KL estimates of the token arithmetic
sparse_rows.py      the few large entries of a row's gradient, and their products
segments.py         sums and recurrences over sequences
advantages.py       group-normalised advantages
rowmath.py          arithmetic of one row, shared by all kernels that read the vocabulary
launch.py           device, tiles, arguments and compile options of a launch
"""
