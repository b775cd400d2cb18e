"""Compare an adapter's losses with the host's own, from a clone of its project.

    python scripts/host_losses.py HOST CHECKOUT

HOST is slime, nemo_rl, skyrl or prime_rl, and CHECKOUT is a clone of it. The script runs the loss from the project's
own files. Heavy packages (Ray, Megatron and others) have stand-ins, which raise when a loss calls them
(tests/integrations/hosts).

It compares the loss, the gradient and every metric, in float32 and in float64, over the settings on the adapter's page
in docs. A difference beyond rounding, judged as in the tests, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 20
"""Number of differences to print in full."""


def main() -> int:
    """Return 0 if every loss, gradient and metric equals the host's."""
    sys.path[:0] = [
        str(ROOT),
        str(ROOT / "kernels"),
        str(ROOT / "tests" / "support"),
        str(ROOT / "tests" / "integrations"),
    ]
    checkouts, losses = (importlib.import_module(f"hosts.{name}") for name in ("checkouts", "losses"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host", choices=list(checkouts.CHECKOUTS))
    parser.add_argument("checkout", type=Path, help="the folder of the clone")
    given = parser.parse_args()
    project = checkouts.CHECKOUTS[given.host]
    try:
        project.files(given.checkout)
    except FileNotFoundError as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # the tensors are tiny
    with checkouts.opened(project, given.checkout):
        cases = losses.cases(given.host)
        print(
            f"{project.name} {checkouts.commit_of(given.checkout)}; tested with {cases.adapter.HOST.tested}", flush=True
        )
        tally = losses.compare(cases.comparisons())
    print(
        f"{len(tally.settings)} settings, {tally.batches} batches: {tally.losses} losses with their gradients and "
        f"{tally.metrics} metrics compared; the largest difference is {tally.largest:.2g} of what rounding explains"
    )
    for complaint in tally.complaints[:SHOWN]:
        print(complaint)
    print(f"{len(tally.complaints)} differ")
    return 1 if tally.complaints or not tally.losses else 0


if __name__ == "__main__":
    sys.exit(main())
