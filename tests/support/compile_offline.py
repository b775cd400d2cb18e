"""Compile every kernel for every target without a GPU, as the host functions would launch it, and report what it needs.

    python tests/support/compile_offline.py            # JSON on stdout
    python tests/support/compile_offline.py --write    # and replace tests/data/kernel_resources.json

Triton decides when a module is imported whether its kernels are compiled or interpreted, hence a process of its own,
without TRITON_INTERPRET. The launch itself is replaced: arguments go through Triton's own specialisation, so that what
is compiled here is what a device would get, and the number of distinct keys is the number of compilations there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="fastrl-triton-"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastrl_kernels import advantages, policy, policy_logits, row_statistics, segments, sparse_rows, token_logprobs

TABLE = Path(__file__).parents[1] / "data" / "kernel_resources.json"
TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Launch:
    """One launch that a host function made."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(hash=False)

    def specialised(self, target: GPUTarget) -> tuple[Any, Any, list[Any], Any]:
        """Return (backend, bound arguments, specialisation, options) as Triton's own launcher computes them."""
        backend = make_backend(target)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        kwargs = self.kwargs | {"debug": False}
        return backend, *binder(*self.args, **kwargs)

    def key(self, target: GPUTarget) -> str:
        """Return what decides whether this launch compiles anew."""
        _, _, specialization, options = self.specialised(target)
        return f"{self.kernel.__name__} {specialization} {options}"

    def compile(self, target: GPUTarget) -> Any:
        """Compile the kernel of this launch."""
        backend, bound, specialization, _ = self.specialised(target)
        options, signature, constexprs, attrs = self.kernel._pack_args(
            backend, self.kwargs | {"debug": False}, bound, specialization, None
        )
        return triton.compile(ASTSource(self.kernel, signature, constexprs, attrs), target, options.__dict__)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of making them."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, grid, args, kwargs))

    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the results of rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def launch_token_logprobs(
    dtype: torch.dtype,
    v: int,
    full: bool,
    *,
    n: int = 2,
    temperature: float = 0.7,
    scale: float = 1.0,
    cap: float = 30.0,
    shift: int = 0,
) -> None:
    """Launch forward and backward of the plain log-prob, or with softcap, entropy and a temperature per row."""
    logits, labels = torch.empty(n, v, dtype=dtype), torch.zeros(n + 1, dtype=torch.int64)[shift:][:n]
    row = torch.ones(n, dtype=wide(dtype))
    options: dict[str, Any] = {"logit_scale": scale, "softcap": cap if full else 0.0, "residual": row}
    inv_temperature = row if full else 1.0 / temperature
    results = token_logprobs.token_logprobs_fwd(logits, labels, inv_temperature, **options)
    upstream = (row, row, row) if full else (row, None, None)
    token_logprobs.token_logprobs_bwd(logits, labels, inv_temperature, *results, *upstream, **options)


def launch_without_residual(dtype: torch.dtype) -> None:
    """Launch the backward that takes its frame from the label's entry, in place."""
    n, v = 2, 8192
    logits, labels, row = torch.empty(n, v, dtype=dtype), torch.zeros(n, dtype=torch.int64), torch.empty(n)
    token_logprobs.token_logprobs_bwd(logits, labels, 1.0, row, row, row, row, row, row, out=logits)


def launch_strided(dtype: torch.dtype, v: int) -> None:
    """Launch what reads rows on rows whose entries are not adjacent, with int32 labels."""
    n = 3
    logits, labels = torch.empty(v, n, dtype=dtype).t(), torch.zeros(n, dtype=torch.int32)
    row = torch.empty(n, dtype=wide(dtype))
    results = token_logprobs.token_logprobs_fwd(logits, labels, 1.0, residual=row)
    token_logprobs.token_logprobs_bwd(logits, labels, 1.0, *results, row, row, row, residual=row)
    row_statistics.row_statistics_fwd(logits, labels, 1.0)
    columns = policy.PolicyColumns(row, row)
    axes, numbers = policy.PolicyAxes("clip"), policy.PolicyNumbers()
    policy_logits.policy_logits_fwd(axes, numbers, logits, labels, 1.0, columns, out=torch.empty(n, v, dtype=dtype))


