"""One file per realisation of the row kernels, with the same function names in each.

    choice.py       which backend runs, and why
    torch_rows.py   PyTorch, everywhere
    cpu.py          C++ (csrc/cpu)
    cuda.py         CUDA clusters (csrc/cuda)
    build.py        compiles the two libraries once, keeps and loads them
    memory.py       memory that is kept for the next call, and huge pages

Triton's kernels are `fastrl_kernels`, with the same names again.
"""
