"""Compile a library of kernels once, keep it in the user's cache, load it once: for the C++ and the CUDA rows.

A library stands under a name that is a hash of its sources, flags and compiler. It has no torch headers: tensors cross
as views of `apache-tvm-ffi`. How each one is compiled stands with its backend, in cpu.py and cuda.py.

    FASTRL_CACHE_DIR   where libraries are kept, else $XDG_CACHE_HOME/fastrl, else ~/.cache/fastrl
"""

from __future__ import annotations

import hashlib
import os
import shutil
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

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_once(library: Path, build: Callable[[Path], None]) -> Path:
    """Return the library, built unless it is there. Of several processes that ask at once, one builds."""
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(library.with_suffix(".lock")):
            # Another process may have built it while this one waited for the lock.
            if not library.exists():
                build(library)
    return library


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
