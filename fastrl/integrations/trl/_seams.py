"""Where TRL is entered, and whether the installed TRL still looks there as it did when the adapter was tested."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import metadata
from types import ModuleType
from typing import Any

TESTED = "1.16.0"
"""The TRL that the adapter was tested with; another one is judged by its signatures and by the proof on first use."""

FUNCTION = "_ChunkedLogProbFunction"
COMPACT = "_use_triton"

FUNCTION_ARGUMENTS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
)  # fmt: skip
HEAD_ARGUMENTS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")


def trl_version() -> str:
    """Return the version of the installed TRL; raise ImportError, in one line, where there is none."""
    if importlib.util.find_spec("trl") is None:
        raise ImportError(
            "fastrl.integrations.trl needs TRL, which is not installed: pip install 'fastrl[trl]' "
            f"(tested with {TESTED})"
        )
    return metadata.version("trl")


def utils() -> ModuleType:
    """Return `trl.trainer.utils`, whose signatures have been compared with those that the adapter was tested with."""
    version = trl_version()
    try:
        import trl.trainer.utils as module
    except ImportError as error:
        raise ImportError(f"TRL {version} is installed but cannot be imported: {error}") from error
    function = _attribute(module, FUNCTION, version)
    check_arguments(f"trl.trainer.utils.{FUNCTION}.forward", getattr(function, "forward", None), FUNCTION_ARGUMENTS)
    check_arguments("trl.trainer.utils.add_fused_lm_head", getattr(module, "add_fused_lm_head", None), HEAD_ARGUMENTS)
    _attribute(module, COMPACT, version)
    _attribute(module, "maybe_gather_lm_head_ctx", version)
    return module


def gathered(*parameters: Any) -> AbstractContextManager[Any]:
    """Return TRL's context in which ZeRO-3's sharded parameters hold their values."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)


def _attribute(module: ModuleType, name: str, version: str) -> Any:
    if not hasattr(module, name):
        raise unsupported(f"{module.__name__}.{name} does not exist", version)
    return getattr(module, name)


def check_arguments(name: str, function: Callable[..., Any] | None, expected: tuple[str, ...]) -> None:
    """Raise RuntimeError unless `function` takes exactly the arguments that the adapter was tested with."""
    if function is None:
        raise unsupported(f"{name} does not exist", trl_version())
    found = tuple(inspect.signature(function).parameters)
    if found != expected:
        raise unsupported(f"{name} takes ({', '.join(found)}), expected ({', '.join(expected)})", trl_version())


def unsupported(what: str, version: str) -> RuntimeError:
    """Return the error for a TRL that the adapter does not fit."""
    return RuntimeError(
        f"TRL {version} is not supported: {what}; fastrl.integrations.trl fits TRL {TESTED} "
        f"(pip install 'trl=={TESTED}')"
    )
