"""Iterative GRPO on sums: fresh pairs, a reward model that follows the policy, GRPO on its scores; twice.

    python examples/iterative.py [RUN_DIR]

The pairs are the right answer against a wrong completion of the policy itself, so the reward model learns what a
checker knows: a stand-in for the judgements of people. The policy is never shown the checker, only the reward model;
`exact`, with weight 0, is reported.

Measured once, on two CPU cores in six minutes: in the first round GRPO raised the reward model's score from -0.04 to
0.52 (KL 2.0) and answered fewer held-out sums, 0 % after 12 %. The pairs differ by form, and form is what the reward
model scores: the policy exploits it, and the second round does not repair that. Read it as a demonstration of the loop,
and of why a reward model needs pairs that differ in what is to be learnt.
"""

import sys
from typing import Any

from fastrl.train.config import GRPOConfig
from fastrl.train.iterative import iterate
from fastrl.train.pairs import PairsConfig
from fastrl.train.reward_model import RewardModelConfig

SUMS: dict[str, Any] = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
PROMPT: dict[str, Any] = {"prompt_template": "{prompt}", "device": "cpu"}

if __name__ == "__main__":
    folders = iterate(
        sys.argv[1] if len(sys.argv) > 1 else "runs/iterative",
        rounds=2,
        pairs=PairsConfig(
            task_parameters=SUMS, rewards={"exact": 1.0}, problems=96, group_size=1, max_new_tokens=12,
            chosen="answer", answer_template=" {answer}", **PROMPT,
        ),
        reward_model=RewardModelConfig(
            steps=8, examples_per_step=8, learning_rate=2e-5, head_learning_rate_factor=10.0, max_tokens=64, **PROMPT
        ),
        grpo=GRPOConfig(
            task_parameters=SUMS, rewards={"exact": 0.0}, steps=8, prompts_per_step=8, group_size=4,
            max_new_tokens=12, kl_coef=0.02, learning_rate=1e-5, warmup_steps=2, eval_problems=100,
            eval_batch_size=100, **PROMPT,
        ),
    )  # fmt: skip
    print(folders[-1])
