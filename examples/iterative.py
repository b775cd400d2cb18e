"""Iterative GRPO: fresh pairs, a reward model that follows the policy, GRPO on its scores; twice.

    python examples/iterative.py [RUN_DIR]

The known preference is that an answer is a number and nothing else (`bare_number` in examples/judges.py), a stand-in
for the judgements of people. Pairs are the policy's own samples, one of each kind; the reward model learns from them,
and the policy is trained on the reward model's score alone. `bare_number`, with weight 0, measures on 200 held-out sums
what that score stands for:

    before 37.0 % (3.4 %)    after round 1 86.5 % (2.4 %)    after round 2 97.5 % (1.1 %)    (standard error)

gains of 11.8 and 4.1 standard errors; on the way the sums right rose from 8.5 % to 27.5 %, of which neither model was
told anything. The reward model of round 1 still orders the fresh pairs of round 2 (12 held-out ones), with a margin of
0.38 (0.14); trained further on them it is 2.14 (0.21). The run took 4.6 minutes on two CPU cores; its records are in
reports/iterative.

A reward model learns what tells the pairs apart, and the policy that. With the right answer as chosen and the policy's
own wrong completions as rejected, which differ in their form first, the score rose from -0.04 to 0.52, and the sums
right fell from 12 % to 0 %.
"""

import argparse
from typing import Any

from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.config.reward_model import RewardModelConfig
from fastrl.train.iterative import iterate
from fastrl.train.pairs import PairsConfig

SUMS: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
JUDGE = "judges:bare_number"
PROMPT: dict[str, Any] = {"prompt_template": "{prompt}", "device": "cpu"}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two rounds of iterative GRPO; prints the folder of the last policy.")
    parser.add_argument("run_dir", nargs="?", default="runs/iterative", help="where the rounds go (%(default)s)")
    folders = iterate(
        parser.parse_args().run_dir,
        rounds=2,
        pairs=PairsConfig(
            task_parameters=SUMS, rewards={JUDGE: 1.0}, problems=64, group_size=8, max_new_tokens=12, **PROMPT
        ),
        reward_model=RewardModelConfig(
            steps=8, examples_per_step=8, learning_rate=2e-5, head_learning_rate_factor=10.0, max_tokens=64,
            eval_share=0.25, **PROMPT,
        ),
        grpo=GRPOConfig(
            task_parameters=SUMS, rewards={"exact": 0.0, JUDGE: 0.0}, eval_rewards=(JUDGE,), steps=5,
            prompts_per_step=6, group_size=8, max_new_tokens=12, kl_coef=0.02, learning_rate=1e-5, eval_problems=200,
            eval_batch_size=100, **PROMPT,
        ),
    )  # fmt: skip
    print(folders[-1])
