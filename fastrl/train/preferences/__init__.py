"""Pairs of completions.

comparisons.py          encoded pairs and their batches
dataset.py              pairs from files
reference_logprobs.py   log-probs of the reference, kept
"""
