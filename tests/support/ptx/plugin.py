"""The options of pytest that run the kernel tests on compiled code: `pytest --ptx=sm_90 tests/kernels`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ptx.triton_hook import Session

SESSION: pytest.StashKey[Session] = pytest.StashKey()
TARGETS = ("sm_80", "sm_90", "sm_100")
APPROXIMATIONS = ("nominal", "low", "high", "random")


def add_options(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("ptx", "run Triton's kernels as compiled, by an interpreter of PTX")
    group.addoption("--ptx", choices=TARGETS, help="the target to compile for; without it Triton interprets")
    group.addoption("--ptx-approximate", choices=APPROXIMATIONS, default="nominal", help="errors of ex2, rcp, ...")
    group.addoption("--ptx-seed", type=int, default=0, help="of the garbage in registers and shared memory")
    group.addoption("--ptx-order", type=int, default=None, help="seed of a random order of warps; default: in step")
    group.addoption("--ptx-check", action="store_true", help="look for races and unwritten shared memory")


def configure(config: pytest.Config) -> None:
    """Send Triton's launches to the interpreter of PTX. Before the first import of fastrl_kernels."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"fastrl-ptx-{os.getuid()}"))
    from triton.backends.compiler import GPUTarget

    from fastrl.backends import choice
    from ptx.arithmetic import Approximate
    from ptx.checker import Checker
    from ptx.machine import Options
    from ptx.triton_hook import Session, install

    target = config.getoption("ptx")
    options = Options(
        approximate=Approximate(config.getoption("ptx_approximate"), config.getoption("ptx_seed")),
        seed=config.getoption("ptx_seed"),
        order=config.getoption("ptx_order"),
        watchers=[Checker()] if config.getoption("ptx_check") else [],
    )
    session = Session(GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options)
    install(session)
    choice.triton_available = lambda device: (True, f"compiled for {target}, interpreted")
    config.stash[SESSION] = session


def summary(config: pytest.Config, reporter: pytest.TerminalReporter) -> None:
    """Say what ran, and what the checker found."""
    session = config.stash[SESSION]
    seconds, launches = session.seconds, session.launches
    reporter.write_sep("-", f"compiled for sm_{session.target.arch}, run by the interpreter of PTX")
    reporter.write_line(
        f"{len(session.compiled)} kernels compiled in {seconds['compile']:.1f} s, {launches.total()} launches in "
        f"{seconds['run']:.1f} s"
    )
    for watcher in session.options.watchers:
        reporter.write_line(f"{watcher.accesses} accesses checked, {len(watcher.found)} kinds of findings")
        for line in watcher.lines():
            reporter.write_line(f"  {line}")
