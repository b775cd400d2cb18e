"""The C++ row kernels of csrc/cpu: `backend="cpu"`.

apache-tvm-ffi and the machine's C++ compiler build them once, in a few seconds (`fastrl.backends.build`). The library
holds the kernels for several instruction sets and picks one when they are called. Two instruction sets may differ in
the last bits. One gives the same bits every time.

    FASTRL_CPU_ISA   baseline, avx2 or avx512 instead of the best that the processor has
    CXX              the C++ compiler, else c++

The functions check one thing, the range of scale and softcap, because the public operations allow more than the kernels
do. All else their callers have checked.

Legend: N tokens (rows), V vocabulary, K places of a row.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import build

ISAS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SOURCES = ("token_logprobs.cc", "sparse_rows.cc", "rows_baseline.cc", "rows_avx2.cc", "rows_avx512.cc")
# No -ffast-math: NaN and infinities are inputs. No contraction: the sources say where a product is fused into a sum.
CFLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra")
OPENMP_FLAGS = () if sys.platform == "darwin" else ("-fopenmp",)


# --- build and load ---------------------------------------------------------------------------------------------------


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


@functools.cache
def _missing() -> str | None:
    """Return why a build cannot run here and the remedy, or None."""
    if sys.platform == "win32":
        return "the C++ kernels are built on Linux and macOS only; use backend='torch'"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed (pip install 'fastrl[cpu]')"
    compiler = _compiler()
    if not compiler or shutil.which(compiler[0]) is None:
        name = compiler[0] if compiler else "c++"
        return f"no C++ compiler: {name!r} is not on PATH (install g++ or clang++, or set CXX to one)"
    if shutil.which("ninja") is None and build.ninja_folder() is None:
        return "ninja is not on PATH (pip install 'fastrl[cpu]')"
    try:
        build.source_folder()
        build.cache_folder()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def _library() -> Path:
    """Return where the library of these sources, flags and this compiler is kept, built or not."""
    version = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    parts = [version, *_compiler(), *CFLAGS, *OPENMP_FLAGS, sys.platform, platform.machine()]
    parts.append(importlib.metadata.version("apache-tvm-ffi"))
    return build.library_path("fastrl_cpu", parts, build.sources("cpu", (".cc", ".h")))


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Put a ninja that pip installed beside the interpreter on PATH while the build runs."""
    folder = None if shutil.which("ninja") else build.ninja_folder()
    if folder is None:
        yield
        return
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((folder, before))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _compile(library: Path) -> None:
    """Compile the sources and put the library in place in one step, so that no process sees half of one."""
    import tvm_ffi.cpp

    folder = build.source_folder()
    with tempfile.TemporaryDirectory(prefix=f"{library.stem}-", dir=library.parent) as scratch, _ninja_on_path():
        # Built aside and renamed: a process that looks for the library sees a whole one or none.
        built = tvm_ffi.cpp.build(
            "fastrl_cpu",
            cpp_files=[str(folder / "cpu" / name) for name in SOURCES],
            extra_cflags=[*CFLAGS, *OPENMP_FLAGS],
            extra_ldflags=list(OPENMP_FLAGS),
            extra_include_paths=[str(folder / "include")],
            build_directory=scratch,
        )
        os.replace(built, library)


def _built() -> Path:
    """Return the compiled library, built unless it is in the cache, or raise with the remedy in one line."""
    if (missing := _missing()) is not None:
        raise RuntimeError(missing)
    try:
        return build.build_once(_library(), _compile)
    except OSError as error:
        folder = build.cache_folder()
        message = f"cannot write the C++ build to {folder}: {error} (set FASTRL_CACHE_DIR)"
        raise RuntimeError(" ".join(message.split())) from error
    except subprocess.CalledProcessError as error:
        message = f"the C++ compiler does not run: {error} (set CXX to one that does)"
        raise RuntimeError(" ".join(message.split())) from error
    except RuntimeError as error:
        hint = "a compiler with C++17 and OpenMP is needed, g++ 9 or later; set CXX to one"
        compiler, detail = shlex.join(_compiler()), build.error_line(str(error))
        raise RuntimeError(f"building the C++ kernels with {compiler} failed: {detail} ({hint})") from error


