"""Time, memory and accuracy of fastrl beside its peers; run from a checkout as `python -m bench`.

cases.py      shapes of real models, operations, and the inputs of a case
baselines.py  one adapter per contender; each says why it is missing where it cannot run
oracle.py     float64 results, and the judge of tests/support/oracle.py: a contender that is wrong is not timed
measure.py    interleaved timing, floors (bare GEMM, bare copy), peak memory
suite.py      a case from inputs to results; the CPU run
gpu.py        the GPU run: tests, cases, experiments
targets.py    what the numbers should be, and whether they are
record.py     machine, versions, JSON
report.py     tables for the terminal and docs/benchmarks.md
plots.py      charts
"""
