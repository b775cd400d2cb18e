"""Completions of prompts.

prompts.py            the order of problems
generate.py           sampling, and the log-probs of what was sampled
packed.py             the same without padding
sampler.py            prompts, completions and scores of a step
dynamic_sampling.py   groups drawn again
rejection.py          completions kept by their reward
step_rewards.py       process supervision
evaluate.py           held-out problems
"""
