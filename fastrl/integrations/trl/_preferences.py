"""Predictions of the preference losses, of pairs and of single rows with a label; see `_prediction`.

Legend: N live tokens in the order of the batch, B rows, P pairs, M tokens of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.trl._prediction import Fused, fused_pass, gradient_path
from fastrl.losses.preference.loss import PreferenceLoss


def _check_count(targets: Tensor, lengths: Tensor) -> None:
    if targets.numel() != int(lengths.sum()):
        raise RuntimeError(
            f"the model scored {targets.numel()} tokens where the batch has {int(lengths.sum())} live ones"
        )


def _inside(block: slice, units: Sequence[int], ends: Sequence[int]) -> slice:
    """Return which units, given by their tokens and ends, the tokens of a block belong to."""
    inside = [i for i, end in enumerate(ends) if end > block.start and end - units[i] < block.stop]
    return slice(inside[0], inside[-1] + 1)


def _row_of_tokens(lengths: Tensor) -> Tensor:
    """Return the row of each token (M,)."""
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def _sums(logprobs: Tensor, row: Tensor, count: int) -> Tensor:
    """Return the sums of rows (count,) in float64, as a leaf that takes a gradient."""
    sums = logprobs.new_zeros(count, dtype=torch.float64).index_add_(0, row, logprobs.detach().double())
    return sums.requires_grad_()


@dataclass
class PairPrediction:
    """A `PreferenceLoss` of sums over the tokens of completions, chosen rows first."""

    loss: PreferenceLoss
    lengths: Tensor  # (2P,) live tokens of each row
    counts: Tensor  # (2P,) tokens that TRL divides by: one more where a row has no prompt
    ref_chosen: Tensor  # (P,) sums over tokens
    ref_rejected: Tensor  # (P,)
    path: str = ""

    @property
    def needs_head_pass(self) -> bool:
        """Entropies carry no gradient."""
        return False

    def fused(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, request: Any, wanted: Sequence[str]
    ) -> Fused:
        """Run the head in blocks of whole pairs, the two rows of a pair one behind the other."""
        _check_count(targets, self.lengths)
        order = self._order()
        pairs = self._pairs()
        units = pairs.sum(1).tolist()
        ends = list(accumulate(units))

        def of_block(logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, None]:
            del entropy, index
            which = _inside(block, units, ends)
            return self._of_pairs(logprobs, pairs[which], which), None

        result, taken = fused_pass((hidden[order], weight, bias, targets[order], request), wanted, of_block, units)
        self.path = gradient_path(taken)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        columns = {name: column[back] for name, column in result.columns.items()}
        return Fused(result.handle, result.logprobs[back], result.entropy[back], columns)

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the loss on log-probs, in the order of the batch."""
        del entropy
        order = self._order()
        pairs = self._pairs()
        g = self._of_pairs(logprobs[order], pairs, slice(0, pairs.shape[0]))
        return torch.empty_like(g).scatter_(0, order, g), None

    def _pairs(self) -> Tensor:
        """Return the live tokens of (chosen, rejected), (P, 2)."""
        return self.lengths.view(2, -1).t()

    def _order(self) -> Tensor:
        """Return the tokens (N,) in the order chosen 0, rejected 0, chosen 1, ..."""
        starts = (self.lengths.cumsum(0) - self.lengths).view(2, -1).t().reshape(-1)
        lengths = self._pairs().reshape(-1)
        first = lengths.cumsum(0) - lengths
        shift = (starts - first).repeat_interleave(lengths)
        return torch.arange(shift.numel(), device=shift.device) + shift

    def _of_pairs(self, logprobs: Tensor, pairs: Tensor, which: slice) -> Tensor:
        """Return the gradient (M,) of the pairs `which`, whose tokens are `logprobs` (M,), pair by pair."""
        lengths = pairs.reshape(-1)
        row = _row_of_tokens(lengths)
        counts = self.counts.view(2, -1)[:, which]
        # A mixture of "sft" alone takes no reference.
        reference = (self.ref_chosen[which], self.ref_rejected[which]) if self.loss.reference else (None, None)
        with torch.enable_grad():
            sums = _sums(logprobs, row, lengths.numel())
            loss = self.loss(
                sums[0::2], sums[1::2], *reference, chosen_lengths=counts[0], rejected_lengths=counts[1],
                n_pairs=float(self._pairs().shape[0]), n_tokens=self._pairs()[:, 0].sum().double(),
            ).loss  # fmt: skip
            (g,) = torch.autograd.grad(loss, sums)
        return g.to(logprobs.dtype)[row]


@dataclass
class RowPrediction:
    """A `PreferenceLoss` of single rows with a label, in the order of the batch."""

    loss: PreferenceLoss
    lengths: Tensor  # (B,) live tokens of each row
    labels: Tensor  # (B,) bool
    ref: Tensor  # (B,) sums over tokens
    reference_point: Tensor | None  # ()
    path: str = ""

    @property
    def needs_head_pass(self) -> bool:
        """Entropies carry no gradient."""
        return False

    def fused(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, request: Any, wanted: Sequence[str]
    ) -> Fused:
        """Run the head in blocks of whole rows."""
        _check_count(targets, self.lengths)
        units = self.lengths.tolist()
        ends = list(accumulate(units))

        def of_block(logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, None]:
            del entropy, index
            return self._of_rows(logprobs, _inside(block, units, ends)), None

        result, taken = fused_pass((hidden, weight, bias, targets, request), wanted, of_block, units)
        self.path = gradient_path(taken)
        return result

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the loss on log-probs."""
        del entropy
        return self._of_rows(logprobs, slice(0, self.lengths.numel())), None

    def _of_rows(self, logprobs: Tensor, which: slice) -> Tensor:
        """Return the gradient (M,) of the rows `which`, whose tokens are `logprobs` (M,)."""
        lengths, labels, ref = self.lengths[which], self.labels[which], self.ref[which]
        row = _row_of_tokens(lengths)
        with torch.enable_grad():
            sums = _sums(logprobs, row, lengths.numel())
            loss = self.loss(
                sums[labels], sums[~labels], ref[labels], ref[~labels], reference_point=self.reference_point,
                n_pairs=float(self.lengths.numel()),
            ).loss  # fmt: skip
            (g,) = torch.autograd.grad(loss, sums)
        return g.to(logprobs.dtype)[row]
