"""The inputs of a policy loss: their names, their checks, and the flat batch that the loss works on.

Legend: B batch, T time, N tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Required, TypedDict

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.losses.layout import Layout
from fastrl.losses.policy.axes import PolicyAxes

Mask = tuple[Tensor, Tensor | None]
"""A checked mask as `checks.keep_mask` returns it: (bool mask, poison or None)."""


class PolicyInputs(TypedDict, total=False):
    """The inputs of `PolicyLoss.from_logits` and `from_hidden`. `PolicyLoss.__call__` describes each at length."""

    advantages: Tensor | None
    """(B,), (B, 1), (B, T), or packed (N,), (S,): constants."""
    mask: Required[Tensor]
    """(B, T) or (N,), 1 for tokens that count."""
    old_logprobs: Tensor | None
    """(B, T) or (N,), log-probs of the policy in the ratio's denominator. None: on-policy."""
    ref_logprobs: Tensor | None
    """(B, T) or (N,), log-probs of the reference policy, for kl_to="ref"."""
    rollout_logprobs: Tensor | None
    """(B, T) or (N,), log-probs as the inference engine reported them."""
    n_tokens: float | Tensor | None
    """Global count of live tokens. None: counted from the mask."""
    n_sequences: float | Tensor | None
    """Global count of sequences with a live token. None: counted from the mask."""
    selection: Tensor | None
    """0/1 keep-mask on the policy term, per token or per sequence."""
    group_ids: Tensor | None
    """(B,), prompt of each sequence, for aggregate="prompt_mean"."""
    scores: Tensor | None
    """(B,) or per token, for surrogate="topr" alone."""
    cu_seqlens: Tensor | None
    """(S+1,) offsets of packed sequences."""


# A constant, because torch.compile traces the check.
_NAMES = tuple(PolicyInputs.__annotations__)


def check_names(inputs: Mapping[str, Any]) -> None:
    """Raise `TypeError` if a name is no input, or if the mask is missing."""
    if unknown := sorted(set(inputs) - set(_NAMES)):
        raise TypeError(f"unexpected argument {', '.join(unknown)}; known: {', '.join(_NAMES)}")
    if inputs.get("mask") is None:
        raise TypeError("mask= is needed: 1 for tokens that count")


def check_no_entropy(inputs: Mapping[str, Any]) -> None:
    """Raise `TypeError` if the caller passes the entropy to an entrance that computes it."""
    if "entropy" in inputs:
        raise TypeError("entropy= is computed here from the logits; pass it only to the loss on log-probs")


