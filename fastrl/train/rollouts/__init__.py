"""Completions of prompts.

prompts.py            the order of problems
generate.py           prompts to sampled completions
sampler.py            prompts, completions and scores of a step
dynamic_sampling.py   groups with equal rewards drawn again
rejection.py          completions kept by their reward
step_rewards.py       process supervision
evaluate.py           held-out problems
"""
