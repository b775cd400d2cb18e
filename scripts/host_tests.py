"""Run the tests of another project's checkout twice, alone and with fastrl switched on, and compare.

    python scripts/host_tests.py trl CHECKOUT [-k EXPRESSION] [FILE ...]

CHECKOUT is a clone of the project at the tag of the installed version (TRL: v1.16.0); its tests are run there and
nothing of it is copied. Tests that need models from the hub fail or are skipped without a network, on both sides. What
counts is the comparison: a test that passes alone and does not with fastrl makes the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# Plugin and test files per host.
HOSTS = {
    "trl": (
        "trl_plugin",
        (
            "tests/test_kernels.py",
            "tests/test_utils.py",
            "tests/test_sft_trainer.py",
            "tests/test_dpo_trainer.py",
            "tests/test_kto_trainer.py",
            "tests/test_grpo_trainer.py",
            "tests/test_rloo_trainer.py",
        ),
    )
}


def outcomes(checkout: Path, files: list[str], expression: str | None, plugin: str | None) -> dict[str, str]:
    """Return the outcome of every test: "passed", "failed" or "skipped"."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", f"--junitxml={report}"]
        command += [] if expression is None else ["-k", expression]
        command += [] if plugin is None else ["-p", plugin]
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests" / "hosts"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        result = subprocess.run([*command, *files], cwd=checkout, env=environment, check=False)
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
    """Return 0 when fastrl breaks no test that passes without it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=sorted(HOSTS))
    parser.add_argument("checkout", type=Path)
    parser.add_argument("files", nargs="*", help="test files, relative to the checkout; default: those of the trainers")
    parser.add_argument("-k", dest="expression", help="pytest's -k")
    arguments = parser.parse_args()
    plugin, known = HOSTS[arguments.host]
    files = arguments.files or [name for name in known if (arguments.checkout / name).exists()]
    if not files:
        parser.error(f"{arguments.checkout} has none of {', '.join(known)}")
    alone = outcomes(arguments.checkout, files, arguments.expression, None)
    ours = outcomes(arguments.checkout, files, arguments.expression, plugin)
    broken = sorted(name for name, outcome in alone.items() if outcome == "passed" and ours.get(name) != "passed")
    print(f"alone:       {counted(alone)}\nwith fastrl: {counted(ours)}")
    for name in broken:
        print(f"passes alone, {ours.get(name, 'is missing')} with fastrl: {name}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
