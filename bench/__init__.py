"""Time, memory and accuracy of fastrl beside its peers. Run it from a checkout: `python -m bench`.

cases.py      shapes of real models, operations, and the inputs of a case
baselines.py  one adapter per contender, with the reason if it cannot run here
oracle.py     float64 results, and the judge of tests/support/oracle.py: a wrong contender is not timed
measure.py    interleaved timing, floors (bare GEMM, bare copy), peak memory
suite.py      a case from inputs to results, and the CPU run
gpu.py        the GPU run: tests, cases, experiments
samples.py    hidden states and labels of a real model's own samples
sparse.py     cost and error of `tail_mass` on these samples
tiles.py      block sizes and warps of the Triton row kernels
targets.py    the wanted numbers, and the verdict on each
record.py     machine, versions, JSON
report.py     tables for the terminal and docs/benchmarks.md
plots.py      charts
"""
