"""Take from this process every right that computing a result from text does not need. Linux on x86_64.

| kernel feature | holds |
|---|---|
| seccomp filter, a list of allowed system calls | no process, program, socket, shared memory, foreign signal |
| Landlock (Linux 5.13) | files are opened below the given folders only, and to read; other processes cannot be traced |
| capabilities dropped, no new ones | what root may do beyond a user |
| resource limits | CPU time, address space, file sizes, open files |

A thread is allowed. What it may use is bounded by the limits of the process. Nothing of this can be undone from inside,
and nothing needs root. The module needs nothing but the standard library: `code_runner.py` imports it alone.

Sources: seccomp(2), landlock(7), capabilities(7), setrlimit(2); numbers of arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterable

# Allowed whatever their arguments are.
ALLOWED = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getitimer": 36,
    "alarm": 37, "setitimer": 38, "getpid": 39, "sendto": 44, "recvfrom": 45, "shutdown": 48, "exit": 60, "uname": 63,
    "ftruncate": 77, "getdents": 78, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "getppid": 110, "getgroups": 115, "getresuid": 118, "getresgid": 120, "sigaltstack": 131, "arch_prctl": 158,
    "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "epoll_create": 213, "getdents64": 217,
    "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229,
    "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "openat": 257,
    "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273,
    "get_robust_list": 274, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293,
    "preadv": 295, "pwritev": 296, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
    "faccessat2": 439, "epoll_pwait2": 441, "futex_waitv": 449,
}  # fmt: skip
CLONE, CLONE3, KILL, TGKILL, IOCTL, FCNTL, PRCTL, SOCKETPAIR, PRLIMIT = 56, 435, 62, 234, 16, 72, 157, 53, 302
CLONE_THREAD = 0x00010000
AF_UNIX = 1
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, its size, bytes waiting, close-on-exec
FCNTLS = (0, 1, 2, 3, 4, 1030)  # copies of a descriptor and its flags: no owner, no lease, no signal
PRCTLS = (15, 16)  # a thread's name

ARCH_X86_64, X32 = 0xC000003E, 0x40000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050001, 0x00050026
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data. An argument takes 8 bytes, the low half first

PR_SET_PDEATHSIG, PR_SET_SECCOMP, MODE_FILTER, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 2, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CAPSET, CAPABILITY_VERSION_3, LAST_CAPABILITY = 126, 0x20080522, 63
SIGKILL = 9

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
VERSION_FLAG, PATH_BENEATH = 1, 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3
# Rights over files by version of the interface: each version must name all that it knows to take them away.
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
TCP_RIGHTS, SCOPES = 0b11, 0b11

# Beside Python's own folders: shared libraries, time zones, sources of nothing and of random bytes.
SYSTEM_FILES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
    "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random",
)  # fmt: skip


class Refused(OSError):
    """The kernel does not give what the confinement needs."""


def why_not() -> str | None:
    """Return the reason why this system cannot confine a process, or None if it can."""
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        return f"it needs Linux on x86_64, got {sys.platform} on {platform.machine()}"
    if _call(LANDLOCK_CREATE, None, 0, VERSION_FLAG) < 1:
        return "it needs Landlock, which the kernel does not have or has switched off (Linux 5.13, lsm=landlock)"
    return None


def confine(
    readable: Iterable[str],
    *,
    cpu_seconds: int | None = None,
    memory_bytes: int | None = None,
    file_bytes: int = 0,
    open_files: int = 64,
) -> None:
    """Confine this process and all threads that it starts later. It must have one thread now.

    Args:
        readable: files and folders that may be read, beside `SYSTEM_FILES`. Absent ones are left out.
        cpu_seconds: limit of the CPU time of all threads together. None keeps the present limit.
        memory_bytes: limit of the address space. None keeps the present limit.
        file_bytes: the largest size of an inherited file that is written to.
        open_files: limit of open descriptors.

    Raises:
        Refused: the kernel refuses a part. The process must not go on then.
    """
    _prctl(PR_SET_PDEATHSIG, SIGKILL)
    limits = {resource.RLIMIT_FSIZE: file_bytes, resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: open_files}
    if cpu_seconds is not None:
        limits[resource.RLIMIT_CPU] = cpu_seconds
    if memory_bytes is not None:
        limits[resource.RLIMIT_AS] = memory_bytes
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    _drop_capabilities()
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _restrict_files([*readable, *SYSTEM_FILES])
    _restrict_calls()


def filter_program(own_id: int) -> list[tuple[int, int, int, int]]:
    """Return the classic BPF program as (code, jump if true, jump if false, constant), for the process `own_id`."""
    program = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, ARCH_X86_64), (RETURN, 0, 0, KILL_PROCESS), (LOAD, 0, 0, NUMBER)]
    program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, KILL_PROCESS)]
    for number in sorted(ALLOWED.values()):
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    # glibc then takes clone, whose flags are in a register and not in memory.
    program += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ENOSYS)]
    program += [(EQUAL, 0, 4, CLONE), (LOAD, 0, 0, ARGUMENTS), (ANY_BIT, 0, 1, CLONE_THREAD)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)]
    for number, argument, values in (
        (KILL, 0, (own_id,)),
        (TGKILL, 0, (own_id,)),
        (IOCTL, 1, IOCTLS),
        (FCNTL, 1, FCNTLS),
        (PRCTL, 0, PRCTLS),
        (SOCKETPAIR, 0, (AF_UNIX,)),
    ):
        low = ARGUMENTS + 8 * argument
        program += [(EQUAL, 0, 2 * len(values) + 2, number), (LOAD, 0, 0, low)]
        for value in values:
            program += [(EQUAL, 0, 1, value), (RETURN, 0, 0, ALLOW)]
        program += [(RETURN, 0, 0, EPERM)]
    # Reading limits: prlimit64 with a null pointer to new ones, both halves.
    new = ARGUMENTS + 16
    program += [(EQUAL, 0, 5, PRLIMIT), (LOAD, 0, 0, new), (EQUAL, 0, 3, 0), (LOAD, 0, 0, new + 4), (EQUAL, 0, 1, 0)]
    program += [(RETURN, 0, 0, ALLOW)]
    return [*program, (RETURN, 0, 0, EPERM)]


class _FilterProgram(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _restrict_calls() -> None:
    packed = b"".join(struct.pack("<HBBI", *instruction) for instruction in filter_program(os.getpid()))
    buffer = ctypes.create_string_buffer(packed, len(packed))
    program = _FilterProgram(len(packed) // 8, ctypes.addressof(buffer))
    _prctl(PR_SET_SECCOMP, MODE_FILTER, ctypes.addressof(program))


def _restrict_files(readable: Iterable[str]) -> None:
    version = _call(LANDLOCK_CREATE, None, 0, VERSION_FLAG)
    if version < 1:
        raise Refused(ctypes.get_errno(), "the kernel has no Landlock")
    files = (1 << FILE_RIGHTS.get(version, FILE_RIGHTS[5])) - 1
    fields = [files, *([TCP_RIGHTS] if version >= 4 else []), *([SCOPES] if version >= 6 else [])]
    rules = ctypes.create_string_buffer(struct.pack(f"<{len(fields)}Q", *fields), 8 * len(fields))
    ruleset = _call(LANDLOCK_CREATE, rules, len(rules), 0)
    if ruleset < 0:
        raise Refused(ctypes.get_errno(), "the kernel refuses a Landlock ruleset")
    for path in dict.fromkeys(map(os.path.realpath, readable)):
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights = READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE
        rule = ctypes.create_string_buffer(struct.pack("<Qi", rights, descriptor), 12)
        if _call(LANDLOCK_ADD, ruleset, PATH_BENEATH, rule, 0) != 0:
            raise Refused(ctypes.get_errno(), f"the kernel refuses a Landlock rule for {path}")
        os.close(descriptor)
    if _call(LANDLOCK_RESTRICT, ruleset, 0) != 0:
        raise Refused(ctypes.get_errno(), "the kernel refuses to enforce a Landlock ruleset")
    os.close(ruleset)


def _drop_capabilities() -> None:
    _library().prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(LAST_CAPABILITY + 1):
        _library().prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused to all but root, who alone has any
    header = ctypes.create_string_buffer(struct.pack("<Ii", CAPABILITY_VERSION_3, 0), 8)
    if _call(CAPSET, header, ctypes.create_string_buffer(24)) != 0:
        raise Refused(ctypes.get_errno(), "the kernel refuses to drop capabilities")


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(x) for x in (*arguments, 0, 0, 0, 0)[:4]]
    if _library().prctl(option, *padded) != 0:
        raise Refused(ctypes.get_errno(), f"the kernel refuses prctl({option})")


def _call(number: int, *arguments: object) -> int:
    return int(_library().syscall(number, *arguments))


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
