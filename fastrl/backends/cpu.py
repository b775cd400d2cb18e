"""Build, load and call the C++ row kernels of csrc/cpu: what `backend="cpu"` runs.

The module is compiled once with `apache-tvm-ffi` and the machine's C++ compiler, in a few seconds, and kept in the
user's cache under a name that is a hash of the sources, the flags and the compiler. It has no torch headers: tensors
cross as views. The library holds the kernels for several instruction sets; which one runs is decided when they are
called. Two instruction sets may differ in the last bits, one gives the same bits every time.

    FASTRL_CACHE_DIR   where the library is kept; else $XDG_CACHE_HOME/fastrl, else ~/.cache/fastrl
    FASTRL_CPU_ISA     baseline, avx2 or avx512 instead of the best that the processor has
    CXX                the C++ compiler; else c++

Legend: N tokens (rows), V vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ISAS = ("baseline", "avx2", "avx512")
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SOURCES = ("token_logprobs.cc", "sparse_rows.cc", "rows_baseline.cc", "rows_avx2.cc", "rows_avx512.cc")
# No -ffast-math: NaN and infinities are inputs. No contraction: where a product is fused into a sum is written down.
CFLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra")
OPENMP_FLAGS = () if sys.platform == "darwin" else ("-fopenmp",)

_lock = threading.RLock()
_module: Any = None
_failure: str | None = None


# --- build and load ---------------------------------------------------------------------------------------------------


def source_folder() -> Path:
    """Return the csrc folder: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cpu" / SOURCES[0]).is_file():
            return folder
    raise RuntimeError(f"the C++ sources are missing: no csrc/cpu/{SOURCES[0]} in {package} or {package.parent}")


