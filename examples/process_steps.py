"""A reward of steps for examples/process.yaml: does this line carry the sum one term further, and rightly?

For "9 + 1 - 4 =" the steps are 9+1=10 and 10-4=6: a line begins with the result so far, takes the next term and gives
the new result. A line that repeats one, that leaves one out or that comes after the last is wrong.
"""

from __future__ import annotations

import re

from fastrl.train.tasks import Problem

_TERMS = re.compile(r"[+-]?\d+")


def right_step(problem: Problem, text: str) -> float:
    """Return 1.0 where the last line of `text`, the completion so far, is the right step at its place, else 0.0."""
    terms = [int(term) for term in _TERMS.findall(problem.entry["metadata"]["expression"].replace(" ", ""))]
    lines = [line.replace(" ", "") for line in text.strip().splitlines() if line.strip()]
    if not 1 <= len(lines) < len(terms):
        return 0.0
    before, term = sum(terms[: len(lines)]), terms[len(lines)]
    return float(lines[-1] == f"{before}{term:+d}={before + term}")
