"""A run from its folder to its report.

run.py          the run: optimiser, metrics, stopping
checkpoint.py   save and restore a run
tracking.py     metrics to the console, files and trackers
measure.py      held-out measurements
report.py  curves.py  record.py    pages, pictures and records of a run
"""
