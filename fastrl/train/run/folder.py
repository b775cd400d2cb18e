"""The folder of a run: one run at a time, and the files that a run was given, told apart by their content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LOCK = ".lock"
# Of a larger file the size and this much at both ends count: weights of many GB would take minutes to read.
WHOLE_BYTES = 64 * 2**20
END_BYTES = 2**20


class FolderLock:
    """A lock on a folder, held until `release` or the end of the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            ValueError: a run of another process holds it.
            OSError: the file of the lock cannot be written.
        """
        path = folder / LOCK
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows
            return
        try:
            # A record lock belongs to the process: a worker that it forks does not keep the folder.
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip() or "of unknown origin"
            self.release()
            raise ValueError(
                f"run_dir {str(folder)!r} is in use by another run ({holder}); wait for it, end it, or choose another"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("run_dir %r cannot be locked: %s", str(folder), error)
            return
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Give the folder free."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


def input_digests(settings: Mapping[str, Any], without: tuple[str, ...] = ("run_dir",)) -> dict[str, str]:
    """Return the content of every file and folder that the settings name: setting and path -> size and SHA-256.

    A file of more than 64 MiB counts by its size and its first and last MiB. Reading takes about a second per GB.
    """
    found = {}
    for name, value in settings.items():
        if name in without or not isinstance(value, str) or not value or len(value) > 4096 or "\0" in value:
            continue
        path = Path(value)
        if path.is_file():
            found[f"{name}: {value}"] = _content(path)
        elif path.is_dir() and name != "output":
            for file in sorted(path.iterdir()):
                if file.is_file():
                    found[f"{name}: {file}"] = _content(file)
    return found


def check_inputs(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `ValueError` if a file that the run was given has other content now.

    A file that has gone since is no fault here: the loop that needs it says so.
    """
    for name in saved.keys() & now.keys():
        if saved[name] != now[name]:
            raise ValueError(
                f"the file of {name} has changed since the checkpoint ({saved[name]}, now {now[name]}): resume with "
                "the file as it was, or start a new run in another run_dir"
            )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(path: Path) -> str:
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return f"{size} bytes, SHA-256 {sha256_of(path)[:16]}"
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(size - END_BYTES)
        digest.update(file.read())
    return f"{size} bytes, SHA-256 of both ends {digest.hexdigest()[:16]}"


def write_digests(folder: Path, name: str) -> None:
    """Write size and SHA-256 of every file of the folder into its file `name`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != name)
    record = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}
    (folder / name).write_text(json.dumps(record, indent=1))


def damage(folder: Path, name: str) -> str | None:
    """Return the first difference of a folder from its digests in one sentence, or None, also without digests."""
    if not (folder / name).is_file():
        return None
    try:
        record: dict[str, Any] = json.loads((folder / name).read_text())
        for file, wanted in record.items():
            path = folder / file
            if not path.is_file():
                return f"{file} is missing"
            if path.stat().st_size != wanted["bytes"]:
                return f"{file} has {path.stat().st_size} bytes, expected {wanted['bytes']}"
            if sha256_of(path) != wanted["sha256"]:
                return f"{file} has other content than was written (its SHA-256 differs)"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{name} cannot be read"
    return None