def launch_row_statistics(dtype: torch.dtype, v: int, full: bool) -> None:
    """Launch the row statistics, plain or with softcap and a temperature per row."""
    logits, labels = torch.empty(2, v, dtype=dtype), torch.zeros(2, dtype=torch.int64)
    inv_temperature = torch.empty(2, dtype=wide(dtype)) if full else 1.0
    row_statistics.row_statistics_fwd(logits, labels, inv_temperature, softcap=30.0 if full else 0.0)


def launch_advantages(dtype: torch.dtype, baseline: str, scale: str, *, n: int = 64, size: int = 8) -> None:
    """Launch the group-normalised advantages."""
    rewards, order = torch.empty(n, dtype=dtype), torch.arange(n)
    offsets = torch.arange(0, n + 1, size)
    batch = torch.ones(1) if scale == "batch" else None
    advantages.group_advantages_fwd(rewards, order, offsets, baseline=baseline, scale=scale, batch_std=batch)


def launch_policy(
    axes: policy.PolicyAxes,
    *,
    n: int = 64,
    coupled: bool = False,
    dtype: torch.dtype = torch.float32,
    **numbers: float,
) -> None:
    """Launch the token arithmetic of the policy loss with every column."""
    positive = torch.zeros(n, dtype=torch.bool)
    columns = policy.PolicyColumns(*(torch.empty(n, dtype=dtype) for _ in range(7)), positive=positive)
    logprobs, entropy, shared = (torch.empty(n, dtype=dtype) for _ in range(3))
    policy.policy_terms(axes, policy.PolicyNumbers(**numbers), logprobs, entropy, shared if coupled else None, columns)


def launch_segment_sum(dtype: torch.dtype, *, n: int = 64, size: int = 8) -> None:
    """Launch the sums over segments and their gradient."""
    offsets = torch.arange(0, n + 1, size)
    sums = segments.segment_sum_fwd(torch.empty(n, dtype=dtype), offsets)
    segments.segment_sum_bwd(sums, offsets, n)


def launch_reverse_scan(dtype: torch.dtype, *, n: int = 64, size: int = 8) -> None:
    """Launch the recurrence over segments."""
    b = torch.empty(n, dtype=dtype)
    segments.reverse_scan_fwd(b, b, torch.arange(0, n + 1, size))


def launch_policy_logits(
    dtype: torch.dtype,
    v: int,
    full: bool,
    *,
    n: int = 2,
    temperature: float = 0.7,
    scale: float = 1.0,
    cap: float = 30.0,
    shift: int = 0,
    **numbers: float,
) -> None:
    """Launch the loss of rows and their gradient, plain or with every column, softcap and a temperature per row."""
    logits, labels = torch.empty(n, v, dtype=dtype), torch.zeros(n + 1, dtype=torch.int64)[shift:][:n]

    def row() -> torch.Tensor:
        return torch.empty(n + 1, dtype=wide(dtype))[shift:][:n]

    columns = policy.PolicyColumns(row(), row(), anchor=row())
    axes = policy.PolicyAxes("clip")
    if full:
        columns = policy.PolicyColumns(*(row() for _ in range(7)), positive=torch.zeros(n, dtype=torch.bool))
        axes = policy.PolicyAxes("clip", "", "k3", "ratio_weighted", "own")
        numbers = {"dual_clip": 3.0, **numbers}
    policy_logits.policy_logits_fwd(
        axes,
        policy.PolicyNumbers(**numbers),
        logits,
        labels,
        row() if full else 1.0 / temperature,
        columns,
        out=torch.empty(n, v, dtype=dtype),
        logit_scale=scale,
        softcap=cap if full else 0.0,
    )


def launch_scale_rows(dtype: torch.dtype, v: int) -> None:
    """Launch the scaling of a gradient, apart and in place."""
    x = torch.empty(2, v, dtype=dtype)
    for out in (None, x):
        policy_logits.scale_rows(x, torch.ones(()), out=out)


