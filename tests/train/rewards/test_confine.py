"""The confinement against hostile code, as root and as another user: nothing is started, written, read, sent or kept.

Each attack is bounded: if the confinement failed, the machine would lose a file of a temporary folder, no more.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastrl.train.rewards import confine

pytestmark = pytest.mark.skipif(confine.why_not() is not None, reason=str(confine.why_not()))
USED_BY_ATTACKS = (ctypes, fcntl, resource, socket, struct)  # imported here: another user may not read the library

NOBODY = 65534
USERS = [None, NOBODY] if os.geteuid() == 0 else [None]
SECRET = "planted-secret-7461"

# Each raises if it is refused. `call` is the raw system call: it raises OSError with the errno.
ATTACKS = {
    "fork": "os.fork() or os._exit(0)",
    "vfork": "call(58) or os._exit(0)",
    "clone": "call(56, 17, 0, 0, 0, 0) or os._exit(0)",
    "clone into a namespace": "call(56, 0x10000000 | 17, 0, 0, 0, 0) or os._exit(0)",
    "clone3": "call(435, ctypes.create_string_buffer(64), 64) or os._exit(0)",
    "execve": "os.execv('/bin/true', ['true'])",
    "execveat": "call(322, -100, b'/bin/true', 0, 0, 0)",
    "posix_spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "subprocess": "subprocess.run(['true'], check=True)",
    "unshare": "call(272, 0x10000000)",
    "setns": "call(308, 0, 0)",
    "kill the judge": "os.kill(JUDGE, 9)",
    "kill everything": "os.kill(-1, 9)",
    "kill the group": "os.killpg(0, 9)",
    "tgkill the judge": "call(234, JUDGE, JUDGE, 9)",
    "tkill the judge": "call(200, JUDGE, 9)",
    "pidfd": "call(434, JUDGE, 0)",
    "pidfd_send_signal": "call(424, 0, 9, 0, 0)",
    "rt_sigqueueinfo": "call(129, JUDGE, 9, ctypes.create_string_buffer(128))",
    "signal by owner": "fcntl.fcntl(0, fcntl.F_SETOWN, JUDGE)",
    "signal of owner": "fcntl.fcntl(0, 10, 9)",
    "lease": "fcntl.fcntl(0, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "ptrace": "call(101, 16, JUDGE, 0, 0)",
    "process_vm_readv": "call(310, JUDGE, 0, 0, 0, 0, 0)",
    "memory of the judge": "open(f'/proc/{JUDGE}/mem', 'rb').seek(0)",
    "map of the judge": "open(f'/proc/{JUDGE}/maps').read()",
    "environment of the judge": "open(f'/proc/{JUDGE}/environ').read()",
    "files of the judge": "open(f'/proc/{JUDGE}/fd/0').read()",
    "its own environment": "open('/proc/self/environ').read()",
    "its own memory as a file": "open('/proc/self/mem', 'rb')",
    "secret": "print(open(f'{FOLDER}/secret').read())",
    "secret by another root": "print(open('/proc/self/root' + FOLDER + '/secret').read())",
    "secret from a folder": "os.open('secret', os.O_RDONLY, dir_fd=os.open(FOLDER, os.O_PATH))",
    "secret by handle": "call(303, -100, f'{FOLDER}/secret'.encode(), ctypes.create_string_buffer(136), 0, 0)",
    "open by handle": "call(304, 0, ctypes.create_string_buffer(136), 2)",
    "password file": "open('/etc/passwd').read()",
    "list of a folder": "os.listdir(FOLDER)",
    "list of the root": "os.listdir('/')",
    "write": "open(f'{FOLDER}/new', 'w')",
    "overwrite": "open(f'{FOLDER}/secret', 'w')",
    "append": "open(f'{FOLDER}/secret', 'a')",
    "nameless file": "os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)",
    "openat2": "call(437, -100, f'{FOLDER}/secret'.encode(), ctypes.create_string_buffer(24), 24)",
    "truncate": "os.truncate(f'{FOLDER}/secret', 0)",
    "remove": "os.remove(f'{FOLDER}/secret')",
    "rename": "os.rename(f'{FOLDER}/secret', f'{FOLDER}/new')",
    "link": "os.link(f'{FOLDER}/secret', f'{FOLDER}/new')",
    "symlink": "os.symlink('secret', f'{FOLDER}/new')",
    "mkdir": "os.mkdir(f'{FOLDER}/new')",
    "mknod": "os.mkfifo(f'{FOLDER}/new')",
    "chmod": "os.chmod(f'{FOLDER}/secret', 0)",
    "chown": "os.chown(f'{FOLDER}/secret', 1, 1)",
    "times": "os.utime(f'{FOLDER}/secret', (0, 0))",
    "attribute": "os.setxattr(f'{FOLDER}/secret', 'user.x', b'x')",
    "setxattrat": "call(463, -100, f'{FOLDER}/secret'.encode(), 0, b'user.x', 0, 0)",
    "inode flags": "fcntl.ioctl(0, 0x40086602, bytes(4))",
    "typing into the terminal": "fcntl.ioctl(0, 0x5412, b'x')",
    "memory file": "os.memfd_create('x')",
    "shared memory": "call(29, 0x7a53, 4096, 0o1600)",
    "shared memory file": "open('/dev/shm/fastrl-attack', 'w')",
    "message queue": "call(68, 0x7a53, 0o1600)",
    "posix message queue": "call(240, b'/x', 66, 0o600, 0)",
    "semaphore": "call(64, 0x7a53, 1, 0o1600)",
    "key": "call(248, b'user', b'x', b'y', 1, -3)",
    "keyring": "call(250, 0, -3, 1)",
    "socket": "socket.socket()",
    "datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix socket": "socket.socket(socket.AF_UNIX)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "connection": "call(42, call(41, 2, 1, 0), struct.pack('!HH4s8x', 512, PORT, bytes((127, 0, 0, 1))), 16)",
    "io_uring": "call(425, 8, ctypes.create_string_buffer(120))",
    "bpf": "call(321, 0, ctypes.create_string_buffer(72), 72)",
    "perf": "call(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
    "userfaultfd": "call(323, 0)",
    "mount": "call(165, b'none', FOLDER.encode(), b'tmpfs', 0, 0)",
    "fsopen": "call(430, b'tmpfs', 0)",
    "chroot": "os.chroot(FOLDER)",
    "another user": "os.setuid(0 if os.getuid() else 1)",
    "limits": "resource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "limits of the judge": "resource.prlimit(JUDGE, resource.RLIMIT_NOFILE, (8, 8))",
    "affinity of the judge": "os.sched_setaffinity(JUDGE, {0})",
    "scheduler of the judge": "os.sched_setscheduler(JUDGE, os.SCHED_IDLE, os.sched_param(0))",
    "priority": "os.setpriority(os.PRIO_PROCESS, JUDGE, 19)",
    "priority of input and output": "call(251, 1, JUDGE, 0)",
    "personality": "call(135, 0x0040000)",
    "its own filter": "call(157, 22, 2, 0, 0, 0)",
    "death signal": "call(157, 1, 0, 0, 0, 0)",
    "dumpable": "call(157, 4, 1, 0, 0, 0)",
    "host name": "call(170, b'x', 1)",
    "clock": "call(164, ctypes.create_string_buffer(16), 0)",
    "restart": "call(169, 0xfee1dead, 672274793, 0x89abcdef, 0)",
    "32-bit numbers": "call(0x40000000 + 39)",
}


def confined(program: str, user: int | None, *, cpu_seconds: int = 2, seconds: float = 10.0) -> tuple[str, int]:
    """Run a program in a confined fork of this process, as `user`; return its output and how it ended."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(into, 1)
            os.closerange(3, 256)
            if user is not None:
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
            confine.confine(sys.path, cpu_seconds=cpu_seconds, memory_bytes=used + 2**28)
            exec(program, {**globals(), "say": lambda text: os.write(1, str(text).encode())})
        except BaseException as error:
            os.write(1, f"refused: {error!r}"[:4000].encode())
        finally:
            os._exit(0)
    os.close(into)
    deadline = time.monotonic() + seconds
    status = 0
    while time.monotonic() < deadline and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(out, errors="replace") as file:
        return file.read(10**6), status