@dataclass(frozen=True)
class Batch:
    """The inputs of a call as flat tensors: (N,) per token, (S,) per sequence."""

    layout: Layout
    advantages: Tensor
    mask: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    selection: Tensor | None
    positive: Tensor | None
    group_ids: Tensor | None
    n_tokens: float | Tensor | None
    n_sequences: float | Tensor | None

    @classmethod
    def of(cls, spec: PolicyAxes, layout: Layout, inputs: PolicyInputs, mask: Mask, dtype: torch.dtype) -> Batch:
        """Return the inputs as flat columns of `dtype`, or raise if one that the loss needs is missing or does not fit.

        Args:
            spec: the loss.
            layout: shape of the tokens and lengths of the sequences.
            inputs: as the caller passed them, with known names.
            mask: `inputs["mask"]`, checked.
            dtype: of the token arithmetic.
        """
        keep, poison = mask

        def column(name: str, value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return layout.tokens(name, checks.float_tensor(name, value)).detach().to(dtype)

        old_logprobs = column("old_logprobs", inputs.get("old_logprobs"))
        ref_logprobs = column("ref_logprobs", inputs.get("ref_logprobs"))
        rollout_logprobs = column("rollout_logprobs", inputs.get("rollout_logprobs"))
        _check_needed(spec, layout, inputs)
        advantages = inputs.get("advantages")
        if advantages is None:
            spread = torch.ones(layout.n_tokens, dtype=dtype, device=layout.device)
        else:
            checks.float_tensor("advantages", advantages)
            spread = layout.tokens_or_sequences("advantages", advantages.detach()).to(dtype)
        if poison is not None:
            # Off the CPU nobody has read the mask, which would be a host sync: if it is invalid, the loss must be NaN.
            spread = spread + poison.to(dtype)
        selection = inputs.get("selection")
        if selection is not None:
            if not isinstance(selection, Tensor):
                raise TypeError(f"selection must be a tensor, got {type(selection).__name__}: pass torch.tensor(...)")
            selected, _ = checks.keep_mask("selection", selection, selection.shape, layout.device)
            selection = layout.tokens_or_sequences("selection", selected)
        positive = None
        if spec.surrogate == "topr":
            scores = inputs.get("scores")
            positive = spread > 0 if scores is None else layout.tokens_or_sequences("scores", scores) > 0
        group_ids, n_tokens, n_sequences = inputs.get("group_ids"), inputs.get("n_tokens"), inputs.get("n_sequences")
        if group_ids is not None:
            group_ids = layout.sequences("group_ids", group_ids)
        checks.count("n_tokens", n_tokens, keep)
        checks.count("n_sequences", n_sequences, keep)
        return cls(
            layout=layout,
            advantages=spread,
            mask=keep.reshape(-1),
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            selection=selection,
            positive=positive,
            group_ids=group_ids,
            n_tokens=n_tokens,
            n_sequences=n_sequences,
        )

    def columns(self, spec: PolicyAxes, logprobs: Tensor | None, sums: reference.SegmentSum) -> reference.TokenColumns:
        """Return the columns of the token arithmetic.

        Args:
            spec: the loss.
            logprobs: (N,) 0 outside the mask, or None if no column depends on them.
            sums: the segment sum of the backend.
        """
        kl_tokens = None
        if spec.kl_fraction is not None:
            assert logprobs is not None
            kl_tokens = reference.top_covariance(logprobs.detach(), self.advantages, self.mask, spec.kl_fraction)
        tokens = reference.TokenBatch(
            advantages=self.advantages,
            mask=self.mask,
            lengths=self.layout.lengths,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            rollout_logprobs=self.rollout_logprobs,
            selection=self.selection,
            positive=self.positive,
            kl_tokens=kl_tokens,
            group_ids=self.group_ids,
            n_tokens=self.n_tokens,
            n_sequences=self.n_sequences,
            constant=spec.constant if spec.constant is not None else self.layout.shape[-1],
        )
        return reference.policy_columns(
            spec, tokens, logprobs=None if logprobs is None else logprobs.detach(), sums=sums
        )


def _check_needed(spec: PolicyAxes, layout: Layout, inputs: PolicyInputs) -> None:
    if inputs.get("advantages") is None and spec.surrogate not in ("nll", "dft"):
        raise ValueError(f"surrogate={spec.surrogate!r} needs advantages=")
    if spec.kl is not None and spec.kl_to == "ref" and inputs.get("ref_logprobs") is None:
        measured = ", also to measure it with kl_coef=0" if spec.kl_coef == 0.0 else ""
        raise ValueError(f"kl={spec.kl!r} with kl_to='ref' needs ref_logprobs={measured}; kl=None leaves the KL out")
    if inputs.get("scores") is not None and spec.surrogate != "topr":
        raise ValueError(
            f"scores= is read by surrogate='topr' alone and would change nothing with {spec.surrogate!r}: leave it out"
        )
    if spec.uses_rollout and inputs.get("rollout_logprobs") is None:
        raise ValueError("rollout_logprobs= is needed by the correction, ratio_anchor or kl_to of this loss")
    if spec.aggregate == "constant" and spec.constant is None and layout.packed:
        raise ValueError("aggregate='constant' of packed tokens needs constant=, the longest completion allowed")
    if spec.aggregate == "prompt_mean" and inputs.get("group_ids") is None:
        raise ValueError("aggregate='prompt_mean' needs group_ids=, the prompt of each sequence")
