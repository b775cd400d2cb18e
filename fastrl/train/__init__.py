"""Lean loops: one readable file each, and the rooms that they share.

To follow a GRPO step, open grpo.py, rollouts/sampler.py, rewards/reward_set.py, model.py and run/run.py.

grpo.py  ppo.py  dpo.py  online_dpo.py  sft.py  rft.py  reward_model.py  iterative.py  pairs.py  constitutional.py
model.py        the policy: hidden states, log-probs, verification
pretrained.py   loading, the output head, LoRA
config/         settings of each loop, and how they are read
rollouts/       prompts, completions, packed streams, evaluation
rewards/        rewards, tasks, and the processes that score
update/         a batch's gradient: policy batches, examples, critic, reference model
data/           files of records, encoding, packing, rollouts as tensors
preferences/    pairs: files, comparisons, reference log-probs
run/            the run: folder, checkpoints, tracking, report, measurements
"""
