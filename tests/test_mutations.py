"""Every fault of `mutations.py` is noticed: by released trainers' numbers, or where the two realisations meet."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import cases
from mutations import KERNEL, REFERENCE, Mutation, load, mutated_source
from policy_cases import fields_of, judge_terms, kl_fields, product_of_axes
from test_kernels_policy import BOUNDS
from test_policy_golden import build, call

import fastrl_kernels
from fastrl import reference
from fastrl.losses.policy import SURROGATES, PolicyLoss
from fastrl_kernels import policy as kernel


@functools.cache
def golden_subset() -> list:
    """Return two cases of every algorithm and variant of settings, the most telling regime first."""
    chosen: dict[tuple, list] = {}
    for case in cases("policy"):
        axes = tuple(sorted((k, str(v)) for k, v in case.hyper.items() if v is not None))
        chosen.setdefault(axes, []).append(case)
    return [case for group in chosen.values() for case in group[:1]]


def agrees_with_trainers() -> None:
    for case in golden_subset():
        inputs = case.leaves(torch.float64)
        loss = call(case, build(case), inputs)
        case.check("loss", loss)
        loss.backward()
        case.check_gradients(inputs)
