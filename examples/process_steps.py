"""A reward of steps for examples/process.yaml: does this line carry the sum one term further, and rightly?

For "9 + 1 - 4 =" the steps are 9+1=10 and 10-4=6: a line begins with the result so far, takes the next term and gives
the new result. A line that repeats one, that leaves one out or that comes after the last is wrong.
"""

from __future__ import annotations

import itertools
import json
import re

from fastrl.train.rewards.tasks import Problem, load_task

_TERMS = re.compile(r"[+-]?\d+")


def right_step(problem: Problem, text: str) -> float:
    """Return 1.0 where the last line of `text`, the completion so far, is the right step at its place, else 0.0."""
    terms = _terms(problem)
    lines = [line.replace(" ", "") for line in text.strip().splitlines() if line.strip()]
    if not 1 <= len(lines) < len(terms):
        return 0.0
    before, term = sum(map(int, terms[: len(lines)])), terms[len(lines)]
    return float(lines[-1] == f"{before}{term}={before + int(term)}")


def worked(problem: Problem) -> str:
    """Return the steps of a problem, one a line, for a cold start."""
    terms = _terms(problem)
    results = list(itertools.accumulate(map(int, terms)))
    steps = zip(results, terms[1:], results[1:], strict=False)
    return "".join(f"\n{before}{term}={after}" for before, term, after in steps)


def _terms(problem: Problem) -> list[str]:
    """Return the terms with their signs, -0 among them. The first term of "9 + 1 - 4" is 9."""
    return _TERMS.findall(problem.entry["metadata"]["expression"].replace(" ", ""))


if __name__ == "__main__":
    task = load_task("chain_sum", min_terms=3, max_terms=3, min_digits=1, max_digits=1)
    # Far behind those that a run of examples/process.yaml trains on.
    for example in task.train(192, start=5000):
        print(json.dumps({"prompt": example.prompt, "completion": worked(example)}))
