"""Predictions of the preference losses, for pairs (DPO) and for single rows with a label (KTO); see `_prediction`.

Legend: N live tokens in the order of the batch, B rows, P pairs, M tokens of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from fastrl.integrations.trl._prediction import Fused, HeadCall, fused_pass, gradient_path
from fastrl.losses.preference.loss import PreferenceLoss


def _check_count(targets: Tensor, lengths: Tensor) -> None:
    if targets.numel() != int(lengths.sum()):
        raise RuntimeError(
            f"the model scored {targets.numel()} tokens where the batch has {int(lengths.sum())} live ones"
        )


def _groups_of(block: slice, sizes: Sequence[int], ends: Sequence[int]) -> slice:
    """Return the groups of a block of tokens, given the size of each group and its end."""
    inside = [i for i, end in enumerate(ends) if end > block.start and end - sizes[i] < block.stop]
    return slice(inside[0], inside[-1] + 1)


def _row_of_tokens(lengths: Tensor) -> Tensor:
    """Return the index of each token's row, (M,)."""
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def _sums(logprobs: Tensor, row: Tensor, count: int) -> Tensor:
    """Return the sum of each row's log-probs, (count,) in float64, as a leaf of autograd."""
    sums = logprobs.new_zeros(count, dtype=torch.float64).index_add_(0, row, logprobs.detach().double())
    return sums.requires_grad_()


@dataclass
class PairPrediction:
    """A `PreferenceLoss` of pairs, from the sum of log-probs of each row. The chosen rows come first."""

    loss: PreferenceLoss
    lengths: Tensor  # (2P,) live tokens of each row
    counts: Tensor  # (2P,) tokens by which TRL divides: one more than `lengths` for a row without a prompt
    ref_chosen: Tensor  # (P,) sums over tokens
    ref_rejected: Tensor  # (P,)
    path: str = ""
    needs_head_pass: bool = field(default=False, init=False)

    def fused(self, call: HeadCall) -> Fused:
        """Run the head in blocks of whole pairs, with the rejected row of a pair directly after the chosen one."""
        _check_count(call.targets, self.lengths)
        order = self._order()
        pairs = self._pairs()
        sizes = pairs.sum(1).tolist()
        ends = list(accumulate(sizes))

        def of_block(logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, None]:
            del entropy, index
            which = _groups_of(block, sizes, ends)
            return self._of_pairs(logprobs, pairs[which], which), None

        # The loss of a pair needs both sums, so both rows must be in one block.
        ordered = replace(call, hidden=call.hidden[order], targets=call.targets[order])
        result, gemm_units = fused_pass(ordered, of_block, sizes)
        self.path = gradient_path(gemm_units)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        columns = {name: column[back] for name, column in result.columns.items()}
        return Fused(result.handle, result.logprobs[back], result.entropy[back], columns)

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the loss with respect to the log-probs, in the order of the batch."""
        del entropy
        order = self._order()
        pairs = self._pairs()
        g = self._of_pairs(logprobs[order], pairs, slice(0, pairs.shape[0]))
        return torch.empty_like(g).scatter_(0, order, g), None

    def _pairs(self) -> Tensor:
        """Return the number of live tokens of (chosen, rejected), (P, 2)."""
        return self.lengths.view(2, -1).t()

    def _order(self) -> Tensor:
        """Return the indices of the tokens (N,) in the order chosen 0, rejected 0, chosen 1, ..."""
        starts = (self.lengths.cumsum(0) - self.lengths).view(2, -1).t().reshape(-1)
        lengths = self._pairs().reshape(-1)
        first = lengths.cumsum(0) - lengths
        shift = (starts - first).repeat_interleave(lengths)
        return torch.arange(shift.numel(), device=shift.device) + shift

    def _of_pairs(self, logprobs: Tensor, pairs: Tensor, which: slice) -> Tensor:
        """Return the gradient (M,) for the pairs `which`, given the log-probs (M,) of their tokens, pair by pair."""
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
    needs_head_pass: bool = field(default=False, init=False)

    def fused(self, call: HeadCall) -> Fused:
        """Run the head in blocks of whole rows."""
        _check_count(call.targets, self.lengths)
        sizes = self.lengths.tolist()
        ends = list(accumulate(sizes))

        def of_block(logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, None]:
            del entropy, index
            return self._of_rows(logprobs, _groups_of(block, sizes, ends)), None

        result, gemm_units = fused_pass(call, of_block, sizes)
        self.path = gradient_path(gemm_units)
        return result

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the loss with respect to the log-probs."""
        del entropy
        return self._of_rows(logprobs, slice(0, self.lengths.numel())), None

    def _of_rows(self, logprobs: Tensor, which: slice) -> Tensor:
        """Return the gradient (M,) for the rows `which`, given the log-probs (M,) of their tokens."""
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
