"""The gradient of one optimiser step.

batches.py        batches of completions, their minibatches, parts and counts
supervised.py     batches of examples
epochs.py         the loop over a data set that SFT, DPO and the reward model share
reference.py      the reference policy
critic.py         the critic
trust_region.py   steps held to a KL
clip_cov.py       tokens left out by covariance
"""
