"""Run the tests of another project's checkout twice, alone and with fastrl switched on, and compare.

    python scripts/host_tests.py trl CHECKOUT [--stand-ins FOLDER] [-k EXPRESSION] [-m MARKS] [FILE ...]

CHECKOUT is a clone of the project at the tag of the installed version (TRL: v1.16.0). Its tests run there against the
installed package, and nothing of it is copied.

Tests of TRL's trainers load models and datasets from the hub. For a machine without access to the hub,
`--stand-ins FOLDER` builds random models and small datasets with the same names in FOLDER (once) and runs both sides on
them, offline. Tests that need images, remote code, vLLM or Liger's kernels are then left out.

Tests may fail or be skipped without fastrl too, so only the comparison counts: a test that passes alone and does not
pass with fastrl makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PLUGINS = ROOT / "tests" / "integrations" / "hosts"


@dataclass(frozen=True)
class Suite:
    """The test suite of a project."""

    plugin: str
    """The pytest plugin that switches fastrl on."""
    stand_ins: str
    """The module that builds stand-ins for models and datasets of the hub, and the plugin that lets tests find them."""
    without: str
    """pytest's -k that leaves out tests for which there are no stand-ins. The user's own -k is added to it."""
    files: tuple[str, ...]


SUITES = {
    "trl": Suite(
        "trl_plugin",
        "trl_stand_ins",
        # Liger's kernels replace classes of transformers for the whole process, and run on a GPU only.
        "not vlm and not VLM and not vision and not Vision and not remote_code and not vllm and not liger",
        (
            "tests/test_kernels.py",
            "tests/test_utils.py",
            "tests/test_sft_trainer.py",
            "tests/test_dpo_trainer.py",
            "tests/test_kto_trainer.py",
            "tests/test_grpo_trainer.py",
            "tests/test_rloo_trainer.py",
            "tests/test_reward_trainer.py",
        ),
    )
}


def environment(stand_ins: Path | None) -> dict[str, str]:
    """Return the environment of the tests; with stand-ins it is offline and names their folders."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(PLUGINS), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if stand_ins is not None:
        variables |= {"TRL_STAND_INS": str(stand_ins), "HF_HUB_OFFLINE": "1"}
        variables |= {"HF_HUB_CACHE": str(stand_ins / "hub"), "HF_DATASETS_CACHE": str(stand_ins / "cache")}
    return variables


def outcomes(checkout: Path, arguments: list[str], variables: dict[str, str]) -> dict[str, str]:
    """Return the outcome of every test: "passed", "failed" or "skipped"."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", f"--junitxml={report}"]
        result = subprocess.run([*command, *arguments], cwd=checkout, env=variables, check=False)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report in {checkout}, exit status {result.returncode}")
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            tags = {child.tag for child in case}
            outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            found[f"{case.get('classname')}::{case.get('name')}"] = outcome
        return found


def counted(found: dict[str, str]) -> str:
    """Return the counts as text."""
    return ", ".join(f"{list(found.values()).count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))


def main() -> int:
    """Return 0 if fastrl breaks no test that passes without it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=sorted(SUITES))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("files", nargs="*", help="test files, relative to the checkout; default: those of the trainers")
    parser.add_argument("--stand-ins", type=Path, metavar="FOLDER", help="where to build what the hub would give")
    parser.add_argument("-k", dest="expression", help="pytest's -k")
    parser.add_argument("-m", dest="marks", default="not slow", help="pytest's -m; default: %(default)s")
    given = parser.parse_intermixed_args()
    suite = SUITES[given.host]
    files = given.files or [name for name in suite.files if (given.checkout / name).exists()]
    if not files:
        parser.error(f"{given.checkout} has none of {', '.join(suite.files)}")
    stand_ins = None if given.stand_ins is None else given.stand_ins.resolve()
    variables = environment(stand_ins)
    arguments = ["-m", given.marks, *files]
    if stand_ins is not None:
        if not stand_ins.exists():
            build = [sys.executable, str(PLUGINS / f"{suite.stand_ins}.py"), str(stand_ins)]
            subprocess.run(build, env=variables, check=True)
        expression = suite.without if given.expression is None else f"({given.expression}) and {suite.without}"
        arguments = ["-p", suite.stand_ins, "-k", expression, *arguments]
    elif given.expression is not None:
        arguments = ["-k", given.expression, *arguments]
    alone = outcomes(given.checkout, arguments, variables)
    ours = outcomes(given.checkout, ["-p", suite.plugin, *arguments], variables)
    broken = sorted(name for name, outcome in alone.items() if outcome == "passed" and ours.get(name) != "passed")
    print(f"alone:       {counted(alone)}\nwith fastrl: {counted(ours)}")
    for name in broken:
        print(f"passes alone, {ours.get(name, 'is missing')} with fastrl: {name}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
