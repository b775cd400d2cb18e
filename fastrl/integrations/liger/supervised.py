"""Liger-Kernel's cross-entropy and distillation classes.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl import checks
from fastrl.losses.distillation import distillation_loss
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.ops import linear_token_logprobs, token_logprobs
from fastrl.ops.row_statistics import linear_row_statistics, row_statistics
from fastrl.ops.rows import TokenLogprobs

_TOKEN_SUM = PolicyLoss.preset("sft", aggregate="token_sum")


@dataclass
class CrossEntropyOutput:
    """The outputs of a cross-entropy with `return_z_loss`, `return_token_accuracy` or `return_predicted_tokens`."""

    loss: Tensor
    z_loss: Tensor | None = None
    """The part of the loss that `lse_square_scale` adds, detached."""
    token_accuracy: Tensor | None = None
    """Share of the tokens with the largest logit at their label, or per token 0 or 1 with reduction="none"."""
    predicted_tokens: Tensor | None = None
    """(N,) the id of the largest logit, -1 for ignored tokens."""


class _CrossEntropy(nn.Module):
    """The common options and arithmetic of both cross-entropies."""

    def __init__(
        self,
        weight: Tensor | None,
        ignore_index: int,
        lse_square_scale: float,
        label_smoothing: float,
        reduction: str,
        softcap: float | None,
        return_z_loss: bool,
        return_token_accuracy: bool,
        return_predicted_tokens: bool,
        name: str,
    ) -> None:
        super().__init__()
        if weight is not None:
            raise ValueError(f"{name} (class weights) is not supported; leave it None")
        checks.one_of("reduction", reduction, ("mean", "sum", "none"))
        self.ignore_index = ignore_index
        self.lse_square_scale = checks.plain_float("lse_square_scale", lse_square_scale)
        self.label_smoothing = checks.plain_float("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.reduction = reduction
        self.softcap = softcap
        if softcap is not None:
            checks.plain_float("softcap", softcap, low=0.0, open_low=True)
            if label_smoothing != 0.0:
                raise ValueError(
                    "label_smoothing with softcap is not supported: the mean of capped logits needs all of them"
                )
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def _loss(
        self, found: TokenLogprobs, live: Tensor, mean_logits: Callable[[], Tensor], scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, z-loss), reduced, of the log-probs of N tokens.

        With label smoothing e the target is (1 - e) onehot + e / V, and the loss of a token

            -(1 - e) logp + e (logsumexp - mean logit)
        """
        per_token = -found.logprobs
        if self.label_smoothing != 0.0:
            smooth = torch.where(live, found.logsumexp - mean_logits(), 0.0)
            per_token = (1.0 - self.label_smoothing) * per_token + self.label_smoothing * smooth
        z_loss = torch.zeros_like(per_token)
        if self.lse_square_scale != 0.0:
            z_loss = self.lse_square_scale * torch.where(live, found.logsumexp.square(), 0.0)
            per_token = per_token + z_loss
        if scale is not None:
            per_token, z_loss = per_token * scale, z_loss * scale
        return self._reduced(per_token, live), self._reduced(z_loss.detach(), live)

    def _reduced(self, per_token: Tensor, live: Tensor) -> Tensor:
        if self.reduction == "none":
            return per_token
        total = per_token.sum()
        return total / live.sum().clamp(min=1) if self.reduction == "mean" else total

    def _output(self, loss: Tensor, z_loss: Tensor | None, target: Tensor, statistics: Callable[[], Any]) -> Any:
        """Return the loss, or a `CrossEntropyOutput`. Of equal logits the lowest id is the predicted one."""
        if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        accuracy = predicted = None
        if self.return_token_accuracy or self.return_predicted_tokens:
            rows = statistics()
            if self.return_token_accuracy:
                live = target != self.ignore_index
                hits = (live & (rows.argmax == target)).float()
                accuracy = hits if self.reduction == "none" else hits.sum() / live.sum().clamp(min=1)
            predicted = rows.argmax if self.return_predicted_tokens else None
        z_value = torch.zeros_like(loss.detach()) if z_loss is None else z_loss
        return CrossEntropyOutput(loss, z_value if self.return_z_loss else None, accuracy, predicted)


