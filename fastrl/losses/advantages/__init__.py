"""Advantages: of groups of samples, of values, and the estimators between.

group.py        group-normalised advantages and their metrics
estimators.py   estimators beyond the group mean
returns.py      discounted returns, GAE and TD(lambda)
"""