def launch_sparse_lists(
    v: int,
    full: bool,
    dtype: torch.dtype = torch.float32,
    *,
    n: int = 2,
    temperature: float = 0.7,
    tail_mass: float = 1e-4,
) -> None:
    """Launch the listing of entries, plain or with softcap, entropy and a temperature per row."""
    logits, labels = torch.empty(n, v, dtype=dtype), torch.zeros(n, dtype=torch.int64)
    row = torch.ones(n, dtype=dtype)
    outputs, upstream = (row, row, row, row), ((row, row, row) if full else (row, None, None))
    rule = {"places": 256 if full else 128, "candidates": 1024 if full else 512, "min_entries": 16}
    sparse_rows.list_entries(
        logits,
        labels,
        row if full else 1.0 / temperature,
        outputs,
        upstream,
        tail_mass=tail_mass,
        threshold=2.0**-10,
        softcap=30.0 if full else 0.0,
        **rule,
    )


def launch_sparse_products(dtype: torch.dtype, *, n: int = 2, d: int = 4096, places: int = 128) -> None:
    """Launch the products of lists with the head and with the states."""
    counts = torch.zeros(n, dtype=torch.int32)
    values, total = torch.empty(n, places, dtype=wide(dtype)), torch.empty(8, d, dtype=wide(dtype))
    lists = (counts, torch.zeros(n, places, dtype=torch.int32), values)
    sparse_rows.times_matrix(*lists, torch.empty(8, d, dtype=dtype))
    sparse_rows.accumulate(*lists, torch.empty(n, d, dtype=dtype), total, total[:, 0].contiguous())
    sparse_rows.accumulate(*lists, torch.empty(n, d, dtype=dtype), total, None)


POLICY_CASES = {
    "policy/clip": lambda dtype: launch_policy(policy.PolicyAxes("clip", kl="k3"), dtype=dtype, dual_clip=3.0),
    "policy/clip of a sequence": lambda _: launch_policy(policy.PolicyAxes("clip"), coupled=True),
    "policy/square of a sequence": lambda _: launch_policy(policy.PolicyAxes("square"), coupled=True),
    "policy/sapo": lambda _: launch_policy(policy.PolicyAxes("sapo", "", "k3", "ratio_weighted", "own")),
    "policy/divergence_kl": lambda _: launch_policy(policy.PolicyAxes("divergence_kl", "", "k2", "straight_through")),
}
SEGMENT_CASES = {
    "segments/sum/fp32": lambda _: launch_segment_sum(torch.float32),
    "segments/sum/fp64": lambda _: launch_segment_sum(torch.float64),
    "segments/scan/fp32": lambda _: launch_reverse_scan(torch.float32),
    "segments/scan/fp64": lambda _: launch_reverse_scan(torch.float64),
}
SPARSE_LISTS = {
    "sparse_rows/list, full/V=151936": lambda dtype: launch_sparse_lists(151936, True, dtype),
    "sparse_rows/list, plain/V=151936": lambda _: launch_sparse_lists(151936, False),
}
# A new kernel is one entry: a name, and a call of its host function for a dtype.
CASES: dict[str, Callable[[torch.dtype], None]] = {
    "token_logprobs/full/V=1024": lambda dtype: launch_token_logprobs(dtype, 1024, True),
    "token_logprobs/full/V=8192": lambda dtype: launch_token_logprobs(dtype, 8192, True),
    "token_logprobs/full/V=151936": lambda dtype: launch_token_logprobs(dtype, 151936, True),
    "token_logprobs/plain/V=151936": lambda dtype: launch_token_logprobs(dtype, 151936, False),
    "token_logprobs/no residual/V=8192": launch_without_residual,
    "strided rows/V=151936": lambda dtype: launch_strided(dtype, 151936),
    "policy_logits/full/V=8192": lambda dtype: launch_policy_logits(dtype, 8192, True),
    "policy_logits/full/V=151936": lambda dtype: launch_policy_logits(dtype, 151936, True),
    "policy_logits/plain/V=151936": lambda dtype: launch_policy_logits(dtype, 151936, False),
    "policy_logits/scale/V=151936": lambda dtype: launch_scale_rows(dtype, 151936),
    "row_statistics/full/V=151936": lambda dtype: launch_row_statistics(dtype, 151936, True),
    "row_statistics/plain/V=151936": lambda dtype: launch_row_statistics(dtype, 151936, False),
    "advantages/mean/group": lambda dtype: launch_advantages(dtype, "group_mean", "group"),
    "advantages/leave one out/batch": lambda dtype: launch_advantages(dtype, "leave_one_out", "batch"),
    "sparse_rows/products": launch_sparse_products,
    **SPARSE_LISTS,
    **POLICY_CASES,
    **SEGMENT_CASES,
}
# Log-probs are float32 whatever the logits are, a chunk's logits whatever the head is; segment cases name their dtype.
FLOAT32_CASES = {*POLICY_CASES, *SEGMENT_CASES, *SPARSE_LISTS}
# How rows lie does not depend on their dtype.
BFLOAT16_CASES = {"strided rows/V=151936"}
FLOAT64_CASES = {
    "token_logprobs/full/V=1024",
    "token_logprobs/full/V=151936",
    "policy_logits/full/V=151936",
    "row_statistics/full/V=151936",
    "advantages/mean/group",
    "sparse_rows/products",
    "sparse_rows/list, full/V=151936",
    "policy/clip",
}


