"""pytest-benchmark cases for comparing two versions of fastrl: `python -m pytest bench --benchmark-only`.

Save one run with `--benchmark-save=NAME` and hold another against it with `--benchmark-compare=NAME
--benchmark-compare-fail=median:10%`. Shapes are small: seconds per case on two cores.
"""

import pytest

from bench.baselines import EAGER, fastrl_contender
from bench.cases import OPERATIONS, Case, Model, make_inputs
from bench.oracle import Judge

pytest.importorskip("pytest_benchmark")

SMALL = Model("small", 256, 16384)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fastrl(benchmark, operation: str) -> None:
    inputs = make_inputs(Case(operation, SMALL, 4, 128))
    run = fastrl_contender().prepare(inputs)
    assert Judge.of(inputs, EAGER.prepare(inputs)())(run()).complaint is None
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
