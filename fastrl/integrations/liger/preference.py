"""Liger-Kernel's preference classes on `PreferenceLoss`.

Legend: P pairs, B rows (2P, the chosen ones first), T time, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastrl import checks
from fastrl.integrations.liger.policy import BuiltOnce
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.losses.preference.loss import PreferenceLoss
from fastrl.ops import linear_token_logprobs

DPO_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip
_TOKEN_SUM = PolicyLoss.preset("sft", aggregate="token_sum")

Pairs = tuple[Tensor, tuple[Tensor, ...]]


class _PairLoss(BuiltOnce):
    """A loss of pairs. The chosen rows come first, then the rejected ones."""

    BUILT_FROM = (
        "beta", "alpha", "compute_nll_loss", "average_log_prob", "loss_type", "label_smoothing", "discopop_tau",
        "gamma",
    )  # fmt: skip

    def __init__(
        self, loss: PreferenceLoss, ignore_index: int, compiled: bool, chunk_size: int, compute_nll_loss: bool
    ) -> None:
        super().__init__()
        self.compute_nll_loss = compute_nll_loss  # whether to return the NLL, even with a weight of 0
        self.loss = loss
        self.ignore_index = ignore_index
        self.compiled = compiled
        self.chunk_size = chunk_size

    @property
    def beta(self) -> float:
        """Scale of the loss."""
        return self.loss.beta

    def _pairs(
        self,
        weight: Tensor,  # (V, D)
        hidden: Tensor,  # (B, T, D)
        target: Tensor,  # (B, T)
        bias: Tensor | None,  # (V,)
        reference: tuple[Tensor, Tensor, Tensor | None] | None = None,
        nll_target: Tensor | None = None,  # (B, T)
    ) -> Pairs:
        """Return (loss, (chosen logps, rejected logps, two mean logits, NLL, chosen rewards, rejected rewards))."""
        _check_rows(hidden, target)
        mask = target != self.ignore_index
        ref_logprobs = None if reference is None else _logprobs(*reference, target, self.ignore_index)
        # With separate labels for the NLL the fused loss leaves it out, and it is added below.
        loss = self.loss if nll_target is None else dataclasses.replace(self.loss, sft_coef=0.0, sft_normalise=None)
        output = loss.from_hidden(hidden, weight, target, mask, bias=bias, ref_logprobs=ref_logprobs)
        assert output.logprobs is not None
        total = output.loss
        chosen = mask.chunk(2)[0]
        nll = _row_logprobs(-output.logprobs, mask, mean=False).chunk(2)[0].sum() / chosen.sum().clamp(min=1)
        if nll_target is not None:
            attached = self._nll(weight, hidden, nll_target, bias)
            total = total + self.loss.sft_coef * attached
            nll = attached.detach()
        with torch.no_grad():
            policy = self._of_rows(output.logprobs, mask)
            scores = policy if ref_logprobs is None else policy - self._of_rows(ref_logprobs, mask)
            rewards = self.loss.beta * scores
            means = _logit_sums(hidden, weight, bias).chunk(2)
            size = max(means[0].numel() * target.shape[1] * weight.shape[0], 1)
        if not self.compute_nll_loss:
            nll = torch.zeros_like(nll)
        found = (*policy.chunk(2), means[0].sum() / size, means[1].sum() / size, nll, *rewards.chunk(2))
        return total, found

    def _nll(self, weight: Tensor, hidden: Tensor, nll_target: Tensor, bias: Tensor | None) -> Tensor:
        """Return the mean NLL of the chosen rows with separate labels."""
        checks.same_shape("nll_target", nll_target, hidden.shape[:2])
        n = hidden.shape[0] // 2
        labels = nll_target[:n]
        live = labels != self.ignore_index
        output = _TOKEN_SUM.from_hidden(hidden[:n], weight, labels, mask=live, bias=bias)
        return output.loss / live.sum().clamp(min=1)

    def _of_rows(self, logprobs: Tensor, mask: Tensor) -> Tensor:
        return _row_logprobs(logprobs, mask, mean=self.loss.reduce == "mean")


class LigerFusedLinearDPOLoss(_PairLoss):
    """DPO and its relatives.

    Args:
        ignore_index: label of the tokens outside the completions.
        beta: scale of the log-ratios.
        alpha: weight of the NLL of the chosen rows, with `compute_nll_loss`.
        use_ref_model: whether the calls pass a reference.
        average_log_prob: whether to average log-probs over the tokens of a row.
        loss_type: one of `DPO_TYPES`.
        label_smoothing: for "sigmoid" (conservative DPO), "robust" and "exo_pair" only.
        discopop_tau: temperature of "discopop".
        compiled, chunk_size: accepted, without effect.

    Raises:
        ValueError: an unknown loss type, an option that the loss type does not read, or a number out of range.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        checks.one_of("loss_type", loss_type, DPO_TYPES)
        if loss_type == "exo_pair" and label_smoothing <= 0.0:
            raise ValueError("label_smoothing must be > 0 for loss_type='exo_pair'; the paper recommends 1e-3")
        if loss_type != "discopop" and discopop_tau != 0.05:
            raise ValueError(f"discopop_tau is read by loss_type='discopop', not by {loss_type!r}; leave it out")
        fields: dict[str, Any] = {"beta": beta, "reference": use_ref_model, **_nll_fields(compute_nll_loss, alpha)}
        if label_smoothing != 0.0:
            fields["label_smoothing"] = label_smoothing
        if loss_type == "discopop":
            fields["tau"] = discopop_tau
        if average_log_prob:
            fields["reduce"] = "mean"
        super().__init__(
            PreferenceLoss.preset(loss_type, **fields), ignore_index, compiled, chunk_size, compute_nll_loss
        )
        self.use_ref_model = use_ref_model

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (2P, T, D)
        target: Tensor,  # (2P, T)
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (2P, T, D')
        ref_weight: Tensor | None = None,  # (V, D')
        ref_bias: Tensor | None = None,  # (V,)
    ) -> Pairs:
        """Return (loss, (chosen logps, rejected logps, two mean logits, NLL, chosen rewards, rejected rewards)).

        Log-probs and rewards are (P,). The mean logits, of the chosen and the rejected rows, and the NLL are scalars.
        """
        reference = _reference(self.use_ref_model, ref_input, ref_weight, ref_bias)
        return self._pairs(lin_weight, _input, target, bias, reference)