def lengths_and_scalars() -> dict[str, int]:
    """Return the number of compilations over 50 lengths x 10 temperatures, and over vocabulary sizes."""
    target = TARGETS["cuda:90"]
    counts = {}
    with recorded() as launches:
        for n in range(1, 51):
            for i in range(10):
                options = {
                    "n": n,
                    "temperature": 0.3 + 0.17 * i,
                    "scale": 0.5 + 0.1 * i,
                    "cap": 10.0 + i,
                    "shift": i % 2,
                }
                launch_token_logprobs(torch.bfloat16, 4096, True, **options)
                launch_token_logprobs(torch.bfloat16, 4096, False, **options)
    # Forward and backward, plain and full.
    counts["token_logprobs: 50 lengths, 10 temperatures, scales and softcaps"] = len({x.key(target) for x in launches})
    with recorded() as launches:
        for v in (32000, 50257, 65537, 129920, 151936, 152064, 248320, 262144):
            launch_token_logprobs(torch.bfloat16, v, False)
    # Forward and backward, row stride divisible by 16 or not.
    counts["token_logprobs: 8 vocabulary sizes"] = len({x.key(target) for x in launches})
    with recorded() as launches:
        for size in range(2, 52):
            launch_advantages(torch.float32, "group_mean", "group", n=size * 7, size=size)
    counts["advantages: 50 group sizes and batch sizes"] = len({x.key(target) for x in launches})
    with recorded() as launches:
        for size in range(2, 52):
            launch_segment_sum(torch.float32, n=size * 7, size=size)
            launch_reverse_scan(torch.float64, n=size * 7, size=size)
    # The sum, its gradient, the scan.
    counts["segments: 50 lengths"] = len({x.key(target) for x in launches})
    with recorded() as launches:
        for n in range(1, 51):
            bounds = {"low": 1.0 - n / 100, "high": 1.0 + n / 100, "dual_clip": 1.0 + n, "tau_pos": float(n)}
            launch_policy(policy.PolicyAxes("clip", kl="k3"), n=n, **bounds)
    counts["policy: 50 lengths and bounds"] = len({x.key(target) for x in launches})
    with recorded() as launches:
        for n in range(1, 51):
            options = {"n": n, "temperature": 0.3 + 0.1 * n, "scale": 0.5 + 0.1 * n, "cap": 10.0 + n, "shift": n % 2}
            bounds = {"low": 1.0 - n / 100, "high": 1.0 + n / 100, "tau_pos": float(n)}
            launch_policy_logits(torch.bfloat16, 4096, True, **options, **bounds)
            launch_policy_logits(torch.bfloat16, 4096, False, **options, **bounds)
    # Plain and full.
    counts["policy_logits: 50 lengths, temperatures, scales, softcaps and bounds"] = len(
        {x.key(target) for x in launches}
    )
    with recorded() as launches:
        for n in range(1, 51):
            launch_sparse_lists(4096, False, n=n, temperature=0.3 + 0.1 * n, tail_mass=1e-4 / n)
            launch_sparse_products(torch.bfloat16, n=n, d=576 + 16 * n, places=100 + n)
    # Listing, gathering, and adding up with and without a bias; the strides of the head divisible by 16.
    counts["sparse_rows: 50 lengths, widths and list lengths"] = len({x.key(target) for x in launches})
    return counts