def cache_folder() -> Path:
    """Return the folder in which built libraries and converted models are kept.

    Raises:
        RuntimeError: none is set, and the user has no home directory, as in a container run under an arbitrary id.
    """
    if chosen := os.environ.get("FASTRL_CACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fastrl"
    try:
        return Path.home() / ".cache" / "fastrl"
    except RuntimeError as error:
        raise RuntimeError("no home directory to keep compiled kernels and models in; set FASTRL_CACHE_DIR") from error


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def ninja_folder() -> str | None:
    """Return the folder of ninja where it is not on PATH but beside the interpreter, as pip installs it; else None."""
    folder = str(Path(sys.executable).parent)
    return folder if shutil.which("ninja", path=folder) else None


@functools.cache
def _missing() -> str | None:
    """Return what a build lacks here and how to get it, or None."""
    if sys.platform == "win32":
        return "the C++ kernels are built on Linux and macOS only; use backend='torch'"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed (pip install 'fastrl[cpu]')"
    compiler = _compiler()
    if not compiler or shutil.which(compiler[0]) is None:
        name = compiler[0] if compiler else "c++"
        return f"no C++ compiler: {name!r} is not on PATH (install g++ or clang++, or set CXX to one)"
    if shutil.which("ninja") is None and ninja_folder() is None:
        return "ninja is not on PATH (pip install 'fastrl[cpu]')"
    try:
        source_folder()
        cache_folder()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def _library() -> Path:
    """Return where the library of these sources, flags and this compiler is kept, built or not."""
    version = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256()
    parts = [version, *_compiler(), *CFLAGS, *OPENMP_FLAGS, sys.platform, platform.machine()]
    parts.append(importlib.metadata.version("apache-tvm-ffi"))
    folder = source_folder()
    for file in sorted([*(folder / "cpu").iterdir(), *(folder / "include" / "fastrl").iterdir()]):
        if file.suffix in (".cc", ".h"):
            parts += [file.name, file.read_text(encoding="utf-8")]
    for part in parts:
        digest.update(part.encode() + b"\0")
    return cache_folder() / f"fastrl_cpu-{digest.hexdigest()[:20]}.so"


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold an advisory lock on a file; another process that builds the same library waits."""
    import fcntl  # POSIX only, like the build

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Put a ninja that pip installed beside the interpreter on PATH while the build runs."""
    folder = None if shutil.which("ninja") else ninja_folder()
    if folder is None:
        yield
        return
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((folder, before))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _build(library: Path) -> None:
    """Compile the sources and put the library in place in one step, so that no process sees half of one."""
    import tvm_ffi.cpp

    folder = source_folder()
    with tempfile.TemporaryDirectory(prefix=f"{library.stem}-", dir=library.parent) as scratch, _ninja_on_path():
        built = tvm_ffi.cpp.build(
            "fastrl_cpu",
            cpp_files=[str(folder / "cpu" / name) for name in SOURCES],
            extra_cflags=[*CFLAGS, *OPENMP_FLAGS],
            extra_ldflags=list(OPENMP_FLAGS),
            extra_include_paths=[str(folder / "include")],
            build_directory=scratch,
        )
        os.replace(built, library)


def _failed(message: str) -> RuntimeError:
    global _failure
    _failure = " ".join(message.split())
    return RuntimeError(_failure)


def _load() -> Any:
    if (missing := _missing()) is not None:
        raise _failed(missing)
    import tvm_ffi

    try:
        library = _library()
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(library.with_suffix(".lock")):
                if not library.exists():
                    _build(library)
    except OSError as error:
        raise _failed(f"cannot write the C++ build to {cache_folder()}: {error} (set FASTRL_CACHE_DIR)") from error
    except subprocess.CalledProcessError as error:
        raise _failed(f"the C++ compiler does not run: {error} (set CXX to one that does)") from error
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        detail = lines[0] if lines else str(error)
        hint = "a compiler with C++17 and OpenMP is needed, g++ 9 or later; set CXX to one"
        raise _failed(f"building the C++ kernels with {shlex.join(_compiler())} failed: {detail} ({hint})") from error
    return tvm_ffi.load_module(str(library))


def cpu_module() -> Any:
    """Return the module of C++ row kernels, built on first use.

    Raises:
        RuntimeError: one line that says what is missing, or what failed, and how to get it. A failure is remembered
            for the life of the process.
    """
    global _module
    if _module is None:
        with _lock:
            if _failure is not None:
                raise RuntimeError(_failure)
            if _module is None:
                _module = _load()
    return _module


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
    if _module is not None:
        threads = "OpenMP" if _module.has_openmp() else "one thread (built without OpenMP)"
        return True, f"C++ row kernels, {cpu_isa()}, {threads}"
    if (reason := _failure or _missing()) is not None:
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
    logits: Tensor,  # (N, V), any strides; a copy is made where the vocabulary stride is not 1
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
    holds NaN, whose largest z is +inf, or whose every z is -inf. Other -inf entries have probability 0; under a softcap
    an infinite logit is z = +-softcap inv_temperature, as the formula says. A row's bits depend on nothing but the row.
    `residual`, contiguous and of the dtype of the results, receives what rounding took from `logsumexp`.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes and options that do not fit.
        RuntimeError: the kernels cannot be built here.
    """
    logits = checked_logits(logits)
    n = logits.shape[0]
    arguments = _shared(logits, labels, inv_temperature, logit_scale, softcap, ignore_index)
    logprobs, entropy, logsumexp = (torch.empty(n, dtype=result_dtype(logits)) for _ in range(3))
    if n > 0:
        kept = torch.empty(0, dtype=logprobs.dtype) if residual is None else checked_residual(residual, logprobs)
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
    out: Tensor | None = None,  # (N, V), the dtype of logits, vocabulary stride 1; may be logits
    residual: Tensor | None = None,  # (N,), from the forward
) -> Tensor:  # (N, V)
    """Return the gradient with respect to `logits`, in their dtype, in `out` where given.

        dz_v = g (1[v = y] - p_v) - h p_v (log p_v + H) + l p_v,    dx_v = dz_v dz_v/dx_v

    with g, h, l the gradients of the three outputs of `token_logprobs_fwd`, None counting as 0. Ignored rows and rows
    whose g, h and l are all 0 get exactly 0 without being read; rows whose outputs are NaN get NaN. With `residual` the
    normaliser is `logsumexp + residual`; without it, it is taken from `logprobs` where float32 keeps it well enough
    (h = 0 and logprobs > -4) and summed again elsewhere, which takes half as long again.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes and options that do not fit, or an `out` that overlaps `logits`
            without being them.
        RuntimeError: the kernels cannot be built here.
    """
    given, logits = logits, checked_logits(logits)
    n = logits.shape[0]
    dtype = result_dtype(logits)
    result = torch.empty(logits.shape, dtype=logits.dtype) if out is None else checked_out(out, given)
    arguments = _shared(logits, labels, inv_temperature, logit_scale, softcap, ignore_index)
    saved = [
        checked_rows(name, x, n) for name, x in (("logprobs", logprobs), ("entropy", entropy), ("logsumexp", logsumexp))
    ]
    absent = torch.empty(0, dtype=dtype)
    grads = [
        absent if grad is None else checked_rows(name, grad, n).to(dtype).contiguous()
        for name, grad in (
            ("grad_logprobs", grad_logprobs),
            ("grad_entropy", grad_entropy),
            ("grad_logsumexp", grad_logsumexp),
        )
    ]
    if n > 0:
        saved = [x.to(dtype).contiguous() for x in saved]
        kept = absent if residual is None else checked_residual(residual, saved[0])
        cpu_module().token_logprobs_bwd(*arguments, *saved, kept, *grads, result.detach(), *_how_to_run())
    return result


def sparse_rows(
    logits: Tensor,  # (N, V) float32 or float64, any strides; a copy is made where the vocabulary stride is not 1
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
    most `tail_mass`; where that takes more than K entries, or the row is not finite, its count is -1. The count is 0
    where the label is `ignore_index` or g, h and l are 0. Places beyond the count hold anything.

    Args:
        logits, labels, inv_temperature, grads, logit_scale, softcap, ignore_index: as for `token_logprobs_bwd`.
        outputs: (logprobs, entropy, logsumexp, residual) of `token_logprobs_fwd`; a residual of another length counts
            as none, and most rows are then summed again.
        tail_mass: in (0, 1).
        places: K.
        threshold: entries below this share of tail_mass times the scale are left out at sight.
        candidates: a row with more entries than this above the threshold has count -1.
        min_entries: the number of entries beside the label's down to which the smallest are dropped.

    Raises:
        ValueError, TypeError: shapes, devices, dtypes and options that do not fit.
        RuntimeError: the kernels cannot be built here.
    """
    logits = checked_logits(logits)
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits must be float32 or float64, got {logits.dtype}")
    n, dtype = logits.shape[0], logits.dtype
    arguments = _shared(logits, labels, inv_temperature, logit_scale, softcap, ignore_index)
    absent = torch.empty(0, dtype=dtype)
    upstream = [
        absent if grad is None else checked_rows(name, grad, n).to(dtype).contiguous()
        for name, grad in zip(("grad_logprobs", "grad_entropy", "grad_logsumexp"), grads, strict=True)
    ]
    counts = torch.empty(n, dtype=torch.int32)
    indices = torch.empty((n, places), dtype=torch.int32)
    values = torch.empty((n, places), dtype=dtype)
    left = torch.empty(n, dtype=torch.float64)
    if n > 0:
        names = ("logprobs", "entropy", "logsumexp")
        saved = [checked_rows(name, x, n).to(dtype).contiguous() for name, x in zip(names, outputs[:3], strict=True)]
        residual = checked_residual(outputs[3], saved[0]) if outputs[3].numel() == n else absent
        rule = (float(tail_mass), float(threshold), int(candidates), int(min_entries))
        given = (*arguments, *saved, residual, *upstream, *rule)
        cpu_module().sparse_rows(*given, counts, indices, values, left, *_how_to_run())
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


def result_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype in which rows are computed and their results are stored."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _how_to_run() -> tuple[int, int]:
    """Return (instruction set, number of threads)."""
    return _isa_index(os.environ.get("FASTRL_CPU_ISA")), torch.get_num_threads()


def checked_logits(logits: Tensor, device_type: str = "cpu") -> Tensor:
    """Return the logits as (N, V) with adjacent vocabulary entries, or raise."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a torch.Tensor, got {type(logits).__name__}")
    if logits.device.type != device_type or logits.layout != torch.strided:
        place = "the CPU" if device_type == "cpu" else f"a {device_type} device"
        raise ValueError(f"logits must be a dense tensor on {place}, got {logits.layout} on {logits.device}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be (N, V) with V >= 1, got {tuple(logits.shape)}")
    logits = logits.detach()
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def checked_rows(name: str, x: Tensor, n: int, device: torch.device = CPU) -> Tensor:
    """Return a tensor of one number per row, or raise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.shape != (n,) or x.device != device:
        raise ValueError(f"{name} must be ({n},) on {_place(device)}, got {tuple(x.shape)} on {x.device}")
    return x.detach()


def checked_labels(labels: Tensor, n: int, device: torch.device = CPU) -> Tensor:
    """Return the labels of the rows as contiguous int64, or raise."""
    labels = checked_rows("labels", labels, n, device)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    return labels.long().contiguous()


def check_head(logit_scale: float, softcap: float) -> None:
    """Raise where a scale or a softcap leaves the range in which the kernels are accurate."""
    if not 1e-30 <= abs(logit_scale) <= 1e30:
        raise ValueError(f"logit_scale must be finite and not 0 (1e-30 to 1e30 either way), got {logit_scale!r}")
    if softcap != 0.0 and not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"softcap must be 0 for none, or within 1e-30 and 1e30, got {softcap!r}")


