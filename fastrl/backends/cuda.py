"""The CUDA row kernels of csrc/cuda: `backend="cuda"`.

For devices with thread-block clusters, compute capability 9.0 (H100, H200). A row of logits is split over the blocks
of a cluster, which exchange their sums through distributed shared memory. If the loss's gradient is known with the
row's results, the row stays in that memory and the gradient is written from it: one read and one write of the logits.
The kernels compile for sm_90a without spills, and their arithmetic is tested on a CPU, but they have not run on a
device yet: no choice but the name "cuda" takes them.

nvcc builds them once, in about half a minute (`fastrl.backends.build`), and the report of ptxas on the kernels'
resources is kept beside the library. The library brings its own CUDA runtime.

    CUDA_HOME, CUDA_PATH   the folder with bin/nvcc, else nvcc on PATH, else /usr/local/cuda

The functions check two things: the range of scale and softcap, and the length of a row. The public operations allow
more of both than the kernels do. All else their callers have checked.

Legend: N tokens (rows), V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import build
from fastrl.backends.cpu import check_scales

SOURCE = "token_logprobs.cu"
CAPABILITY = (9, 0)
LEAST_NVCC = (12, 0)
MAX_VOCAB = 2**30
# No fast math: NaN and infinities are inputs. No contraction: where a product is fused into a sum is written down.
NVCC_FLAGS = (
    "-gencode=arch=compute_90a,code=sm_90a",
    "-O3",
    "-std=c++17",
    "-fmad=false",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-shared",
)

# --- build and load ---------------------------------------------------------------------------------------------------


def nvcc() -> str | None:
    """Return the path of nvcc, or None."""
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    places = [*(str(Path(home) / "bin") for home in homes), None, "/usr/local/cuda/bin"]
    return next((found for place in places if (found := shutil.which("nvcc", path=place))), None)


def missing() -> str | None:
    """Return why a build cannot run here and the remedy, or None."""
    if sys.platform != "linux":
        return "the CUDA kernels are built on Linux only; use backend='triton'"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed (pip install 'fastrl[cpu]')"
    if (compiler := nvcc()) is None:
        return "nvcc was not found (install the CUDA toolkit, 12.0 or later, or set CUDA_HOME to its folder)"
    try:
        build.cache_folder()
    except RuntimeError as error:
        return str(error)
    return _compiler_fault(compiler)


@functools.cache
def _compiler_fault(compiler: str) -> str | None:
    """Return why an nvcc cannot be used, or None."""
    try:
        release = re.search(r"release (\d+)\.(\d+)", _version(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{compiler} does not run: {error}"
    if release is None or (int(release[1]), int(release[2])) < LEAST_NVCC:
        found = "an unknown version" if release is None else f"{release[1]}.{release[2]}"
        return f"{compiler} is {found}; CUDA 12.0 or later is needed (set CUDA_HOME to its folder)"
    return None


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _sources() -> list[Path]:
    return build.sources("cuda", (".cu", ".cuh", ".h"))


def _library(compiler: str) -> Path:
    """Return where the library of these sources, flags and this compiler is kept, built or not."""
    parts = [_version(compiler), *NVCC_FLAGS, platform.machine(), importlib.metadata.version("apache-tvm-ffi")]
    return build.library_path("fastrl_cuda", parts, _sources())


def _compile(compiler: str, library: Path) -> None:
    """Compile the source and put library and report in place in one step each, the library last."""
    from tvm_ffi import libinfo

    folder = build.source_folder()
    includes = {str(folder / "include"), libinfo.find_include_path(), libinfo.find_dlpack_include_path()}
    runtime = Path(libinfo.find_libtvm_ffi())
    with tempfile.TemporaryDirectory(prefix=f"{library.stem}-", dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        command = [compiler, *NVCC_FLAGS, *(f"-I{path}" for path in sorted(includes))]
        command += [str(folder / "cuda" / SOURCE), "-o", str(built), f"-L{runtime.parent}", "-ltvm_ffi"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr + done.stdout)
        report = built.with_suffix(".txt")
        report.write_text(done.stderr + done.stdout, encoding="utf-8")
        os.replace(report, report_of(library))
        os.replace(built, library)


def report_of(library: Path) -> Path:
    """Return where ptxas's report on a built library is kept: registers, spills and shared memory of each kernel."""
    return library.with_suffix(".txt")


