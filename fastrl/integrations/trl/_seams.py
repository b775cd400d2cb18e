"""Where TRL is entered, and whether the installed TRL still looks there as it did when the adapter was tested."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from fastrl.integrations.common.host import Host

TESTED = "1.16.0"
"""The TRL that the adapter was tested with; another one is judged by its signatures and by the proof on first use."""

HOST = Host("TRL", "trl", TESTED, "fastrl.integrations.trl", "pip install 'fastrl[trl]'")

FUNCTION = "_ChunkedLogProbFunction"
COMPACT = "_use_triton"

FUNCTION_ARGUMENTS = (
    "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
    "logit_scale", "outputs",
)  # fmt: skip
HEAD_ARGUMENTS = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")

check_arguments = HOST.check_arguments


def utils() -> ModuleType:
    """Return `trl.trainer.utils`, whose signatures have been compared with those that the adapter was tested with."""
    module = HOST.module("trl.trainer.utils")
    HOST.function(HOST.attribute(module, FUNCTION), "forward", FUNCTION_ARGUMENTS)
    HOST.function(module, "add_fused_lm_head", HEAD_ARGUMENTS)
    HOST.attribute(module, COMPACT)
    HOST.attribute(module, "maybe_gather_lm_head_ctx")
    return module


def gathered(*parameters: Any) -> AbstractContextManager[Any]:
    """Return TRL's context in which ZeRO-3's sharded parameters hold their values."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)