MODULE = build.KernelModule(_built)


def cpu_module() -> Any:
    """Return the module of C++ row kernels, built on first use.

    Raises:
        RuntimeError: one line with the missing part or the failure, and the remedy. A failure is remembered for the
            life of the process.
    """
    return MODULE.get()


def cpu_available(build: bool = False) -> tuple[bool, str]:
    """Return whether the C++ row kernels can be used, and why (not).

    Args:
        build: also build and load them. Without it nothing is compiled: (True, ...) then means that everything that a
            build needs is here, or that one has been loaded.
    """
    if build:
        try:
            cpu_module()
        except RuntimeError as error:
            return False, str(error)
    if MODULE.loaded is not None:
        threads = "OpenMP" if MODULE.loaded.has_openmp() else "one thread (built without OpenMP)"
        return True, f"C++ row kernels, {cpu_isa()}, {threads}"
    if (reason := MODULE.failure or _missing()) is not None:
        return False, reason
    return True, f"C++ row kernels, compiled on first use with {shlex.join(_compiler())}"


def cpu_isa() -> str:
    """Return the instruction set that runs: FASTRL_CPU_ISA where it is set, else the best that the processor has.

    Raises:
        ValueError: FASTRL_CPU_ISA names none, or one that the processor lacks.
    """
    return ISAS[_isa_index(os.environ.get("FASTRL_CPU_ISA"))]


@functools.cache
def _isa_index(asked: str | None) -> int:
    supported = [i for i in range(len(ISAS)) if cpu_module().supports_isa(i)]
    if not asked:
        return supported[-1]
    if asked not in ISAS:
        raise ValueError(f"FASTRL_CPU_ISA must be one of {', '.join(ISAS)}, got {asked!r}")
    if ISAS.index(asked) not in supported:
        names = ", ".join(ISAS[i] for i in supported)
        raise ValueError(f"FASTRL_CPU_ISA is {asked!r}, but this processor has {names}")
    return ISAS.index(asked)


# --- the row kernels --------------------------------------------------------------------------------------------------


def token_logprobs_fwd(
    logits: Tensor,  # (N, V), any strides, copied unless the vocabulary stride is 1
    labels: Tensor,  # (N,) int64 or int32
    inv_temperature: float | Tensor,  # scalar or (N,)
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    residual: Tensor | None = None,  # (N,), written
) -> tuple[Tensor, Tensor, Tensor]:  # (N,) each
    """Return (logprobs, entropy, logsumexp), float32, or float64 for float64 logits.

        z = softcap tanh(logit_scale x / softcap) inv_temperature     (softcap 0: logit_scale x inv_temperature)
        logprobs = z_y - logsumexp(z),  entropy = -sum_v p_v log p_v

    Rows whose label is `ignore_index` are 0 whatever their logits hold. NaN marks a row whose label is outside [0, V),
    whose inv_temperature is not positive and finite (float32: scale over temperature within 1e-30 to 1e30), which
    holds NaN, whose largest z is +inf, or whose every z is -inf. Other -inf entries have probability 0. Under a softcap
    an infinite logit is z = +-softcap inv_temperature, as the formula says. A row's bits depend on nothing but the row.
    `residual`, contiguous and of the dtype of the results, receives the part that rounding took from `logsumexp`.

    Raises:
        ValueError: a scale or a softcap outside the range of the kernels.
        RuntimeError: the kernels cannot be built here.
    """
    logits = _rows(logits)
    n = logits.shape[0]
    arguments = _shared(logits, labels, inv_temperature, logit_scale, softcap, ignore_index)
    logprobs, entropy, logsumexp = (torch.empty(n, dtype=checks.wide(logits.dtype)) for _ in range(3))
    if n > 0:
        kept = torch.empty(0, dtype=logprobs.dtype) if residual is None else residual
        cpu_module().token_logprobs_fwd(*arguments, logprobs, entropy, logsumexp, kept, *_how_to_run())
    return logprobs, entropy, logsumexp


