"""Rewards of completions.

reward_set.py    several rewards with weights, and where they run
functions.py     rewards by rule
tasks.py         problems and their answers
model.py         a reward model
worker.py        the process that scores
code.py  code_runner.py    programs judged by tests
"""
