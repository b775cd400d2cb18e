"""The house itself: what an import costs and pulls in, what the wheel holds, what the build files promise."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from script_loader import load_script

import fastrl

ROOT = Path(__file__).resolve().parents[2]
# What the user's environment may hold beside the core: none of it may be needed, or even loaded, by `import fastrl`.
CORE_MODULES = {"fastrl", "torch", "numpy"}
EXTRAS_OF_MAKE = ("train", "cpu", "trl", "dev")
IMPORT_SECONDS = 2.0


@cache
def project() -> dict[str, Any]:
    """Return the [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run_python(code: str, cwd: Path, **environment: str) -> str:
    """Return what a fresh interpreter prints for `code`, run in `cwd`."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def tracked_files() -> list[Path]:
    """Return the files that the repository tracks or would track; skip where that cannot be known."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a checkout")
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def make_dry_run(*arguments: str) -> str:
    """Return the commands that make would run."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light(tmp_path: Path) -> None:
    """`import fastrl` takes little beyond torch, and loads nothing but torch, numpy and the standard library."""
    code = """
import json, sys, time
import numpy, torch
before = set(sys.modules)
start = time.perf_counter()
import fastrl
seconds = time.perf_counter() - start
added = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps({"seconds": seconds, "added": sorted(added)}))
"""
    report = json.loads(run_python(code, tmp_path))
    assert set(report["added"]) <= CORE_MODULES
    assert report["seconds"] < IMPORT_SECONDS


def test_import_without_optional_packages(tmp_path: Path) -> None:
    """`import fastrl` works where torch and numpy are all there is."""
    absent = [
        "triton",
        "fastrl_kernels",
        "tvm_ffi",
        "transformers",
        "trl",
        "peft",
        "tyro",
        "rich",
        "yaml",
        "matplotlib",
    ]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import fastrl
for name in getattr(fastrl, "__all__", ()):
    getattr(fastrl, name)
print("imported")
"""
    assert run_python(code, tmp_path).strip() == "imported"


def test_kernels_folder_shadows_nothing(tmp_path: Path) -> None:
    """With the repository and its source root on the path, `import transformers` and its kernel hub still work."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    pytest.importorskip("transformers")
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
import transformers.integrations.hub_kernels
from transformers import AutoModelForCausalLM
print("imported")
"""
    assert run_python(code, tmp_path).strip().endswith("imported")


def test_version_is_stated_once() -> None:
    """The package and pyproject.toml agree on the version, and the changelog has an entry for it."""
    assert fastrl.__version__ == project()["version"]
    assert f"## [{fastrl.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_public_names_exist() -> None:
    """Every public name can be had from the package, once."""
    assert len(fastrl.__all__) == len(set(fastrl.__all__))
    missing = [name for name in fastrl.__all__ if not hasattr(fastrl, name)]
    assert missing == []


def test_package_is_typed() -> None:
    """Type checkers read the annotations of an installed fastrl."""
    assert (ROOT / "fastrl" / "py.typed").is_file()


