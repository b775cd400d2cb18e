"""A reward for programs: the share of tests that a completion's Python program passes, each in a confined process.

A test is an input for stdin and the expected output, the form of APPS (Hendrycks et al., arXiv 2105.09938) and
CodeContests (Li et al., arXiv 2203.07814). The training side compares the outputs, outside the process that runs the
program. A program can exit early or search its own process for the tests, but only printing the expected text passes.

| the process (Linux on x86_64, enforced by the kernel) | |
|---|---|
| cannot | start a process or a thread, run another program, use the network or any socket, signal another process |
| cannot | write, create, rename or remove a file |
| cannot | use more CPU time, wall time, memory or output than granted |
| can | read the files that this user can read, and import the standard library |

This is no virtual machine: the process shares the kernel. A program can read secrets on the disk. It can send them only
to its output, which is compared and discarded.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.train.rewards.tasks import Problem

_BLOCK = re.compile(r"^```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_RUNNER = Path(__file__).with_name("code_runner.py")


def extract_program(completion: str) -> str | None:
    """Return the last closed code block (three backquotes, with or without `python`) after the last `</think>`."""
    blocks = _BLOCK.findall(completion.rpartition("</think>")[2])
    return blocks[-1] if blocks else None


@dataclasses.dataclass(frozen=True)
class CodeTests:
    """1 if the program passes all tests of the problem, else 0. With `partial`, the share of passed tests.

    The tests are `problem.entry["tests"]`: a list of mappings with the texts `input` and `output`. Outputs are
    compared line by line, without white space at the ends of lines and at the end of the text.

    Raises:
        RuntimeError: this system cannot confine a process (it is not Linux on x86_64, or refuses the filter).
    """

    partial: bool = False
    """Return the share of passed tests."""
    timeout_s: float = 4.0
    """Wall time for all tests of a completion. Keep it below the time limit of a reward call."""
    memory_mb: int = 256
    """Address space of the process."""
    output_kb: int = 256
    """Longest output. A program that writes more fails."""

    def __post_init__(self) -> None:
        """Check the settings, and run a small program to check that the confinement works here."""
        for name in ("timeout_s", "memory_mb", "output_kb"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and greater than 0, got {getattr(self, name)}")
        if not (sys.platform == "linux" and platform.machine() == "x86_64"):
            raise RuntimeError(f"code tests need Linux on x86_64, got {sys.platform} on {platform.machine()}")
        if self._output("print(input())", "confined", 30.0) != "confined\n":
            raise RuntimeError(
                "code tests cannot confine a process on this system: the kernel refuses a seccomp filter"
            )

    def __call__(self, problem: Problem, completion: str) -> float | None:
        """Return the reward, or None for a problem without tests."""
        tests: Sequence[Mapping[str, Any]] = problem.entry.get("tests") or ()
        if not tests:
            return None
        program = extract_program(completion)
        if program is None:
            return 0.0
        deadline = time.monotonic() + self.timeout_s
        passed = 0
        for test in tests:
            left = deadline - time.monotonic()
            output = self._output(program, str(test["input"]), left) if left > 0 else None
            if output is not None and _lines(output) == _lines(str(test["output"])):
                passed += 1
            elif not self.partial:
                return 0.0
        return passed / len(tests)

    def _output(self, program: str, given: str, seconds: float) -> str | None:
        """Return the program's output, or None if it fails or takes too long."""
        with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
            source.write(program.encode(errors="replace"))
            stdin.write(given.encode(errors="replace"))
            source.seek(0)
            stdin.seek(0)
            limits = (math.ceil(seconds), self.memory_mb * 2**20, self.output_kb * 2**10, source.fileno())
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_RUNNER), *map(str, limits)],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=[source.fileno()],
                env={"PYTHONIOENCODING": "utf-8"},
                cwd="/",
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                process.kill()
                process.wait()
            if code != 0:
                return None
            stdout.seek(0)
            return stdout.read().decode(errors="replace")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
