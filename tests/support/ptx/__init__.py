"""An interpreter of PTX in NumPy: it runs the kernels as compiled, on a machine without a GPU.

    text.py           PTX as text -> kernels: parameters, registers, instructions, basic blocks
    arithmetic.py     exact rounding, fused multiply-add, approximate instructions, conversions
    memory.py         the tensors of a launch, by address
    instructions.py   one NumPy operation per instruction, for all threads at once
    machine.py        a batch of blocks: divergence, barriers, clusters; `launch`
    accesses.py       loads and stores: bounds, alignment, distributed shared memory
    checker.py        races and reads of unwritten shared memory
    triton_hook.py    runs Triton's launches here
    cuda_rows.py      runs the kernels of csrc/cuda here

What a device leaves open is a parameter of a launch: the error of approximate instructions, the garbage in registers
and shared memory, the order in which warps run between barriers. ptxas is trusted: PTX is not yet what a device runs.
"""
