"""Reward functions in a separate process with a time limit for each call. POSIX only.

    this process --- socket pair ---> supervisor (imports, forks, waits) ---> scorer (answers over the same socket)

A message of the scorer names the process that sent it and the call that it answers. So a process that a reward has
started cannot answer in its place, and rewards cannot shift.

A confined worker also gives up, after its imports, every right that scoring a text does not need
(`fastrl.train.rewards.confine`): it starts no process, reaches no network, writes no file and reads Python's files
only. Where the kernel cannot do that, a line says so once.

The supervisor starts once and imports the reward functions. It then forks the scorer, which calls them. If a call hangs
or crashes, the scorer is killed, and the supervisor forks a new one within milliseconds. When the process that started
the supervisor is gone, for whatever reason, the supervisor ends the scorer and itself.

A signal in the training process could not replace this. Signals reach the main thread only. A long call into C does not
return to the interpreter, so the interpreter never sees the signal. Some reward libraries set the process's one alarm.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from fastrl.train.rewards import confine

logger = logging.getLogger(__name__)

# Importing torch and a reward library takes a second or two on a quiet machine.
STARTUP_TIMEOUT_S = 120.0
# Seconds between the supervisor's checks that the scorer and the calling process are alive.
SUPERVISE_S = 0.02
MAX_REASON = 300

VALUE, FAILED, INTERRUPTED, READY, BROKEN = b"V", b"F", b"I", b"R", b"B"
# Kind, process that sends, call that is answered.
HEADER = struct.Struct("<cIQ")
# The largest reward: batches are float32.
LARGEST = 3.4028234663852886e38
# Address space that a confined scorer may take beyond its imports.
SCORING_BYTES = 2 * 2**30


class Score(NamedTuple):
    """The result of one call of a reward function."""

    value: float
    """The reward, NaN if the call failed."""
    failure: str | None
    """Reason of the failure, None if the call succeeded."""


Scorer = Callable[[Any, str], Any]


def call_reward(function: Scorer, item: Any, completion: str) -> Score:
    """Return the score that `function` gives. Any exception except `KeyboardInterrupt` makes a failed score.

    A process that the function has forked, and that comes back here, ends: it must not go on in the caller's place.
    """
    caller = os.getpid()
    try:
        score = _as_score(function(item, completion))
    except BaseException as error:  # a library's time-out or SystemExit must not end the worker
        if os.getpid() == caller and isinstance(error, KeyboardInterrupt):
            raise
        score = Score(math.nan, f"raised {type(error).__name__}: {_text_of(error)}"[:MAX_REASON])
    if os.getpid() != caller:
        os._exit(0)
    return score


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an exception may fail to describe itself
        return "(no text)"


def _as_score(value: Any) -> Score:
    if value is None:
        return Score(math.nan, "returned None")
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        return Score(math.nan, f"returned {type(value).__name__}, expected a number")
    number = float(value)
    if not math.isfinite(number):
        return Score(math.nan, f"returned {number}, expected a finite number")
    if abs(number) > LARGEST:
        return Score(math.nan, f"returned {number}, expected a number within float32, at most {LARGEST:.4g}")
    return Score(number, None)


class RewardWorker:
    """The caller's side: evaluates reward functions in the worker, each call within `timeout_s` seconds."""

    def __init__(self, functions: Sequence[Scorer], timeout_s: float, *, confined: bool = False) -> None:
        """Start the worker. It imports in the background, and the first call waits for it.

        Args:
            functions: the reward functions.
            timeout_s: seconds that one call may take.
            confined: whether the worker gives up the rights that it does not need.

        Raises:
            TypeError: a function cannot be sent to another process.
            RuntimeError: this platform has no `fork`.
        """
        if not hasattr(os, "fork"):
            raise RuntimeError(
                "rewards with a time limit need a POSIX system; pass timeout_s=None to call them directly"
            )
        self.timeout_s = timeout_s
        reason = confine.why_not() if confined else None
        if reason is not None:
            logger.warning("rewards run in a process with a time limit, but not confined: %s", reason)
        self.confined = confined and reason is None
        self._payload = pickle.dumps((self.confined, [_portable(function) for function in functions]))
        self._lock = threading.Lock()
        self._start()

    def evaluate(self, items: Sequence[Any], completions: Sequence[str], functions: int) -> list[Score]:
        """Return the scores of function 0 for all (item, completion), then of function 1, and so on."""
        with self._lock:
            if self._process.poll() is not None:
                self._close()
                self._start()
            try:
                return self._evaluate(items, completions, functions * len(completions))
            except BaseException:
                # The worker may still send scores of this batch, so the next call starts a new one.
                self._close()
                raise

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._close()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from fastrl.train.rewards.worker import supervise; supervise({theirs.fileno()}, {os.getpid()})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stderr: prints of a reward must not end up in the caller's output
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C goes to the caller, which ends the worker
                # No threads in the supervisor: they would not survive its fork.
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._connection = Connection(ours.detach())
        self._scorer: int | None = None
        self._finalizer = weakref.finalize(self, _end, self._process, self._connection, os.getpid())
        self._connection.send_bytes(self._payload)

    def _close(self) -> None:
        _kill_group(self._scorer)
        self._finalizer()

    def _evaluate(self, items: Sequence[Any], completions: Sequence[str], calls: int) -> list[Score]:
        if self._scorer is None:
            self._await_scorer(STARTUP_TIMEOUT_S)
        scores: list[Score] = []
        while len(scores) < calls:
            self._connection.send_bytes(pickle.dumps((len(scores), items, completions)))
            failure = self._collect(scores, calls)
            if failure is not None:
                scores.append(Score(math.nan, failure))
        return scores

    def _collect(self, scores: list[Score], calls: int) -> str | None:
        """Append arriving scores. Return None when all are in, or the reason why a new scorer took over."""
        deadline = time.monotonic() + self.timeout_s
        while len(scores) < calls:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                _kill_group(self._scorer)
                self._await_scorer(STARTUP_TIMEOUT_S)
                return f"took more than {self.timeout_s:g} s"
            kind, sender, call, body = self._receive()
            if kind == READY:
                self._scorer = sender
                return "ended the process that it ran in"
            if sender != self._scorer or call != len(scores):
                continue  # a process that a reward has started
            if kind == INTERRUPTED:
                raise KeyboardInterrupt
            scores.append(
                Score(struct.unpack("<d", body)[0], None) if kind == VALUE else Score(math.nan, body.decode())
            )
            deadline = time.monotonic() + self.timeout_s
        return None

    def _await_scorer(self, timeout_s: float) -> None:
        """Wait for the next scorer, and drop late messages of the previous one."""
        self._scorer = None
        deadline = time.monotonic() + timeout_s
        while self._connection.poll(max(0.0, deadline - time.monotonic())):
            kind, sender, _, body = self._receive()
            if kind == READY:
                self._scorer = sender
                return
            if kind == BROKEN:
                raise RuntimeError(f"the reward worker could not load the reward functions: {body.decode()}")
        raise RuntimeError(f"the reward worker did not start within {timeout_s:g} s")

    def _receive(self) -> tuple[bytes, int, int, bytes]:
        try:
            message = self._connection.recv_bytes()
        except (EOFError, ConnectionResetError) as error:
            raise RuntimeError(f"the reward worker ended by itself (exit status {self._process.wait()})") from error
        return *HEADER.unpack_from(message), message[HEADER.size :]


