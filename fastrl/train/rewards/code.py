"""A reward for programs: the share of tests that a completion's Python program passes, each in a confined process.

A test is an input for stdin and the expected output, the form of APPS (Hendrycks et al., arXiv 2105.09938) and
CodeContests (Li et al., arXiv 2203.07814). The training side compares the outputs, outside the process that runs the
program, and the program cannot reach the memory of that side. So only printing the expected text passes.

| the process (Linux on x86_64, enforced by the kernel, as root too) | |
|---|---|
| cannot | start a process or run another program, use the network or a socket, signal or trace another process |
| cannot | open any file but the standard library and shared libraries, and these only to read |
| cannot | use more CPU time, wall time, memory or output than granted |
| can | start threads, use an asyncio loop, and read stdin in every way: input(), sys.stdin, open(0), /dev/stdin |

`fastrl.train.rewards.confine` states by which means. This is no virtual machine: the process shares the kernel.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastrl.train.rewards import confine
from fastrl.train.rewards.tasks import Problem

# A fence opens at the start of a line, perhaps in a quotation, as an item of a list or behind a tag such as <answer>.
_OPENING = re.compile(
    r"(?P<indent>[ \t>]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)?)(?:</?\w+>[ \t]*)*"
    r"(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`\n]*)"
)
_CLOSING = re.compile(r"[ \t>]*(?P<fence>`{3,}|~{3,})[ \t]*(?:</?\w+>.*)?")
_PYTHON = ("python", "python3", "py", "py3", "python-3", "ipython", "ipython3")
_RUNNER = Path(__file__).with_name("code_runner.py")


def extract_program(completion: str) -> str | None:
    """Return the program of a completion: its last closed code block after the last `</think>`.

    A block stands between fences of three or more backquotes or tildes. If a block is marked as Python (`python`,
    `python3`, `py`, `{.python}`, in any case), only such blocks count. Otherwise blocks without a mark do. A block in a
    list or a quotation loses its indentation. None if no block counts, or if no fence closes it.
    """
    marked: list[str] = []
    plain: list[str] = []
    lines = iter(completion.rpartition("</think>")[2].splitlines())
    for line in lines:
        opening = _OPENING.fullmatch(line)
        if opening is None:
            continue
        body = _body(lines, opening)
        language = re.split(r"[\s{},:=.]+", opening["info"].strip().strip("{}. ").lower())[0]
        if body is not None and language in _PYTHON:
            marked.append(body)
        elif body is not None and not language:
            plain.append(body)
    found = marked or plain
    return found[-1] if found else None


def _body(lines: Iterator[str], opening: re.Match[str]) -> str | None:
    """Return the text up to the closing fence, or None if there is none."""
    quoted, width, body = ">" in opening["indent"], len(opening["indent"].expandtabs(4)), []
    for line in lines:
        closing = _CLOSING.fullmatch(line)
        if closing and closing["fence"].startswith(opening["fence"]):
            return "\n".join([*body, ""])
        if quoted:
            line = re.sub(r"^[ \t]*(?:> ?)+", "", line)
        elif width:
            line = line.expandtabs(4) if line.startswith("\t") else line
            line = line[min(width, len(line) - len(line.lstrip(" "))) :]
        body.append(line)
    return None


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
        reason = confine.why_not()
        if reason is None:
            try:
                reason = None if self._output("print(input())", "confined", 30.0) == "confined\n" else "a trial failed"
            except OSError as error:
                reason = str(error)
        if reason is not None:
            raise RuntimeError(f"code tests cannot confine a process on this system: {reason}")

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
        """Return the program's output, or None if it fails or takes too long.

        Raises:
            OSError: the kernel refuses a part of the confinement.
        """
        with _memory(program) as source, _memory(given) as stdin, _memory("") as stdout, _memory("") as failure:
            limits = (math.ceil(seconds), self.memory_mb * 2**20, self.output_kb * 2**10)
            inherited = (source.fileno(), failure.fileno())
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_RUNNER), *map(str, limits), *map(str, inherited)],
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=inherited,
                env={"PYTHONIOENCODING": "utf-8", "PYTHONHASHSEED": "0"},
                cwd="/",
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
            finally:
                process.kill()
                process.wait()
            failure.seek(0)
            if reason := failure.read().decode(errors="replace"):
                raise OSError(reason)
            if code != 0:
                return None
            stdout.seek(0)
            return stdout.read(self.output_kb * 2**10).decode(errors="replace")


def _memory(text: str) -> BinaryIO:
    """Return a file in memory, without a name that another process could find."""
    file = os.fdopen(os.memfd_create("fastrl"), "w+b")
    file.write(text.encode(errors="replace"))
    file.flush()
    file.seek(0)
    return file


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
