"""Machine and software of a result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastrl

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "verl",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn",
    "apache-tvm-ffi",
    "numpy",
)


def _first_match(path: str, pattern: str) -> str | None:
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    found = re.search(pattern, text)
    return found.group(1).strip() if found else None


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine(device: torch.device) -> dict[str, Any]:
    """Return the processor, memory and device."""
    memory = _first_match("/proc/meminfo", r"MemTotal:\s*(\d+)")
    facts: dict[str, Any] = {
        "cpu": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": None if memory is None else int(memory) * 1024,
        "load_average": os.getloadavg()[0],
        "system": platform.system(),
        # First touches of fresh memory are a good part of a CPU time. Huge pages make them cheap.
        "huge_pages": _first_match("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]"),
        "huge_pages_in_torch": os.environ.get("THP_MEM_ALLOC_ENABLE"),
        "device": str(device.type),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = properties.name
        facts["gpu_memory_bytes"] = properties.total_memory
        facts["gpu_capability"] = f"{properties.major}.{properties.minor}"
        facts["driver"] = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def versions() -> dict[str, str | None]:
    """Return the version of every package that takes part, None if it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "fastrl": fastrl.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    commit = _output_of("git", "rev-parse", "--short=12", "HEAD")
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no")
    found["commit"] = commit if not (commit and changed) else f"{commit} with local changes"
    return found


def new_record(kind: str, device: torch.device, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a record without results."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
        "versions": versions(),
        "parameters": parameters,
        "results": [],
        "targets": [],
    }


def file_name(record: dict[str, Any]) -> str:
    """Return `<device>-<date>.json`."""
    device = record["machine"].get("gpu") or record["machine"]["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", str(device).lower()).strip("-")
    return f"{slug}-{record['date'][:10]}.json"


def save(record: dict[str, Any], folder: Path, prefix: str = "") -> Path:
    """Write a record, replacing an earlier one of the day and the prefix, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{prefix}{file_name(record)}"
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.replace(path)
    return path


def load(path: Path) -> dict[str, Any]:
    """Return a record, or raise `ValueError` for a file that is none."""
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} must be a result file with schema {SCHEMA}")
    return record


def newest(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the latest record of each kind ("cpu", "gpu", "sparse") in a folder."""
    latest: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        record = load(path)
        kept = latest.get(record["kind"])
        if kept is None or kept["date"] < record["date"]:
            latest[record["kind"]] = record
    return latest