def cuda_resources(cubin: bytes) -> dict[str, int]:
    """Return registers, stack, spilled and shared bytes of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"], "shared": found["SHARED"]}


def hip_resources(assembly: str) -> dict[str, int]:
    """Return vector registers, spills (registers and scratch bytes) and shared bytes of an AMD kernel.

    Scalar registers are spilled into lanes of vector registers, and reach the memory as scratch bytes only.
    """

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    spills = value("vgpr_spill_count") + value("private_segment_fixed_size")
    return {"registers": value("vgpr_count"), "spills": spills, "shared": value("group_segment_fixed_size")}


def address_faults(ttir: str) -> list[str]:
    """Return the uses of the row index and the pointer offsets that are not 64-bit, and any grid axis but the first."""
    faults = [line.strip() for line in ttir.splitlines() if re.search(r"get_program_id [yz]", line)]
    for name in re.findall(r"(%\w+) = tt.get_program_id", ttir):
        uses = [line.strip() for line in ttir.splitlines() if re.search(rf"{name}\b(?! = )", line)]
        faults += [use for use in uses if "arith.extsi" not in use]
    faults += [line.strip() for line in ttir.splitlines() if re.search(r"tt\.addptr.*(, i32|xi32>)( loc.*)?$", line)]
    return faults


def layouts_of_sums(ttgir: str) -> list[str]:
    """Return type and layout of what is reduced, sorted: two kernels that sum a row alike have them in common."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    reduced = re.findall(r"\}\) : \((tensor<\w+), (#\w+)>\) ->", ttgir)
    return sorted({f"{kind} {layouts[name]}" for kind, name in reduced})


def compile_case(case: str, dtype: str, target: str) -> dict[str, dict[str, Any]]:
    """Compile the launches of one case for one target; returns kernel -> resources."""
    with recorded() as launches:
        CASES[case](DTYPES[dtype])
    report = {}
    for launch in launches:
        compiled = launch.compile(TARGETS[target])
        if target.startswith("cuda"):
            resources: dict[str, Any] = cuda_resources(compiled.asm["cubin"])
            # Between the two may stand how long the cache should keep what is loaded.
            resources["vector_loads"] = bool(re.search(r"ld\.global(\.L[12]::\w+)*\.(v4|v2\.b64)", compiled.asm["ptx"]))
        else:
            resources = hip_resources(compiled.asm["amdgcn"])
            resources["vector_loads"] = "load_dwordx4" in compiled.asm["amdgcn"]
        # On CUDA it is asked for at the launch, and the binary does not know of it.
        resources["shared"] = max(resources["shared"], compiled.metadata.shared)
        resources["warps"] = compiled.metadata.num_warps
        resources["address_faults"] = address_faults(compiled.asm["ttir"])
        resources["sums"] = layouts_of_sums(compiled.asm["ttgir"])
        report[f"{case} {launch.kernel.__name__} {dtype} {target}"] = resources
    return report


def report() -> dict[str, Any]:
    """Compile everything and count compilations."""
    jobs = [(case, dtype, target) for case in CASES for dtype in DTYPES for target in TARGETS]
    jobs = [job for job in jobs if job[1] != "fp64" or job[0] in FLOAT64_CASES]
    jobs = [job for job in jobs if job[1] == "bf16" or job[0] not in BFLOAT16_CASES]
    jobs = [job for job in jobs if job[0] not in FLOAT32_CASES or job[1] in ("fp32", "fp64")]
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(compile_case, *zip(*jobs, strict=True), chunksize=8))
    resources = {name: value for result in results for name, value in sorted(result.items())}
    return {"triton": triton.__version__, "resources": resources, "compilations": lengths_and_scalars()}


def table(full: dict[str, Any]) -> dict[str, Any]:
    """Return the committed part of a report: registers, shared bytes and warps of each kernel."""
    rows = {
        name: {key: value[key] for key in ("registers", "shared", "warps")} for name, value in full["resources"].items()
    }
    return {"triton": full["triton"], "resources": rows}


def main() -> None:
    """Print the report, and write the table where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"replace {TABLE.name}")
    arguments = parser.parse_args()
    full = report()
    if arguments.write:
        lines = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in table(full)["resources"].items()]
        text = ",\n".join(lines)
        TABLE.write_text(f'{{\n  "triton": {json.dumps(full["triton"])},\n  "resources": {{\n{text}\n  }}\n}}\n')
    json.dump(full, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
