"""Every kernel compiles for every target without a GPU, spills nothing, and is not compiled again per length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "compile_offline.py"
TABLE = Path(__file__).parents[1] / "data" / "kernel_resources.json"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the script in a process of its own: here the kernels may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    root = SCRIPT.parents[2]
    environment["PYTHONPATH"] = os.pathsep.join((str(root / "kernels"), str(root)))
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_nothing_spills(report: dict[str, Any]) -> None:
    assert len(report["resources"]) > 0
    spilling = {name: value for name, value in report["resources"].items() if value["spills"]}
    assert not spilling


@pytest.mark.slow
def test_row_addresses_are_64_bit(report: dict[str, Any]) -> None:
    """The row index is widened before it meets a stride, every pointer offset is 64-bit, rows are on grid axis 0."""
    faults = {name: value["address_faults"] for name, value in report["resources"].items() if value["address_faults"]}
    assert not faults


@pytest.mark.slow
def test_rows_of_logits_are_read_in_16_bytes(report: dict[str, Any]) -> None:
    rows = {
        name: value for name, value in report["resources"].items() if "_logits" in name or name.startswith("token_")
    }
    rows = {name: value for name, value in rows.items() if not name.startswith("strided")}
    assert rows
    assert not [name for name, value in rows.items() if not value["vector_loads"]]


@pytest.mark.slow
def test_the_joined_kernel_sums_a_row_as_the_forward_does(report: dict[str, Any]) -> None:
    """The same layouts on every target: the order of the sums, and with it the bits of a log-prob, are the same."""
    compared = 0
    for name, value in report["resources"].items():
        if " _policy_logits_fwd_kernel " in name:
            forward = name.replace("policy_logits", "token_logprobs")
            assert value["sums"] == report["resources"][forward]["sums"] != [], name
            compared += 1
    assert compared >= 36


@pytest.mark.slow
def test_compilations_do_not_grow_with_lengths_or_scalars(report: dict[str, Any]) -> None:
    wanted = {
        # Forward and backward, each plain and with everything, at any length, T, scale, softcap, alignment.
        "token_logprobs: 50 lengths, 10 temperatures, scales and softcaps": 4,
        # Forward and backward, for row strides that are a multiple of 16 and for others.
        "token_logprobs: 8 vocabulary sizes": 4,
        "advantages: 50 group sizes and batch sizes": 1,
        "policy: 50 lengths and bounds": 1,
        "segments: 50 lengths": 3,
        # Plain and with everything.
        "policy_logits: 50 lengths, temperatures, scales, softcaps and bounds": 2,
        # Listing, gathering, adding up with and without a bias.
        "sparse_rows: 50 lengths, widths and list lengths": 4,
    }
    assert {name: report["compilations"][name] for name in wanted} == wanted


@pytest.mark.slow
def test_resources_are_those_of_the_table(report: dict[str, Any]) -> None:
    """Registers and shared memory change only with the table: python tests/support/compile_offline.py --write."""
    table = json.loads(TABLE.read_text())
    if table["triton"] != report["triton"]:
        pytest.skip(f"the table is of Triton {table['triton']}, this is {report['triton']}")
    got = {
        name: {key: value[key] for key in ("registers", "shared", "warps")}
        for name, value in report["resources"].items()
    }
    assert got == table["resources"]