def _place(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else str(device)


def _shared(
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
) -> tuple[Any, ...]:
    """Return the arguments that forward and backward share, in the kernels' order."""
    n = logits.shape[0]
    labels = checked_labels(labels, n)
    if isinstance(inv_temperature, Tensor):
        per_row, scalar = checked_rows("inv_temperature", inv_temperature, n).double().contiguous(), 1.0
    else:
        per_row, scalar = torch.empty(0, dtype=torch.float64), float(inv_temperature)
    check_head(logit_scale, softcap)
    return logits, labels, per_row, scalar, float(logit_scale), float(softcap), int(ignore_index)


def checked_residual(residual: Tensor, like: Tensor) -> Tensor:
    """Return the residual if it is one contiguous number per row of the dtype of `like`, or raise."""
    residual = checked_rows("residual", residual, like.numel(), like.device)
    if residual.dtype != like.dtype or not residual.is_contiguous():
        raise ValueError(f"residual must be contiguous and {like.dtype}, got {residual.dtype} {residual.stride()}")
    return residual


def _extent(x: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a matrix and of the byte after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def checked_out(out: Tensor, logits: Tensor) -> Tensor:
    """Return `out` if the gradient can be written to it, or raise."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    if out.shape != logits.shape or out.dtype != logits.dtype or out.device != logits.device:
        raise ValueError(
            f"out must be {tuple(logits.shape)} {logits.dtype} on {_place(logits.device)}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    n, v = out.shape
    if (v > 1 and out.stride(1) != 1) or (n > 1 and out.stride(0) < v):
        raise ValueError(f"out must have vocabulary stride 1 and rows apart, got strides {out.stride()}")
    same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride()
    if n > 0 and not same:
        (out_start, out_end), (start, end) = _extent(out), _extent(logits)
        if out_start < end and start < out_end:
            raise ValueError("out must be logits itself or apart from them, got memory that overlaps theirs")
    return out