def token_logprobs_bwd(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    inv_temperature: float | Tensor,  # scalar or (N,)
    logprobs: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,)
    grad_logprobs: Tensor | None,  # (N,), any stride
    grad_entropy: Tensor | None,  # (N,), any stride
    grad_logsumexp: Tensor | None,  # (N,), any stride
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    out: Tensor | None = None,  # (N, V), the dtype of logits, vocabulary stride 1, may be logits
    residual: Tensor | None = None,  # (N,), from the forward
) -> Tensor:  # (N, V)
    """Return the gradient with respect to `logits`, in their dtype, in `out` where given.

        dz_v = g (1[v = y] - p_v) - h p_v (log p_v + H) + l p_v,    dx_v = dz_v dz_v/dx_v

    with g, h, l the gradients of the three outputs of `token_logprobs_fwd`, None counting as 0. Ignored rows and rows
    whose g, h and l are all 0 get exactly 0 without being read. Rows whose outputs are NaN get NaN. With `residual` the
    normaliser is `logsumexp + residual`. Without it, the normaliser comes from `logprobs` if float32 keeps it well
    enough (h = 0 and logprobs > -4). Otherwise the kernel sums the row again, which takes half as long again.

    `out` is `logits` or shares no memory with them.

    Raises:
        ValueError: a scale or a softcap outside the range of the kernels.
        RuntimeError: the kernels cannot be built here.
    """
    logits = _rows(logits)
    dtype = checks.wide(logits.dtype)
    result = torch.empty(logits.shape, dtype=logits.dtype) if out is None else out
    arguments = _shared(logits, labels, inv_temperature, logit_scale, softcap, ignore_index)
    if logits.shape[0] > 0:
        saved = [_column(x, dtype) for x in (logprobs, entropy, logsumexp, residual)]
        grads = [_column(x, dtype) for x in (grad_logprobs, grad_entropy, grad_logsumexp)]
        cpu_module().token_logprobs_bwd(*arguments, *saved, *grads, result.detach(), *_how_to_run())
    return result


