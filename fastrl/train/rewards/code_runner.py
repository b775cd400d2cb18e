"""The child's side of `fastrl.train.rewards.code`: give up every right that a program does not need, and run it.

Run as a script, with nothing but the standard library: `python -I -S code_runner.py CPU_SECONDS MEMORY_BYTES
OUTPUT_BYTES SOURCE_FD`. No program can remove a seccomp filter (Linux, seccomp(2)).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys

# System calls of x86_64 that answer EPERM, by number (arch/x86/entry/syscalls/syscall_64.tbl).
DENIED = {
    "processes": (56, 57, 58, 59, 322, 435, 272, 308, 101, 310, 311),  # clone fork vfork execve(at) clone3 unshare ...
    "signals to others": (62, 129, 200, 234, 297, 424),
    "network and sockets": (41, 42, 53),
    "names of files": (76, 82, 83, 84, 85, 86, 87, 88, 133, 258, 259, 263, 264, 265, 266, 316),
    "owners, modes, times": (90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235, 260, 261, 268, 280, 452),
    "memory that outlives the process": (29, 240, 319),
    "limits and priorities": (141, 160, 302),
    "mounts and roots": (155, 161, 165, 166),
    "ways around this filter": (321, 425, 426, 427, 437, 438),  # bpf io_uring openat2 pidfd_getfd
}
OPEN, OPENAT = 2, 257
MAY_CHANGE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ARCH_X86_64 = 0xC000003E
X32 = 0x40000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, DENY, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # DENY: errno 1, EPERM
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, whose arguments take 8 bytes each
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, MODE_FILTER = 1, 38, 22, 2


def filter_program() -> list[tuple[int, int, int, int]]:
    """Return the classic BPF program as (code, jump if true, jump if false, constant)."""
    program = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, ARCH_X86_64), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL)]
    for number in sorted(number for numbers in DENIED.values() for number in numbers):
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, DENY)]
    for number, argument in ((OPEN, 1), (OPENAT, 2)):  # files can be read, not written
        flags = FIRST_ARGUMENT + 8 * argument
        program += [(EQUAL, 0, 4, number), (LOAD, 0, 0, flags), (ANY_BIT, 0, 1, MAY_CHANGE)]
        program += [(RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
    return [*program, (RETURN, 0, 0, ALLOW)]


class FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def confine(cpu_seconds: int, memory_bytes: int, output_bytes: int) -> None:
    """Set the limits and the filter. Raise OSError if the kernel refuses."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, output_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        resource.setrlimit(limit, (value, value))
    packed = b"".join(struct.pack("<HBBI", *instruction) for instruction in filter_program())
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = FilterProgram(len(packed) // 8, ctypes.addressof(buffer))
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, MODE_FILTER, ctypes.byref(program), 0, 0)):
        if prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({arguments[0]}) was refused")


def main() -> None:
    """Confine this process and run the program."""
    cpu_seconds, memory_bytes, output_bytes, descriptor = map(int, sys.argv[1:])
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        source = file.read()
    sys.argv = ["program"]
    confine(cpu_seconds, memory_bytes, output_bytes)
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