class LigerFusedLinearCPOLoss(_PairLoss):
    """CPO: no reference, and the NLL of the chosen rows with weight `alpha`.

    The arguments are as in `LigerFusedLinearDPOLoss`, with conservative `label_smoothing`.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        fields = {"beta": beta, "label_smoothing": label_smoothing, **_nll_fields(compute_nll_loss, alpha)}
        loss = PreferenceLoss.preset("cpo", **fields, reduce="mean" if average_log_prob else "sum")
        super().__init__(loss, ignore_index, compiled, chunk_size, compute_nll_loss)

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (2P, T, D)
        target: Tensor,  # (2P, T)
        bias: Tensor | None = None,  # (V,)
    ) -> Pairs:
        """Return (loss, metrics), as `LigerFusedLinearDPOLoss` does."""
        return self._pairs(lin_weight, _input, target, bias)


class LigerFusedLinearSimPOLoss(_PairLoss):
    """SimPO: mean log-probs, target margin `gamma`, no reference, and with `compute_nll_loss` the NLL times `alpha`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        fields = {"beta": beta, "label_smoothing": label_smoothing, **_nll_fields(compute_nll_loss, alpha)}
        super().__init__(
            PreferenceLoss.preset("simpo", **fields, gamma=gamma), ignore_index, compiled, chunk_size, compute_nll_loss
        )

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (2P, T, D)
        target: Tensor,  # (2P, T)
        bias: Tensor | None = None,  # (V,)
    ) -> Pairs:
        """Return (loss, metrics), as `LigerFusedLinearDPOLoss` does."""
        return self._pairs(lin_weight, _input, target, bias)


