"""Settings of the loops: one frozen dataclass each, and the reader of files and flags.

run.py           every loop
sampling.py      loops that sample
grpo.py  ppo.py  dpo.py  sft.py  rft.py  reward_model.py
preferences.py   data of pairs
parse.py         YAML files and overrides
"""
