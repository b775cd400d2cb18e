"""The cache of compiled libraries: nothing is loaded that another user could have put there, or that is not whole."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from fastrl.backends import build

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX owners and modes")


def compiler(calls: list[Path]):
    def compile_to(path: Path) -> None:
        calls.append(path)
        path.write_bytes(b"library")

    return compile_to


def built(tmp_path: Path, calls: list[Path]) -> Path:
    return build.build_once(tmp_path / "cache" / "x.so", compiler(calls))


def test_a_library_is_built_once_into_a_private_folder(tmp_path: Path) -> None:
    calls: list[Path] = []
    before = os.umask(0)
    try:
        library = built(tmp_path, calls)
        assert built(tmp_path, calls) == library
    finally:
        os.umask(before)
    assert calls == [library]
    for path in (library.parent, *library.parent.iterdir()):
        assert path.stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("content", [b"", b"libr", b"library with a guest"])
def test_a_library_that_is_not_as_it_was_built_is_built_anew(tmp_path: Path, content: bytes) -> None:
    calls: list[Path] = []
    library = built(tmp_path, calls)
    library.write_bytes(content)
    assert built(tmp_path, calls).read_bytes() == b"library"
    assert len(calls) == 2


def test_a_library_without_its_digest_is_built_anew(tmp_path: Path) -> None:
    calls: list[Path] = []
    library = built(tmp_path, calls)
    library.with_suffix(".sha256").unlink()
    built(tmp_path, calls)
    assert len(calls) == 2


@pytest.mark.parametrize("what", ["folder", "library", "digest"])
@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_what_others_may_write_to_is_refused(tmp_path: Path, what: str, mode: int) -> None:
    library = built(tmp_path, [])
    {"folder": library.parent, "library": library, "digest": library.with_suffix(".sha256")}[what].chmod(mode)
    with pytest.raises(RuntimeError, match=r"writable by its owner alone, got .* with mode 7[57][57]: .*chmod"):
        built(tmp_path, [])


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["folder", "library", "digest"])
def test_what_belongs_to_another_user_is_refused(tmp_path: Path, what: str) -> None:
    library = built(tmp_path, [])
    os.chown({"folder": library.parent, "library": library, "digest": library.with_suffix(".sha256")}[what], 1234, -1)
    with pytest.raises(RuntimeError, match=r"must belong to user 0, got .* of user 1234: set FASTRL_CACHE_DIR"):
        built(tmp_path, [])


@pytest.mark.parametrize("what", ["folder", "library", "digest"])
def test_a_symbolic_link_is_refused(tmp_path: Path, what: str) -> None:
    library = built(tmp_path, [])
    path = {"folder": library.parent, "library": library, "digest": library.with_suffix(".sha256")}[what]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="no symbolic links"):
        built(tmp_path, [])


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o700)
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "cache" / "x.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        built(tmp_path, [])
    assert (tmp_path / "victim").read_text() == "kept"


def test_of_several_threads_one_builds(tmp_path: Path) -> None:
    calls: list[Path] = []
    threads = [threading.Thread(target=built, args=(tmp_path, calls)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
