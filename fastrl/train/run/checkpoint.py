"""Checkpoints that survive a kill at any moment and restore a run to the bit.

A checkpoint is a folder `step_00000010` with safetensors files, one `state.json`, and `digests.json` with the size and
SHA-256 of the others, which a load compares. Nothing is pickled. A save

1. writes the folder under a temporary name on the same filesystem, and syncs every file,
2. renames the folder, and then
3. replaces the file `latest`, which holds the name of the newest complete checkpoint.

After a kill before step 3 the previous checkpoint is still the latest. The next save removes the leftovers.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrl.train.run.folder import damage, write_digests

LATEST = "latest"
STATE = "state.json"
DIGESTS = "digests.json"
PARTIAL = ".partial-"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    """File name without the ending -> tensors by name, on the CPU."""
    state: dict[str, Any]
    """Everything that is not a tensor, as JSON values."""


def save_checkpoint(
    root: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of `step` under `root` atomically, make it the latest, and keep the `keep` youngest only.

    Raises ValueError if the latest checkpoint is already at `step`, and OSError if it cannot be written.
    """
    from safetensors.torch import save_file

    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step_{step:08d}"
    if _named_latest(root) == target and (target / STATE).is_file():
        raise ValueError(f"the checkpoint of step {step} is already there: {target}")
    for leftover in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(leftover)
    if target.exists():  # complete, but the kill came before `latest` named it
        shutil.rmtree(target)
    partial = root / f"{PARTIAL}{target.name}"
    partial.mkdir()
    for name, group in tensors.items():
        values = {key: value.detach().cpu().contiguous() for key, value in group.items()}
        with disk_errors(root):
            save_file(values, partial / f"{name}.safetensors")
    (partial / STATE).write_text(json.dumps({**state, "step": step}, indent=1))
    write_digests(partial, DIGESTS)
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    partial.rename(target)
    _sync(root)
    _replace_text(root / LATEST, target.name)
    _drop_old(root, keep, target)
    return target


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the error of safetensors for a full disk into an `OSError` that names the folder."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def latest_checkpoint(root: str | Path) -> Path | None:
    """Return the folder of the newest complete checkpoint under `root`, or None.

    It is the one that the file `latest` names. Without that file it is the youngest one.

    Raises:
        ValueError: `latest` names no complete checkpoint.
    """
    root = Path(root)
    path = _named_latest(root)
    if path is None:
        found = _by_age(root)
        return found[-1] if found else None
    if not (path / STATE).is_file():
        raise ValueError(
            f"{root / LATEST} names {path.name!r}, which is not a complete checkpoint under {root}{_way_back(path)}"
        )
    return path


def _named_latest(root: Path) -> Path | None:
    pointer = root / LATEST
    if pointer.is_dir():
        raise ValueError(f"expected the file {pointer} with the name of a checkpoint, got a folder: remove it")
    if not pointer.is_file():
        return None
    name = pointer.read_text(errors="replace").strip()
    if not name or Path(name).name != name or "\0" in name:
        raise ValueError(f"{pointer} must hold the name of a checkpoint beside it, got {name[:80]!r}")
    return root / name


def _by_age(root: Path) -> list[Path]:
    """Return the complete checkpoints under `root`, the oldest first."""
    found = [path for path in root.glob("step_*") if (path / STATE).is_file()]
    return sorted(found, key=lambda path: ((path / STATE).stat().st_mtime_ns, path.name))


def _way_back(path: Path) -> str:
    """Return how to go on from the youngest whole checkpoint beside a damaged one."""
    for other in reversed(_by_age(path.parent)):
        if other != path and damage(other, DIGESTS) is None:
            return f"; {other.name} is whole: write its name into {path.parent / LATEST} to resume from there"
    return "; there is no other whole checkpoint beside it"


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Return the checkpoint in the folder `path`.

    Raises:
        ValueError: it is no checkpoint, or a file of it is missing or damaged. The message names the file and a whole
            checkpoint beside it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not (path / STATE).is_file():
        raise ValueError(f"expected a checkpoint folder with {STATE}, got {path}{_way_back(path)}")
    if (reason := damage(path, DIGESTS)) is not None:
        raise ValueError(f"the checkpoint {path} is damaged: {reason}{_way_back(path)}")
    file = path / STATE
    try:
        state = json.loads(file.read_text())
        tensors = {}
        for file in sorted(path.glob("*.safetensors")):
            tensors[file.stem] = load_file(file)
    except (SafetensorError, ValueError) as error:  # of a checkpoint without digests
        raise ValueError(f"the checkpoint {path} is damaged: {file.name}: {error}{_way_back(path)}") from error
    return Checkpoint(path, tensors, state)


def optimizer_to_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the optimiser's state as named tensors, and its parameter groups as JSON values."""
    saved = optimizer.state_dict()
    tensors = {}
    for index, entries in saved["state"].items():
        for name, value in entries.items():
            tensors[f"{index}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors, saved["param_groups"]


def optimizer_from_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Restore the state that `optimizer_to_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state(generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of Python's, NumPy's and torch's generators and of `generator`: tensors and JSON values."""
    tensors = {"torch": torch.get_rng_state(), "generator": generator.get_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    assert isinstance(numpy_state, dict)
    inner = numpy_state["state"]
    return tensors, {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": [int(word) for word in inner["key"]],
            "pos": int(inner["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }


def set_random_state(generator: torch.Generator, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Restore the states that `random_state` returned."""
    torch.set_rng_state(tensors["torch"])
    generator.set_state(tensors["generator"])
    cuda = [tensors[f"cuda.{i}"] for i in range(sum(name.startswith("cuda.") for name in tensors))]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    key = np.array(saved["key"], dtype=np.uint32)
    np.random.set_state(("MT19937", key, saved["pos"], saved["has_gauss"], saved["gauss"]))  # noqa: NPY002


def write_json(path: str | Path, value: Any) -> None:
    """Replace the JSON file `path` atomically."""
    _replace_text(Path(path), json.dumps(value, indent=1))


def _replace_text(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text)
    _sync(scratch)
    scratch.replace(path)
    _sync(path.parent)


def _drop_old(root: Path, keep: int, newest: Path) -> None:
    # By age: after a return to an earlier step the higher numbers are the older ones.
    others = [path for path in _by_age(root) if path != newest]
    # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under a complete name.
    for old in others[: max(0, len(others) - keep + 1)]:
        doomed = root / f"{PARTIAL}{old.name}"
        old.rename(doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