def sparse_rows(
    logits: Tensor,  # (N, V) float32 or float64, any strides, copied unless the vocabulary stride is 1
    labels: Tensor,  # (N,)
    inv_temperature: float | Tensor,  # scalar or (N,)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],  # (N,) each
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],  # (N,) each
    *,
    tail_mass: float,
    places: int,
    threshold: float,
    candidates: int,
    min_entries: int,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (counts (N,), indices (N, K), values (N, K), left (N,)) of the gradient that `token_logprobs_bwd` gives.

    The entries of a row are those that matter, ascending by index, the label's among them, and `left` is the sum of the
    absolute values of the others relative to the row's scale, (|g| + |h| + |l|) |logit_scale| inv_temperature. It is at
    most `tail_mass`. If that takes more than K entries, or the row is not finite, its count is -1. The count is 0
    if the label is `ignore_index` or g, h and l are 0. Places beyond the count hold anything.

    Args:
        logits, labels, inv_temperature, grads, logit_scale, softcap, ignore_index: as for `token_logprobs_bwd`.
        outputs: (logprobs, entropy, logsumexp, residual) of `token_logprobs_fwd`. A residual of another length counts
            as none, and the kernel then sums most rows again.
        tail_mass: in (0, 1).
        places: K.
        threshold: entries below this share of tail_mass times the scale are left out at sight.
        candidates: a row with more entries than this above the threshold has count -1.
        min_entries: the number of entries beside the label's down to which the smallest are dropped.

    Raises:
        ValueError: a scale or a softcap outside the range of the kernels.
        RuntimeError: the kernels cannot be built here.
    """
    logits = _rows(logits)
    n, dtype = logits.shape[0], logits.dtype
    arguments = _shared(logits, labels, inv_temperature, logit_scale, softcap, ignore_index)
    counts = torch.empty(n, dtype=torch.int32)
    indices = torch.empty((n, places), dtype=torch.int32)
    values = torch.empty((n, places), dtype=dtype)
    left = torch.empty(n, dtype=torch.float64)
    if n > 0:
        residual = outputs[3] if outputs[3].numel() == n else None
        saved = [_column(x, dtype) for x in (*outputs[:3], residual, *grads)]
        rule = (float(tail_mass), float(threshold), int(candidates), int(min_entries))
        cpu_module().sparse_rows(*arguments, *saved, *rule, counts, indices, values, left, *_how_to_run())
    return counts, indices, values, left


def sparse_times_matrix(
    counts: Tensor,  # (N,) int32
    indices: Tensor,  # (N, K) int32
    values: Tensor,  # (N, K)
    matrix: Tensor,  # (V, D)
) -> Tensor:  # (N, D)
    """Return the sums of value * matrix[index] over the entries of each row, 0 where a count is 0 or -1."""
    out = torch.empty((counts.shape[0], matrix.shape[1]), dtype=values.dtype)
    if out.numel():
        matrix = matrix.detach()
        matrix = matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
        cpu_module().sparse_times_matrix(counts, indices, values, matrix, out, *_how_to_run())
    return out


def sparse_accumulate(
    counts: Tensor,  # (N,) int32
    indices: Tensor,  # (N, K) int32
    values: Tensor,  # (N, K)
    states: Tensor,  # (N, D)
    total: Tensor | None,  # (V, D) contiguous, the dtype of the values, added to
    sums: Tensor | None,  # (V,) contiguous, the dtype of the values, added to
) -> None:
    """Add value * states[row] to total[index] and value to sums[index] per entry, in row order within an index."""
    if counts.shape[0] == 0 or (total is None and sums is None):
        return
    absent = torch.empty(0, dtype=values.dtype)
    vocabulary = next(x.shape[0] for x in (total, sums) if x is not None)
    given = (absent if total is None else total, absent if sums is None else sums)
    wide = states.detach().to(values.dtype).contiguous()
    cpu_module().sparse_accumulate(counts, indices, values, wide, *given, vocabulary, *_how_to_run())


def _how_to_run() -> tuple[int, int]:
    """Return (instruction set, number of threads)."""
    return _isa_index(os.environ.get("FASTRL_CPU_ISA")), torch.get_num_threads()


def _rows(logits: Tensor) -> Tensor:
    """Return the logits without their graph and with adjacent vocabulary entries."""
    logits = logits.detach()
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _column(x: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return one contiguous number per row as the kernels take it, an empty tensor for None."""
    return torch.empty(0, dtype=dtype) if x is None else x.detach().to(dtype).contiguous()


def check_scales(logit_scale: float, softcap: float) -> None:
    """Raise if a scale or a softcap leaves the range in which the kernels are accurate.

    The public operations let every finite scale and every positive softcap through, for the other backends.
    """
    if not 1e-30 <= abs(logit_scale) <= 1e30:
        raise ValueError(f"logit_scale must be finite and not 0 (1e-30 to 1e30 either way), got {logit_scale!r}")
    if softcap != 0.0 and not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"softcap must be 0 for none, or within 1e-30 and 1e30, got {softcap!r}")


def _shared(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Any, ...]:
    """Return the arguments that forward and backward share, in the kernels' order."""
    check_scales(logit_scale, softcap)
    if isinstance(inv_temperature, Tensor):
        per_row, scalar = _column(inv_temperature, torch.float64), 1.0
    else:
        per_row, scalar = _column(None, torch.float64), float(inv_temperature)
    labels = labels.detach().long().contiguous()
    return logits, labels, per_row, scalar, float(logit_scale), float(softcap), int(ignore_index)
