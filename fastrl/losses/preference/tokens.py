"""The preference loss of per-token log-probs, to which the entrances on logits and hidden states lead.

Legend: P pairs, B rows, T time.
"""

from __future__ import annotations

from torch import Tensor

from fastrl import checks
from fastrl.losses.output import LossOutput
from fastrl.losses.preference.axes import PreferenceAxes
from fastrl.losses.preference.inputs import PreferenceInputs
from fastrl.losses.preference.pairs import loss_of_pairs
from fastrl.losses.preference.rows import check_like, pair_rows
from fastrl.losses.preference.unpaired import loss_of_row_tokens
from fastrl.losses.scalars import result_dtype


def loss_of_tokens(
    spec: PreferenceAxes,
    logprobs: Tensor,  # (2P, T), or (B, T) for losses of single rows
    mask: Tensor,  # the same shape
    ref_logprobs: Tensor | None,  # the same shape
    inputs: PreferenceInputs,
) -> LossOutput:
    """Return the loss of per-token log-probs, as `PreferenceLoss.from_logprobs` describes it."""
    checks.float_tensor("logprobs", logprobs)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must be (2P, T) or (B, T), got shape {tuple(logprobs.shape)}")
    keep, poison = checks.keep_mask("mask", mask, logprobs.shape, logprobs.device)
    check_reference(spec, "ref_logprobs", ref_logprobs)
    squared = inputs.get("log_sum_squared_probs")
    check_like(logprobs, ref_logprobs=ref_logprobs, log_sum_squared_probs=squared)
    if (squared is None) != (spec.weighting is None):
        raise ValueError(f"log_sum_squared_probs goes with weighting='wpo', got weighting={spec.weighting!r}")
    if spec.unpaired:
        assert ref_logprobs is not None
        output = loss_of_row_tokens(spec, logprobs, keep, ref_logprobs, inputs)
    else:
        check_pairs_only(spec, inputs)
        rows = pair_rows(logprobs, keep, ref_logprobs, squared, spec.length_desensitisation)
        output = loss_of_pairs(spec, rows, inputs.get("n_pairs"), inputs.get("n_tokens"), result_dtype(logprobs))
    return output if poison is None else output._replace(loss=output.loss + poison)


def check_reference(spec: PreferenceAxes, what: str, *tensors: Tensor | None) -> None:
    """Raise `ValueError` if the loss needs a reference that is missing, or reads none and was given one."""
    given = [tensor is not None for tensor in tensors]
    if spec.reads_reference and not all(given):
        raise ValueError(f"the loss {spec.name!r} needs {what}; without a reference build it with reference=False")
    if any(given) and not spec.reference:
        raise ValueError(f"the loss {spec.name!r} reads no reference: leave {what} out, or use reference=True")
    if any(given) != all(given):
        raise ValueError(f"{what} go together, got only one of them")


_OF_ROWS = ("desirable", "kl_logprobs", "kl_ref_logprobs", "kl_mask", "reference_point", "baseline")


def check_pairs_only(spec: PreferenceAxes, inputs: PreferenceInputs) -> None:
    """Raise `ValueError` if a loss of pairs is given an input of single rows."""
    for name in _OF_ROWS:
        if inputs.get(name) is not None:
            raise ValueError(f"{name} is for losses of rows with a label (kto, bco), not for {spec.name!r}")