def _portable(function: Scorer) -> Scorer:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    hint = (
        "expected one that another process can import: define it at the top level of a module, "
        "or pass timeout_s=None to call it in this process without a time limit"
    )
    if getattr(function, "__module__", None) == "__main__":
        raise TypeError(f"reward function {name} is defined in __main__; {hint}")
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"reward function {name} cannot be sent to the reward worker ({error}); {hint}") from error
    return function


def _kill_group(leader: int | None) -> None:
    """Kill a process group, if it exists."""
    if leader is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], connection: Connection, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the caller must not end the caller's worker
        return
    connection.close()  # the scorer reads the end of the stream and exits
    _kill_group(process.pid)
    process.wait()


def supervise(descriptor: int, caller: int) -> None:
    """Load the functions, then keep one scorer alive until the caller closes the connection or disappears."""
    connection = Connection(descriptor)
    try:
        confined, functions = pickle.loads(connection.recv_bytes())
    except Exception as error:
        connection.send_bytes(_message(BROKEN, 0, _encoded(f"{type(error).__name__}: {error}"[:MAX_REASON])))
        return
    while True:
        scorer = os.fork()
        if scorer == 0:
            os.setpgid(0, 0)  # a group of its own: killing it also kills processes that a reward started
            try:
                if confined:
                    _confine()
            except OSError as error:
                connection.send_bytes(_message(BROKEN, 0, _encoded(f"they cannot be confined: {error}"[:MAX_REASON])))
                os._exit(1)
            _answer(connection, functions, os.getppid())
            os._exit(0)
        while os.waitpid(scorer, os.WNOHANG)[0] == 0:
            if os.getppid() != caller:
                _kill_group(scorer)
                return
            time.sleep(SUPERVISE_S)


def _confine() -> None:
    """Give up the rights that scoring does not need. Libraries that are imported may still read their own files."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    folders = [path for path in sys.path if path] + [sys.prefix, sys.base_prefix]
    # No file may grow. The scorer's own messages go through a socket, which this limit does not touch.
    confine.confine(folders, memory_bytes=used + SCORING_BYTES, file_bytes=0, open_files=256)


def _answer(connection: Connection, functions: Sequence[Scorer], supervisor: int) -> None:
    """Serve requests until the connection closes. Then kill the supervisor."""
    try:
        connection.send_bytes(_message(READY, 0, b""))
        while True:
            first, items, completions = pickle.loads(connection.recv_bytes())
            for message in _messages(functions, first, items, completions):
                connection.send_bytes(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        if os.getppid() == supervisor:
            os.kill(supervisor, signal.SIGKILL)


def _messages(
    functions: Sequence[Scorer], first: int, items: Sequence[Any], completions: Sequence[str]
) -> Iterator[bytes]:
    for call in range(first, len(functions) * len(completions)):
        which, row = divmod(call, len(completions))
        try:
            score = call_reward(functions[which], items[row], completions[row])
        except KeyboardInterrupt:
            yield _message(INTERRUPTED, call, b"")
            return
        if score.failure is None:
            yield _message(VALUE, call, struct.pack("<d", score.value))
        else:
            yield _message(FAILED, call, _encoded(score.failure))


def _message(kind: bytes, call: int, body: bytes) -> bytes:
    return HEADER.pack(kind, os.getpid(), call) + body


def _encoded(reason: str) -> bytes:
    return reason.encode(errors="replace")
