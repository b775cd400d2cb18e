"""Data from files.

records.py    JSON lines
encoding.py   prompts and examples as token ids
packing.py    examples without padding
rollout.py    sampled completions and their prompts, as tensors
"""
