"""Compile a library of kernels once, keep it in the user's cache, load it once: for the C++ and the CUDA rows.

A library stands under a name that is a hash of its sources, flags and compiler. It has no torch headers: tensors cross
as views of `apache-tvm-ffi`. How each one is compiled stands with its backend, in cpu.py and cuda.py.

    FASTRL_CACHE_DIR   where libraries are kept, else $XDG_CACHE_HOME/fastrl, else ~/.cache/fastrl
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def source_folder() -> Path:
    """Return the csrc folder: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu").is_dir():
            return folder
    raise RuntimeError(f"the C++ sources are missing: no csrc/cpu in {package} or {package.parent}")


def sources(folder: str, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of csrc/<folder> and of the shared headers that have one of the suffixes, sorted."""
    root = source_folder()
    files = sorted([*(root / folder).iterdir(), *(root / "include" / "fastrl").iterdir()])
    return [file for file in files if file.suffix in suffixes]


def cache_folder() -> Path:
    """Return the folder in which built libraries and converted models are kept.

    Raises:
        RuntimeError: no folder is set and the user has no home, as in a container that runs under an arbitrary id.
    """
    if chosen := os.environ.get("FASTRL_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fastrl"
    try:
        return Path.home() / ".cache" / "fastrl"
    except RuntimeError as error:
        raise RuntimeError("no home directory to keep compiled kernels and models in; set FASTRL_CACHE_DIR") from error


def ninja_folder() -> str | None:
    """Return the folder of a ninja that pip put beside the interpreter, for a PATH without it, or None.

    pip installs ninja as a script of the environment, which need not be active.
    """
    folder = str(Path(sys.executable).parent)
    return folder if shutil.which("ninja", path=folder) else None


def library_path(name: str, parts: Iterable[str], files: Iterable[Path]) -> Path:
    """Return where the library of these sources, and of all else that decides its bytes, is kept, built or not."""
    digest = hashlib.sha256()
    named = [text for file in files for text in (file.name, file.read_text(encoding="utf-8"))]
    for part in (*parts, *named):
        digest.update(part.encode() + b"\0")
    return cache_folder() / f"{name}-{digest.hexdigest()[:20]}.so"


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an advisory lock on a file: another process that builds the same library waits."""
    import fcntl  # POSIX only, like the build

    # Not through a link, and with the rights of the owner alone whatever the mask is.
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_ours(path: Path) -> None:
    """Refuse a file or folder of the cache that another user could have put there or could change.

    Raises:
        RuntimeError: it is a symbolic link, belongs to another user, or others may write to it.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise RuntimeError(f"the cache must hold no symbolic links, got {path}: remove it, or set FASTRL_CACHE_DIR")
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid != os.geteuid():
        raise RuntimeError(
            f"the cache must belong to user {os.geteuid()}, got {path} of user {found.st_uid}: set FASTRL_CACHE_DIR to "
            "a folder of your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(
            f"the cache must be writable by its owner alone, got {path} with mode {stat.S_IMODE(found.st_mode):o}: "
            f"remove it, or run chmod -R go-w {path}"
        )


def build_once(library: Path, build: Callable[[Path], None]) -> Path:
    """Return the library, built unless it is there as it was built. Of several processes that ask, one builds.

    Raises:
        RuntimeError: another user could have put the library there.
    """
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_ours(library.parent)
    if not _is_whole(library):
        with exclusive(library.with_suffix(".lock")):
            # Another process may have built it while this one waited for the lock.
            if not _is_whole(library):
                library.unlink(missing_ok=True)
                build(library)
                library.chmod(library.stat().st_mode & ~0o022)
                _digest_file(library).write_text(_digest(library))
                _digest_file(library).chmod(0o600)
    return library


def _is_whole(library: Path) -> bool:
    """Whether the library is there with the digest that its build wrote down."""
    digest = _digest_file(library)
    if not (library.exists() or library.is_symlink()):
        return False
    check_ours(library)
    if not digest.is_file():
        return False
    check_ours(digest)
    return digest.read_text().strip() == _digest(library)


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def error_line(output: str) -> str:
    """Return the first line of a compiler's output that speaks of an error, or all of it, on one line."""
    lines = [line for line in output.splitlines() if "error" in line.lower()]
    return " ".join((lines[0] if lines else output).split())


class KernelModule:
    """A module of compiled kernels, loaded on first use. It remembers a failure for the life of the process."""

    def __init__(self, library: Callable[[], Path]) -> None:
        self.library = library
        """Returns the built library, or raises RuntimeError with the remedy in one line."""
        self.loaded: Any = None
        self.failure: str | None = None
        self._lock = threading.RLock()

    def get(self) -> Any:
        """Return the module, or raise the RuntimeError of its first failure."""
        if self.loaded is None:
            with self._lock:
                if self.failure is not None:
                    raise RuntimeError(self.failure)
                if self.loaded is None:
                    self.loaded = self._load()
        return self.loaded

    def _load(self) -> Any:
        try:
            library = self.library()
        except RuntimeError as error:
            self.failure = str(error)
            raise
        import tvm_ffi

        return tvm_ffi.load_module(str(library))
