"""Iterative GRPO, two rounds: fresh pairs, a reward model that follows the policy, GRPO on its scores.

    python examples/iterative.py [RUN_DIR]

The known preference is an answer that is a number and nothing else (`bare_number` in examples/judges.py). It stands for
the judgements of people. Pairs are the policy's own samples, one of each kind. The reward model learns from the pairs,
and the policy learns from the reward model's score alone. `bare_number` has weight 0 and only measures the true
preference, on 200 held-out sums (standard errors in brackets):

    | | before | after round 1 | after round 2 |
    |---|---|---|---|
    | bare numbers | 37.0 % (3.4 %) | 86.5 % (2.4 %) | 97.5 % (1.1 %) |
    | gain in standard errors | | 11.8 | 4.1 |

Neither model was told which sums are right, and yet the sums right rose from 8.5 % to 27.5 %. The reward model of
round 1 still orders the fresh pairs of round 2 (12 held-out ones), with a margin of 0.38 (0.14). Further training on
them makes the margin 2.14 (0.21). The run took 4.6 minutes on two CPU cores. The records are in reports/iterative.

A reward model learns anything that tells the pairs apart, and the policy follows. In another run the chosen side was
the right answer, and the rejected side a wrong completion of the policy, which differs first in its form. The score
rose from -0.04 to 0.52, and the sums right fell from 12 % to 0 %.
"""

import argparse
from typing import Any

from fastrl.train.config import GRPOConfig, PairsConfig, RewardModelConfig
from fastrl.train.iterative import iterate

SUMS: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
JUDGE = "judges:bare_number"
PROMPT: dict[str, Any] = {"prompt_template": "{prompt}", "device": "cpu"}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Run two rounds of iterative GRPO and print the folder of the last policy."
    )
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