CALL = """
library = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = library.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_leaves_nothing(name: str, user: int | None, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    for folder in (tmp_path, *tmp_path.parents[:3]):  # the attacker could get there, if Landlock let it
        if folder.stat().st_uid == os.geteuid() and "pytest" in str(folder):
            folder.chmod(0o777)
    secret.chmod(0o666)
    before = secret.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        facts = f"JUDGE, FOLDER, PORT = {os.getpid()}, {str(tmp_path)!r}, {server.getsockname()[1]}\n"
        output, status = confined(f"{CALL}{facts}{ATTACKS[name]}\nsay('it was done')", user)
    assert "it was done" not in output
    assert SECRET not in output
    # A refusal that names the call, or the end of the process by the kernel.
    assert re.match(r"refused: (PermissionError|OSError|ValueError)", output) or os.WIFSIGNALED(status), output
    after = secret.stat()
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert secret.read_text() == SECRET
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_mtime_ns)
    assert not Path("/dev/shm/fastrl-attack").exists()


def test_attacks_are_many() -> None:
    assert len(ATTACKS) >= 40
    print(f"{len(ATTACKS)} hostile programs, as {len(USERS)} users")


@pytest.mark.parametrize("user", USERS)
def test_without_the_confinement_the_same_attacks_succeed(user: int | None, tmp_path: Path) -> None:
    """So that the attacks are able to succeed: some of them, in a process that is not confined."""
    (tmp_path / "secret").write_text(SECRET)
    program = f"JUDGE, FOLDER = {os.getpid()}, {str(tmp_path)!r}\n"
    for name in ("secret", "fork", "memory file", "list of the root", "socket", "its own environment"):
        assert subprocess.run(
            [sys.executable, "-c", f"import os, socket\n{program}{ATTACKS[name]}"], capture_output=True, check=False
        ).returncode == 0, name  # fmt: skip


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    ("name", "program"),
    {
        "endless": "while True: pass",
        "threads that never end": (
            "import _thread\ndef spin():\n    while True: pass\n"
            "for _ in range(4): _thread.start_new_thread(spin, ())\nspin()"
        ),
        "memory": "x = bytearray(2**30)",
        "many small things": "x = []\nwhile True: x.append(bytearray(4096))",
        "a bomb of threads": "import _thread\nwhile True: _thread.start_new_thread(time.sleep, (9,))",
        "descriptors": "while True: os.dup(0)",
        "a huge power": "9**9**9",
    }.items(),
)
def test_limits_hold(name: str, program: str, user: int | None) -> None:
    start = time.monotonic()
    output, status = confined(program, user, cpu_seconds=1, seconds=4.0)
    assert time.monotonic() - start < 8.0
    assert "refused: " in output or os.WIFSIGNALED(status)


@pytest.mark.parametrize("user", USERS)
def test_a_program_may_compute_read_the_library_and_start_threads(user: int | None) -> None:
    program = (
        "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\n_thread.start_new_thread(lock.release, ())\n"
        "lock.acquire()\na, b = socket.socketpair()\na.send(b'x')\nb.recv(1)\nopen('/dev/null').read()\n"
        "os.kill(os.getpid(), 0)\nresource.getrlimit(resource.RLIMIT_CPU)\nsay(sum(range(10)))"
    )
    assert confined(program, user)[0] == "45"


def test_the_reason_where_a_system_cannot_confine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "_call", lambda *arguments: -1)
    assert "Landlock" in str(confine.why_not())
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert confine.why_not() == "it needs Linux on x86_64, got linux on aarch64"