def test_console_script_exists() -> None:
    """The `fastrl` command points at a function that is there."""
    module, _, function = project()["scripts"]["fastrl"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_no_file_names_this_machine() -> None:
    """No file holds an absolute path of a home or work folder, or the host of a package registry."""
    private = re.compile(rb"/(?:home|root|work|Users)/\w|pypi\.(?:org|io)|pythonhosted\.org|registry\.npmjs")
    found = [str(path.relative_to(ROOT)) for path in tracked_files() if private.search(path.read_bytes())]
    assert found == []


def test_text_files_are_clean() -> None:
    """Source and text files end with one newline and hold neither carriage returns nor trailing blanks."""
    suffixes = {".py", ".toml", ".md", ".yaml", ".yml", ".cpp", ".h", ".cu", ".cuh", ".txt"}
    texts = {path: path.read_bytes() for path in tracked_files() if path.suffix in suffixes}
    untidy = [
        str(path.relative_to(ROOT))
        for path, text in texts.items()
        if text and (not text.endswith(b"\n") or text.endswith(b"\n\n") or re.search(rb"\r|[ \t]\n", text))
    ]
    assert untidy == []


def test_every_requirement_is_pinned_within_its_range() -> None:
    """constraints.txt pins each direct requirement that make installs, at a version pyproject.toml accepts."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    wanted = [*project()["dependencies"]]
    for extra in EXTRAS_OF_MAKE:
        wanted += project()["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name}: {pins[name]} is outside {requirement.specifier}"


@pytest.mark.parametrize("target", ["test", "demo", "lint", "venv"])
def test_make_starts_from_the_pinned_torch(target: str, tmp_path: Path) -> None:
    """From nothing, each target makes the environment and installs the pinned torch before anything else."""
    commands = make_dry_run(target, f"VENV={tmp_path / 'venv'}", "TORCH=torch==1 triton==2")
    assert "-m venv" in commands
    first, *others = [line for line in commands.splitlines() if "-m pip" in line]
    assert first.endswith(" install torch==1 triton==2")
    assert all(" -c " in line for line in others)


def test_make_can_take_the_installed_torch(tmp_path: Path) -> None:
    """`TORCH=` installs no torch and lets the environment see the one that the interpreter has."""
    commands = make_dry_run("venv", f"VENV={tmp_path / 'venv'}", "TORCH=")
    assert "--system-site-packages" in commands
    assert not re.search(r"install .*\btorch==", commands)


def test_make_help_lists_every_target() -> None:
    """The commentary at the head of the Makefile, which `make help` prints, names every target."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    declared = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert declared is not None
    head = makefile.partition("\n\n")[0]
    missing = [name for name in declared[1].split() if name != "help" and f"make {name} " not in head]
    assert missing == []


def test_ci_runs_the_documented_command() -> None:
    """CI is an executable script that calls the test command of the README."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").rstrip().endswith("make test")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make test" in readme
    assert "make demo" in readme


def test_demo_headline_compares_like_with_like() -> None:
    """The headline takes the first and the last held-out evaluation of one mode, and the error of their difference."""

    def row(step: int, split: str, mode: str, accuracy: float, standard_error: float) -> dict[str, Any]:
        return {
            "step": step,
            "split": split,
            "mode": mode,
            "accuracy": accuracy,
            "standard_error": standard_error,
            "n": 200,
        }

    rows = [
        row(40, "held_out", "sampled", 0.50, 0.03),
        row(0, "held_out", "sampled", 0.10, 0.04),
        row(0, "held_out", "greedy", 0.2, 0.01),
        row(40, "held_out", "greedy", 0.9, 0.01),
        row(40, "train", "sampled", 0.8, 0.01),
        row(20, "held_out", "sampled", 0.3, 0.01),
    ]
    text = load_script("demo").headline(rows)
    assert "10.0% +- 4.0% before, 50.0% +- 3.0% after 40 steps; gain +40.0% = 8.0 standard errors" in text
    assert load_script("demo").headline(rows[:1]) == "no two held-out evaluations to compare"


def test_demo_keeps_finished_runs(tmp_path: Path) -> None:
    """A finished run is renamed to the first free number, never overwritten."""
    run = tmp_path / "demo"
    for expected in ("demo-1", "demo-2"):
        run.mkdir()
        assert load_script("demo").set_aside(run).name == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-1", "demo-2"]


@pytest.mark.slow
def test_wheel_holds_the_packages_and_the_device_code(tmp_path: Path) -> None:
    """The wheel is pure Python, complete, holds nothing else, and imports from where it is unpacked."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("fastrl-*-py3-none-any.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(site)

    def sources(folder: str, prefix: str, suffixes: tuple[str, ...]) -> set[str]:
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in suffixes)
        return {f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}

    python = sources("fastrl", "fastrl", (".py", ".typed"))
    kernels = sources("kernels/fastrl_kernels", "fastrl_kernels", (".py",))
    device = sources("csrc", "fastrl/csrc", (".cpp", ".cc", ".h", ".cu", ".cuh"))
    assert python | kernels | device <= names
    assert {name.partition("/")[0] for name in names} == {"fastrl", "fastrl_kernels"}
    code = "import fastrl, importlib.util as u; print(fastrl.__file__, u.find_spec('fastrl_kernels').origin)"
    for origin in run_python(code, tmp_path, PYTHONPATH=str(site)).split():
        assert Path(origin).is_relative_to(site)
