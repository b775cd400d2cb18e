"""Run checks in groups of processes on this machine, joined by gloo over the loopback interface.

A check is a module-level function of (rank, world_size). The processes of a group run the same checks in the same
order. After a check has failed on a rank the group is out of step: that rank stops, and the others fail at their next
collective, by its time limit at the latest.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

Check = Callable[[int, int], None]

HOST = "127.0.0.1"
LOOPBACK = ("lo", "lo0")
COLLECTIVE_SECONDS = 20
# The whole life of a group: imports on a busy machine are the longest part.
GROUP_SECONDS = 240


def run_checks(world_size: int, checks: Sequence[Check], directory: Path) -> dict[str, list[str]]:
    """Return, per check, what went wrong on which rank; an empty list where every rank passed it.

    Args:
        world_size: number of processes.
        checks: what each of them runs, in order.
        directory: an empty folder for the ranks' reports.
    """
    # The parent holds the store: its port is free because the system chose it, and stays taken until the group is done.
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    # Processes are forked from a server that has imported torch once and has run nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "fastrl"])
    processes = [
        context.Process(target=_work, args=(rank, world_size, store.port, list(checks), directory), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(GROUP_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
    failures: dict[str, list[str]] = {check.__name__: [] for check in checks}
    for rank in range(world_size):
        report = directory / f"rank{rank}.json"
        results = json.loads(report.read_text()) if report.exists() else {}
        for name, found in failures.items():
            outcome = results.get(name, "not reached: an earlier check failed, or the process ended")
            if outcome:
                found.append(f"rank {rank}: {outcome}")
    return failures


def _work(rank: int, world_size: int, port: int, checks: Sequence[Check], directory: Path) -> None:
    """Join the group, run the checks and report."""
    torch.set_num_threads(1)
    interfaces = {name for _, name in socket.if_nameindex()}
    for name in LOOPBACK:
        if name in interfaces:
            os.environ["GLOO_SOCKET_IFNAME"] = name
    store = dist.TCPStore(HOST, port, is_master=False)
    limit = timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    results: dict[str, str] = {}
    report = directory / f"rank{rank}.json"
    for check in checks:
        torch.manual_seed(0)
        try:
            check(rank, world_size)
            results[check.__name__] = ""
        except Exception:
            results[check.__name__] = traceback.format_exc()
        # After every check: a communication library may end the process where another rank has gone.
        report.write_text(json.dumps(results))
        if results[check.__name__]:
            break
    dist.destroy_process_group()