class LigerFusedLinearCrossEntropyLoss(_CrossEntropy):
    """Cross-entropy of hidden states and the head, without the logits.

    Args:
        ce_weight: class weights, not supported: None.
        ignore_index: label of tokens to leave out.
        lse_square_scale: coefficient of the z-loss, logsumexp^2.
        label_smoothing: share of the target spread over the vocabulary; not with `softcap`.
        reduction: "mean" over the tokens that are not ignored, "sum" or "none".
        softcap: bound c of c tanh(x / c), or None.
        accum_dtype: None or torch.float32. The head's gradient is always accumulated in float32.
        use_token_scaling: multiply a token's loss by its probability, detached.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a `CrossEntropyOutput`. The last two form
            the logits of every chunk once more.

    Raises:
        ValueError: class weights, another accum_dtype, label smoothing with a softcap, or a number out of range.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__(
            ce_weight,
            ignore_index,
            lse_square_scale,
            label_smoothing,
            reduction,
            softcap,
            return_z_loss,
            return_token_accuracy,
            return_predicted_tokens,
            "ce_weight",
        )
        if accum_dtype not in (None, torch.float32):
            raise ValueError(f"accum_dtype must be None or torch.float32, in which sums are kept, got {accum_dtype}")
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling

    def forward(
        self,
        lin_weight: Tensor,  # (V, D)
        _input: Tensor,  # (N, D)
        target: Tensor,  # (N,)
        bias: Tensor | None = None,  # (V,)
    ) -> Any:
        """Return the loss, or a `CrossEntropyOutput`. It is differentiable in `_input`, `lin_weight` and `bias`.

        For a mean or a sum of log-probs the forward forms the gradient: 3 GEMM units, 2 with a frozen head. Smoothing,
        the z-loss, token scaling and reduction="none" take one more.
        """
        live = target != self.ignore_index
        head: dict[str, Any] = {"bias": bias, "softcap": self.softcap}
        z_loss = None
        # `PolicyLoss` can form the gradient of a plain sum of log-probs in the forward.
        plain = self.label_smoothing == 0.0 and self.lse_square_scale == 0.0 and not self.use_token_scaling
        if plain and self.reduction != "none":
            output = _TOKEN_SUM.from_hidden(_input[None], lin_weight, target[None], mask=live[None], **head)
            loss = output.loss / live.sum().clamp(min=1) if self.reduction == "mean" else output.loss
        else:
            found = linear_token_logprobs(_input, lin_weight, target, ignore_index=self.ignore_index, **head)
            scale = found.logprobs.detach().exp() if self.use_token_scaling else None
            loss, z_loss = self._loss(found, live, lambda: _mean_logits(_input, lin_weight, bias), scale)
        return self._output(
            loss,
            z_loss,
            target,
            lambda: linear_row_statistics(
                _input.detach(), lin_weight.detach(), target, ignore_index=self.ignore_index, **_detached(head)
            ),
        )


class LigerCrossEntropyLoss(_CrossEntropy):
    """Cross-entropy of logits. The arguments are as in `LigerFusedLinearCrossEntropyLoss`. `weight` must be None."""

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__(
            weight,
            ignore_index,
            lse_square_scale,
            label_smoothing,
            reduction,
            softcap,
            return_z_loss,
            return_token_accuracy,
            return_predicted_tokens,
            "weight",
        )

    def forward(
        self,
        _input: Tensor,  # (N, V)
        target: Tensor,  # (N,)
    ) -> Any:
        """Return the loss, or a `CrossEntropyOutput`. `_input` keeps its values."""
        live = target != self.ignore_index
        head: dict[str, Any] = {"softcap": self.softcap, "ignore_index": self.ignore_index}
        found = token_logprobs(_input, target, **head)
        wide = torch.promote_types(_input.dtype, torch.float32)
        loss, z_loss = self._loss(found, live, lambda: _input.mean(-1, dtype=wide))
        return self._output(loss, z_loss, target, lambda: row_statistics(_input.detach(), target, **head))


class LigerFusedLinearJSDLoss(nn.Module):
    """Distillation: cross-entropy with the labels, and the generalised Jensen-Shannon divergence from a teacher.

        loss = weight_hard_loss CE + weight_soft_loss JSD_beta, both means over the tokens that are not ignored

    Args:
        weight_hard_loss, weight_soft_loss: weights of the two terms.
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher), between them is the mixture.
        ignore_index: label of tokens to leave out.
        temperature: temperature of both models in the divergence, > 0. The cross-entropy has temperature 1.
        return_soft_hard_loss: return (loss, soft, hard).
        compiled, chunk_size: accepted, without effect.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = checks.plain_float("weight_hard_loss", weight_hard_loss)
        self.weight_soft_loss = checks.plain_float("weight_soft_loss", weight_soft_loss)
        self.beta = checks.plain_float("beta", beta, low=0.0, high=1.0)
        self.temperature = checks.plain_float("temperature", temperature, low=0.0, open_low=True)
        self.ignore_index = ignore_index
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        teacher_input: Tensor,  # (N, D')
        teacher_weight: Tensor,  # (V, D')
        true_labels: Tensor,  # (N,)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V,)
    ) -> Any:
        """Return the loss, or (loss, soft, hard). It is differentiable in the student's tensors."""
        live = true_labels != self.ignore_index
        soft = distillation_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            live,
            beta=self.beta,
            temperature=self.temperature,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
        ).loss
        hard = torch.zeros_like(soft)
        if self.weight_hard_loss != 0.0 or self.return_soft_hard_loss:
            output = _TOKEN_SUM.from_hidden(
                student_input[None], student_weight, true_labels[None], mask=live[None], bias=student_bias
            )
            hard = output.loss / live.sum().clamp(min=1)
        loss = self.weight_soft_loss * soft
        if self.weight_hard_loss != 0.0:
            loss = loss + self.weight_hard_loss * hard
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the mean logit of every row, (N,)."""
    # A logit is linear in the head, so the mean of the head's rows gives it without logits.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    mean = hidden.to(wide) @ weight.mean(0, dtype=wide)
    return mean if bias is None else mean + bias.mean(dtype=wide)


def _detached(head: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in head.items()}
