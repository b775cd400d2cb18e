"""Rewards of completions.

reward_set.py    several rewards with weights, and where they run
functions.py     rewards by rule
tasks.py         problems and their answers
model.py         a reward model
worker.py        the process that scores
code.py  code_runner.py    programs judged by tests
"""

from fastrl.train.rewards.reward_set import RewardBatch as RewardBatch
from fastrl.train.rewards.reward_set import RewardSet as RewardSet
from fastrl.train.rewards.reward_set import build_rewards as build_rewards
from fastrl.train.rewards.reward_set import check_rewards as check_rewards
from fastrl.train.rewards.reward_set import reward_names as reward_names