class LigerFusedLinearORPOLoss(_PairLoss):
    """ORPO: the log-odds of mean log-probs, and the NLL of the chosen rows, which can have separate labels."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        loss = PreferenceLoss.preset("orpo", beta=beta, **_nll_fields(compute_nll_loss, 1.0))
        super().__init__(loss, ignore_index, compiled, chunk_size, compute_nll_loss)

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (2P, T, D)
        target: Tensor,  # (2P, T)
        bias: Tensor | None = None,  # (V,)
        nll_target: Tensor | None = None,  # (2P, T), its chosen rows are read
    ) -> Pairs:
        """Return (loss, metrics): as for DPO, then the mean of log sigmoid(log-odds) and the mean of the log-odds."""
        if nll_target is not None and not self.compute_nll_loss:
            raise ValueError("nll_target was passed to a loss built with compute_nll_loss=False")
        loss, found = self._pairs(lin_weight, _input, target, bias, nll_target=nll_target)
        odds = _log_odds(found[0].double()) - _log_odds(found[1].double())
        n = max(odds.numel(), 1)
        ratio = nn.functional.logsigmoid(odds).sum() / n
        return loss, (*found, ratio.to(loss.dtype), (odds.sum() / n).to(loss.dtype))


class LigerFusedLinearKTOLoss(BuiltOnce):
    """KTO: single rows, desirable or undesirable, with a reference point that the caller passes as `kl`.

    The arguments are as in `LigerFusedLinearDPOLoss`.
    """

    BUILT_FROM = ("beta",)

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.loss = PreferenceLoss.preset("kto", beta=beta)
        self.ignore_index = ignore_index
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size

    def forward(
        self,
        _input: Tensor,  # (B, T, D)
        lin_weight: Tensor,  # (V, D)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (B,) bool
        ref_input: Tensor | None = None,  # (B, T, D')
        ref_weight: Tensor | None = None,  # (V, D')
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | float | None = None,  # one number, or (B,)
    ) -> Pairs:
        """Return (loss, six sums): of logps, all logits and rewards, each over the desirable, then the other rows."""
        _check_rows(_input, target, pairs=False)
        if preference_labels is None:
            raise ValueError("preference_labels (B,) are needed: True for desirable rows, got None")
        desirable, _ = checks.keep_mask("preference_labels", preference_labels, target.shape[:1], target.device)
        reference = _reference(self.use_ref_model, ref_input, ref_weight, ref_bias)
        mask = target != self.ignore_index
        found = linear_token_logprobs(_input, lin_weight, target, bias=bias, ignore_index=self.ignore_index)
        logps = _row_logprobs(found.logprobs, mask, mean=self.average_log_prob)
        ref = torch.zeros_like(logps)
        if reference is not None:
            found_ref = _logprobs(*reference, target, self.ignore_index)
            ref = _row_logprobs(found_ref, mask, mean=self.average_log_prob).detach()
        point = torch.zeros_like(ref) if kl is None else torch.as_tensor(kl).detach().to(ref)
        if point.numel() != 1 and point.shape != ref.shape:
            raise ValueError(f"kl must be one number or (B={ref.numel()},), got shape {tuple(point.shape)}")
        # The loss takes one reference point. One per row has the same effect as adding it to the reference's log-prob.
        shifted = ref + point.reshape(-1)
        rows = (logps[desirable], logps[~desirable], shifted[desirable], shifted[~desirable])
        output = self.loss(*rows, reference_point=0.0)
        with torch.no_grad():
            logits = _logit_sums(_input, lin_weight, bias)
            columns = (logps.detach(), logits, self.beta * (logps.detach() - ref))
            sums = [torch.where(side, x, 0.0).sum() for x in columns for side in (desirable, ~desirable)]
        return output.loss, tuple(sums)


def _nll_fields(compute_nll_loss: bool, alpha: float) -> dict[str, Any]:
    """Return the fields for the NLL of the chosen rows, one mean over all of their tokens."""
    coefficient = checks.plain_float("alpha", alpha) if compute_nll_loss else 0.0
    return {"sft_coef": coefficient, "sft_normalise": "tokens" if coefficient else None}


def _reference(
    used: bool, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the reference's hidden states, head and bias, or None; raise ValueError if `used` says otherwise."""
    if not used:
        if hidden is not None or weight is not None or bias is not None:
            raise ValueError("a reference was passed to a loss built with use_ref_model=False")
        return None
    if hidden is None or weight is None:
        raise ValueError("a loss built with use_ref_model=True needs ref_input and ref_weight")
    return hidden, weight, bias


def _check_rows(hidden: Tensor, target: Tensor, *, pairs: bool = True) -> None:
    if hidden.dim() != 3 or target.shape != hidden.shape[:2]:
        raise ValueError(
            f"_input must be (B, T, D) and target (B, T), got {tuple(hidden.shape)} and {tuple(target.shape)}"
        )
    if pairs and target.shape[0] % 2:
        raise ValueError(f"target must have 2P rows, the chosen ones first, got {target.shape[0]} rows")


@torch.no_grad()
def _logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int) -> Tensor:
    return linear_token_logprobs(hidden, weight, target, bias=bias, ignore_index=ignore_index).logprobs


def _row_logprobs(logprobs: Tensor, mask: Tensor, *, mean: bool) -> Tensor:
    """Return the sum or the mean over the live tokens of a row, (B,)."""
    summed = torch.where(mask, logprobs, 0.0).sum(1)
    return summed / mask.sum(1).clamp(min=1) if mean else summed


def _logit_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sum of all T x V logits of a row, (B,)."""
    # A logit is linear in both, so the sum of hidden states times the sum of the head's rows gives it without logits.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    sums = hidden.detach().sum(1, dtype=wide) @ weight.detach().sum(0, dtype=wide)
    return sums if bias is None else sums + hidden.shape[1] * bias.detach().sum(dtype=wide)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean log-prob)."""
    return mean_logps - torch.log(-torch.expm1(mean_logps))