def cuda_library() -> Path:
    """Return the compiled library, built unless it is in the cache. Needs no device.

    Raises:
        RuntimeError: one line with the missing part or the failure, and the remedy.
    """
    if (reason := missing()) is not None:
        raise RuntimeError(reason)
    compiler = nvcc()
    assert compiler is not None
    try:
        return build.build_once(_library(compiler), functools.partial(_compile, compiler))
    except OSError as error:
        folder = build.cache_folder()
        raise RuntimeError(f"cannot write the CUDA build to {folder}: {error} (set FASTRL_CACHE_DIR)") from error
    except RuntimeError as error:
        detail = build.error_line(str(error))
        raise RuntimeError(f"building the CUDA kernels with {compiler} failed: {detail}") from error


MODULE = build.KernelModule(cuda_library)


def cuda_module() -> Any:
    """Return the module of CUDA row kernels, built on first use. Loading it needs no device.

    Raises:
        RuntimeError: as `cuda_library`. A failure is remembered for the life of the process.
    """
    return MODULE.get()


def cuda_available(device: torch.device, build: bool = False) -> tuple[bool, str]:
    """Return whether the CUDA row kernels can run on `device`, and why (not).

    Args:
        device: where the tensors are.
        build: also build and load them. Without it nothing is compiled: (True, ...) then means that everything that a
            build needs is here.
    """
    if device.type != "cuda":
        return False, f"it needs tensors on a CUDA device, got {device}"
    if not torch.cuda.is_available():
        return False, "there is no CUDA device"
    if torch.version.hip is not None:
        return False, "it needs an NVIDIA device; this PyTorch is built for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return False, f"it needs compute capability 9.0 (H100, H200), {device} has {capability[0]}.{capability[1]}"
    if build:
        try:
            cuda_module()
        except RuntimeError as error:
            return False, str(error)
    if MODULE.loaded is None and (reason := MODULE.failure or missing()) is not None:
        return False, reason
    return True, "CUDA row kernels over thread-block clusters, sm_90a; not measured yet, asked for by name only"


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
    """Return (logprobs, entropy, logsumexp), float32, or float64 for float64 logits: one read of the logits.

        z = softcap tanh(logit_scale x / softcap) inv_temperature     (softcap 0: logit_scale x inv_temperature)
        logprobs = z_y - logsumexp(z),  entropy = -sum_v p_v log p_v

    Ignored, invalid and infinite rows: as `fastrl.backends.cpu.token_logprobs_fwd`.
    `residual`, contiguous and of the dtype of the results, receives the part that rounding took from `logsumexp`.

    Raises:
        ValueError: a scale, a softcap or a vocabulary outside the range of the kernels.
        RuntimeError: the kernels cannot be built or launched here.
    """
    logits = _logits(logits)
    arguments = _shared(logits, labels, inv_temperature, logit_scale, softcap, ignore_index)
    results = _results(logits, residual)
    if logits.shape[0] > 0:
        cuda_module().token_logprobs_fwd(*arguments, *results, _stream(logits))
    return results[0], results[1], results[2]


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
    residual: Tensor,  # (N,), from the forward
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    out: Tensor | None = None,  # (N, V), the dtype of logits, vocabulary stride 1, may be logits
) -> Tensor:  # (N, V)
    """Return the gradient with respect to `logits`, in their dtype, in `out` where given: one read and one write.

        dz_v = g (1[v = y] - p_v) - h p_v (log p_v + H) + l p_v,    dx_v = dz_v dz_v/dx_v

    with g, h, l the gradients of the three outputs of `token_logprobs_fwd`, None counting as 0. Ignored rows and rows
    whose g, h and l are all 0 get exactly 0 without being read. Rows whose outputs are NaN get NaN. `out` is `logits`
    or shares no memory with them.

    Raises:
        ValueError: a scale, a softcap or a vocabulary outside the range of the kernels.
        RuntimeError: the kernels cannot be built or launched here.
    """
    logits = _logits(logits)
    dtype = checks.wide(logits.dtype)
    result = torch.empty_like(logits) if out is None else out
    arguments = _shared(logits, labels, inv_temperature, logit_scale, softcap, ignore_index)
    saved = [x.to(dtype).contiguous() for x in (logprobs, entropy, logsumexp, residual)]
    grads = _upstream(logits, grad_logprobs, grad_entropy, grad_logsumexp)
    if logits.shape[0] > 0:
        cuda_module().token_logprobs_bwd(*arguments, *saved, *grads, result.detach(), _stream(logits))
    return result


