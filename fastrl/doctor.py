"""The findings of `fastrl doctor`: versions, devices, compilers, and the backend of each operation with the reason.

A missing part must not make the command fail. If a probe raises, the exception is its finding.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

TIMEOUT_S = 20
# Extras for development and for comparisons only.
QUIET_EXTRAS = ("bench", "dev")


def diagnose() -> dict[str, Any]:
    """Return the installed software and the backends of this machine, as JSON values.

    Returns:
        `system`, `packages` (per extra, name -> version or None), `devices`, `compilers`, `triton`, and `backends`:
        device type -> operation -> "backend: reason".
    """
    return {
        "system": _probe(_system),
        "packages": _probe(_packages),
        "devices": _probe(_devices),
        "compilers": _probe(_compilers),
        "triton": _probe(_triton),
        "backends": _probe(_backends),
    }


def render(findings: Mapping[str, Any]) -> str:
    """Return the findings as indented text for people."""
    return "\n".join(_lines(findings, 0))


def _lines(content: Mapping[str, Any], depth: int) -> Iterator[str]:
    indent = "  " * depth
    width = max((len(str(name)) for name, value in content.items() if not isinstance(value, Mapping)), default=0)
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from _lines(value, depth + 1)
        else:
            shown = "not installed" if value is None else "yes" if value is True else "no" if value is False else value
            yield f"{indent}{name:<{width}}  {shown}"


def _probe(look: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return look()
    except Exception as error:  # a broken driver or package is a finding too
        return {"failed": f"{type(error).__name__}: {error}"}


def _system() -> dict[str, Any]:
    import fastrl

    return {
        "fastrl": getattr(fastrl, "__version__", "unknown"),
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def processor() -> str:
    """Return the name of the processor, as the system knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _packages() -> dict[str, dict[str, str | None]]:
    """Return the versions of the required packages, per extra. `core` holds those without an extra."""
    found: dict[str, dict[str, str | None]] = {"core": {}}
    for requirement in _requirements():
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", requirement)
        group = extra.group(1) if extra else "core"
        if name and group not in QUIET_EXTRAS:
            found.setdefault(group, {})[name.group()] = _version(name.group())
    return found


def _requirements() -> list[str]:
    """Return the requirements of the installed distribution, or of the checkout's pyproject.toml."""
    try:
        return importlib.metadata.requires("fastrl") or []
    except importlib.metadata.PackageNotFoundError:
        file = Path(__file__).resolve().parent.parent / "pyproject.toml"
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"].items()
        return [*project["dependencies"], *(f"{x}; extra == '{name}'" for name, listed in extras for x in listed)]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    if torch.cuda.is_available():
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            devices[f"cuda:{index}"] = (
                f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}, {runtime}"
            )
    else:
        built = torch.version.cuda or torch.version.hip
        devices["cuda"] = (
            f"no device (torch {torch.__version__} is built {f'for {built}' if built else 'without CUDA'})"
        )
    if torch.xpu.is_available():
        devices["xpu"] = torch.xpu.get_device_name()
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _compilers() -> dict[str, Any]:
    from fastrl.backends import build

    found = {"C++": _tool_version([os.environ.get("CXX") or "c++", "--version"], first=True)}
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and os.path.isfile(os.path.join(folder, "bin", "nvcc")):
            found["nvcc"] = _tool_version([os.path.join(folder, "bin", "nvcc"), "--version"], first=False)
            break
    else:
        found["nvcc"] = _tool_version(["nvcc", "--version"], first=False)
    ninja = "ninja"
    if shutil.which(ninja) is None and (folder := build.ninja_folder()) is not None:
        ninja = os.path.join(folder, ninja)
    found["ninja"] = _tool_version([ninja, "--version"], first=True)
    return found


def _tool_version(command: list[str], *, first: bool) -> str:
    """Return the version line of a tool's answer (the first line, or nvcc's with `release`), and the tool's path."""
    path = shutil.which(command[0])
    if path is None:
        return f"not found ({command[0]})"
    try:
        answer = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run: {error}"
    lines = answer.stdout.strip().splitlines() or ["no version"]
    line = lines[0] if first else next((line for line in lines if "release" in line), lines[-1])
    return f"{line.strip()} ({path})"


def _triton() -> dict[str, Any]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "version": _version("triton"),
        "mode": "interpreter, for tests only (TRITON_INTERPRET=1)" if interpreted else "compiler",
    }


def _backends() -> dict[str, Any]:
    import torch

    from fastrl.backends import build, cuda
    from fastrl.ops import explain

    types = ["cpu"]
    types += ["cuda"] if torch.cuda.is_available() else []
    types += ["xpu"] if torch.xpu.is_available() else []
    backends: dict[str, Any] = {kind: _probe(lambda kind=kind: explain(kind)) for kind in types}
    missing = cuda.missing()
    backends["cuda kernels"] = (
        f"cannot be built: {missing}"
        if missing
        else (
            f"built by {cuda.nvcc()} for backend='cuda', which is taken by name only, on compute capability "
            f"{'.'.join(map(str, cuda.CAPABILITY))}"
        )
    )
    try:
        backends["cache of compiled kernels"] = str(build.cache_folder())
    except RuntimeError as error:
        backends["cache of compiled kernels"] = f"none: {error}"
    return backends
