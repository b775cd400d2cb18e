"""The functions of TRL that the adapter replaces or calls, and the check that the installed TRL still has them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

from fastrl.integrations.common.host import Host

TESTED = "1.16.0"
"""The tested version of TRL. For another one the signatures and the proof on first use decide."""

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
    """Return `trl.trainer.utils`, or raise RuntimeError if its signatures are not the tested ones."""
    module = HOST.module("trl.trainer.utils")
    HOST.function(HOST.attribute(module, FUNCTION), "forward", FUNCTION_ARGUMENTS)
    HOST.function(module, "add_fused_lm_head", HEAD_ARGUMENTS)
    HOST.attribute(module, COMPACT)
    HOST.attribute(module, "maybe_gather_lm_head_ctx")
    return module


def gathered(*parameters: Any) -> AbstractContextManager[Any]:
    """Return TRL's context that gathers parameters sharded by ZeRO-3."""
    # Imported here, because this module loads without TRL.
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)