def token_logprobs_fwd_bwd(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    inv_temperature: float | Tensor,  # scalar or (N,)
    grad_logprobs: Tensor | None,  # (N,), any stride
    grad_entropy: Tensor | None = None,  # (N,), any stride
    grad_logsumexp: Tensor | None = None,  # (N,), any stride
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    out: Tensor | None = None,  # (N, V), the dtype of logits, vocabulary stride 1, may be logits
    residual: Tensor | None = None,  # (N,), written
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return (logprobs, entropy, logsumexp), (N,) each, and the gradient (N, V): one read and one write of the logits.

    For losses whose gradients g, h, l of a row's outputs are known before the outputs are: negative log-likelihood,
    REINFORCE, an entropy bonus. The bits are the same as from `token_logprobs_fwd` and then
    `token_logprobs_bwd`. Those two run, with a second read, if the shared memory of a cluster cannot hold the row:
    more than about 900,000 entries of 2 bytes.

    Raises:
        ValueError: as `token_logprobs_bwd`.
        RuntimeError: the kernels cannot be built or launched here.
    """
    logits = _logits(logits)
    n, v = logits.shape
    result = torch.empty_like(logits) if out is None else out
    arguments = _shared(logits, labels, inv_temperature, logit_scale, softcap, ignore_index)
    results = _results(logits, residual)
    grads = _upstream(logits, grad_logprobs, grad_entropy, grad_logsumexp)
    if n > 0:
        module, stream = cuda_module(), _stream(logits)
        if module.row_is_resident(v, logits.element_size()):
            module.token_logprobs_fwd_bwd(*arguments, *results, *grads, result.detach(), stream)
        else:
            module.token_logprobs_fwd(*arguments, *results, stream)
            module.token_logprobs_bwd(*arguments, *results, *grads, result.detach(), stream)
    return (results[0], results[1], results[2]), result


def _logits(logits: Tensor) -> Tensor:
    """Return the logits without their graph and with adjacent vocabulary entries, or raise if a row is too long."""
    if logits.shape[1] > MAX_VOCAB:
        raise ValueError(f"logits must have at most 2^30 entries per row, got {logits.shape[1]}")
    logits = logits.detach()
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


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
    dtype = checks.wide(logits.dtype)
    labels = labels.detach().long().contiguous()
    if isinstance(inv_temperature, Tensor):
        per_row, scalar = inv_temperature.detach().to(dtype).contiguous(), 1.0
    else:
        per_row, scalar = torch.empty(0, dtype=dtype, device=logits.device), float(inv_temperature)
    slope, factor = math.copysign(1.0, logit_scale), abs(logit_scale)
    if softcap:
        slope, factor = logit_scale / softcap, softcap
    return logits, labels, per_row, scalar, float(slope), float(factor), bool(softcap), int(ignore_index)


def _results(logits: Tensor, residual: Tensor | None) -> list[Tensor]:
    """Return memory for (logprobs, entropy, logsumexp, residual), the last one the caller's where given."""
    dtype = checks.wide(logits.dtype)
    made = [torch.empty(logits.shape[0], dtype=dtype, device=logits.device) for _ in range(3 + (residual is None))]
    return made if residual is None else [*made, residual]


def _upstream(logits: Tensor, *grads: Tensor | None) -> list[Tensor]:
    """Return the upstream gradients in the results' dtype, an empty tensor for None."""
    dtype = checks.wide(logits.dtype)
    absent = torch.empty(0, dtype=dtype, device=logits.device)
    return [absent if grad is None else grad.detach().to(dtype).contiguous() for grad in grads]


def _stream(logits: Tensor) -> int:
    """Return the handle of PyTorch's current stream on the device of the logits."""
    return torch.cuda.current_stream(logits.device).cuda_stream
