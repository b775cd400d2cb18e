"""Liger-Kernel's GRPO class on `PolicyLoss`.

Legend: B completions, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrl import checks
from fastrl.losses.policy.correction import RolloutCorrection
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.ops import linear_token_logprobs

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
OVER_ALL_RANKS = ("dapo", "cispo", "vespo")
_AGGREGATE = {"grpo": "sequence_mean", "sapo": "sequence_mean", "dr_grpo": "constant", "luspo": "sequence_sum"}
# VESPO's log-weights are clamped at 20.
_VESPO_WEIGHT_MAX = math.exp(20.0)


class BuiltOnce(nn.Module):
    """A module with a `loss` built once from its options, which then cannot be changed.

    Liger reads its options at every call, so there a change takes effect. Here it raises.
    """

    BUILT_FROM: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, or raise AttributeError for an option of the built loss."""
        if name in self.BUILT_FROM and "loss" in self.__dict__:
            raise AttributeError(
                f"{type(self).__name__}.{name} cannot be changed, as the loss is built once: build another with "
                f"{name}={value!r}"
            )
        super().__setattr__(name, value)


class LigerFusedLinearGRPOLoss(BuiltOnce):
    """GRPO and its relatives from hidden states and the head, as `PolicyLoss.from_hidden`.

    Args:
        beta: coefficient of the KL to the reference (k3); 0.0 leaves it out.
        use_ref_model: whether the calls pass a reference. Without one there is no KL.
        epsilon_low, epsilon_high: clip widths. For "cispo" epsilon_high is the bound of the weight itself.
        loss_type: one of `LOSS_TYPES`.
        max_completion_length: divisor of "dr_grpo", which needs it.
        importance_sampling_level: "token" or "sequence".
        sapo_temperature_pos, sapo_temperature_neg: temperatures of "sapo".
        temperature: sampling temperature, applied to the logits.
        delta: cap of the unclipped ratio, > 1 + epsilon_high.
        use_bias_correction_kl: multiply the KL by the ratio.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: parameters of "vespo".
        compiled, chunk_size: accepted, without effect.

    Raises:
        ValueError: an unknown name, a number out of range, or an option that the loss type does not read. Or a level
            that it does not have: the token level for "luspo", the sequence level for "cispo", "sapo" and "vespo".
    """

    BUILT_FROM = (
        "beta", "use_ref_model", "epsilon_low", "epsilon_high", "loss_type", "max_completion_length", "delta",
        "importance_sampling_level", "sapo_temperature_pos", "sapo_temperature_neg", "use_bias_correction_kl",
        "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
    )  # fmt: skip

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        checks.one_of("loss_type", loss_type, LOSS_TYPES)
        checks.one_of("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
        _check_level(loss_type, importance_sampling_level)
        if delta is not None and loss_type not in CLIPPED:
            raise ValueError(
                f"delta is read by the loss types {', '.join(CLIPPED)}, not by {loss_type!r}; leave it out"
            )
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length is needed by loss_type='dr_grpo'")
        checks.plain_float("beta", beta, low=0.0)
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.temperature = checks.plain_float("temperature", temperature, low=0.0, open_low=True)
        fields: dict[str, Any] = {"aggregate": _AGGREGATE.get(loss_type, "token_mean"), "clip_low": None}
        fields["clip_high"] = None
        if loss_type in CLIPPED:
            fields |= {"clip_low": epsilon_low, "clip_high": epsilon_high, "max_ratio": delta}
            fields["ratio_level"] = importance_sampling_level
        if loss_type == "dr_grpo":
            fields["constant"] = float(max_completion_length or 0)
        elif loss_type == "cispo":
            fields |= {"surrogate": "clipped_weight", "weight_high": epsilon_high}
        elif loss_type == "sapo":
            fields |= {"surrogate": "sapo", "tau_pos": sapo_temperature_pos, "tau_neg": sapo_temperature_neg}
        elif loss_type == "vespo":
            fields |= {"surrogate": "vespo", "ratio_level": "none", "k_pos": vespo_k_pos, "k_neg": vespo_k_neg}
            fields |= {"lambda_pos": vespo_lambda_pos, "lambda_neg": vespo_lambda_neg}
        if beta != 0.0 and use_ref_model:
            fields |= {"kl": "k3", "kl_coef": float(beta)}
            if use_bias_correction_kl:
                fields["kl_gradient"] = "ratio_weighted"
        self.loss = PolicyLoss(**fields)

    def forward(
        self,
        _input: Tensor,  # (B, T, D)
        lin_weight: Tensor,  # (V, D)
        selected_token_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        advantages: Tensor,  # (B,), (B, 1) or (B, T)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, T)
        old_per_token_logps: Tensor | None = None,  # (B, T)
        ref_input: Tensor | None = None,  # (B, T, D')
        ref_weight: Tensor | None = None,  # (V, D')
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B,), (B, 1) or (B, T)
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (loss, metrics): the mean KL if beta is not 0, then the share of clipped tokens.

        The loss is float32, differentiable with respect to `_input`, `lin_weight` and `bias`. "dapo", "cispo" and
        "vespo" divide by `num_items_in_batch`, or by the number of tokens on all ranks, each over the number of ranks.
        Without `num_items_in_batch` all ranks of an initialised process group must make the call.
        """
        inputs: dict[str, Any] = {"mask": attention_mask, "old_logprobs": old_per_token_logps}
        inputs["ref_logprobs"] = self._reference(
            selected_token_ids, attention_mask, ref_per_token_logps, ref_input, ref_weight, ref_bias
        )
        inputs |= self._counts(attention_mask, num_items_in_batch)
        loss, signs = self.loss, advantages

        if vllm_is_ratio is not None:
            if self.loss_type == "vespo":
                loss, inputs["rollout_logprobs"] = _with_vespo_weights(
                    loss, vllm_is_ratio, old_per_token_logps, attention_mask
                )
            else:
                # Every loss here is homogeneous in the advantage, so a weight >= 0 may scale it.
                advantages = _spread(advantages, attention_mask) * _spread(vllm_is_ratio, attention_mask)
        output = loss.from_hidden(
            _input, lin_weight, selected_token_ids, bias=bias, temperature=self.temperature, advantages=advantages,
            **inputs,
        )  # fmt: skip
        clipped = _mean(output.metrics["clip_fraction"])
        if vllm_is_ratio is not None and self.loss_type in (*CLIPPED, "cispo"):
            clipped = self._clipped(output.logprobs, old_per_token_logps, attention_mask, signs)
        metrics = [clipped]
        if self.beta != 0.0:
            metrics.insert(0, _mean(output.metrics["kl"]) if loss.kl else torch.zeros_like(metrics[0]))
        return output.loss, tuple(metrics)

    def _reference(
        self,
        ids: Tensor,
        mask: Tensor,
        logprobs: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:
        """Return the reference's log-probs (B, T), or None if the loss reads none."""
        if not self.use_ref_model:
            if logprobs is not None or hidden is not None:
                raise ValueError("a reference was passed to a loss built with use_ref_model=False")
            return None
        if self.loss.kl is None:
            return None
        if logprobs is not None:
            return logprobs
        if hidden is None or weight is None:
            raise ValueError("use_ref_model=True needs ref_per_token_logps, or ref_input with ref_weight")
        with torch.no_grad():
            live = torch.where(mask != 0, ids, -100)
            return linear_token_logprobs(hidden, weight, live, bias=bias, temperature=self.temperature).logprobs

    @torch.no_grad()
    def _clipped(self, logprobs: Tensor | None, old: Tensor | None, mask: Tensor, advantages: Tensor) -> Tensor:
        """Return the share of clipped tokens."""
        # The sign of the unweighted advantage decides. In the weighted one a weight of 0 would hide it.
        assert logprobs is not None
        live = mask != 0
        log_ratio = torch.zeros_like(logprobs) if old is None else torch.where(live, logprobs - old, 0.0)
        if self.loss.ratio_level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True) / live.sum(1, keepdim=True).clamp(min=1)
        ratio, signs = log_ratio.exp(), _spread(advantages, mask)
        if self.loss_type == "cispo":
            clipped = (ratio > (self.loss.weight_high or 0.0)) & (signs > 0)
        else:
            low, high = 1.0 - (self.loss.clip_low or 0.0), 1.0 + (self.loss.clip_high or 0.0)
            clipped = ((ratio < low) & (signs < 0)) | ((ratio > high) & (signs > 0))
        return ((clipped & live).sum() / live.sum().clamp(min=1)).to(torch.float32)

    def _counts(self, mask: Tensor, num_items_in_batch: float | Tensor | None) -> dict[str, Any]:
        """Return the counts by which the loss divides its sums."""
        if self.loss_type not in OVER_ALL_RANKS:
            return {"n_sequences": max(mask.shape[0], 1)} if self.loss_type != "bnpo" else {}
        # The trainer averages gradients over the ranks, so each rank divides by its share of the total.
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if num_items_in_batch is None:
            total = (mask != 0).sum().to(torch.float32)
            if ranks > 1:
                dist.all_reduce(total)
        else:
            total = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
        return {"n_tokens": (total / ranks).clamp(min=1.0)}


def _check_level(loss_type: str, level: str) -> None:
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(
            f"importance_sampling_level='sequence' does not go with loss_type={loss_type!r}, whose ratio is per token "
            "(cispo, sapo) or already that of the sequence (vespo); use 'token'"
        )
    if level == "token" and loss_type == "luspo":
        raise ValueError("loss_type='luspo' is a loss of sequence ratios; use importance_sampling_level='sequence'")


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Return values (B,), (B, 1) or (B, T) as (B, T)."""
    if values.dim() == 1 and values.shape[0] == mask.shape[0]:
        values = values[:, None]
    if values.dim() != 2 or values.shape[0] != mask.shape[0] or values.shape[1] not in (1, mask.shape[1]):
        raise ValueError(
            f"advantages and vllm_is_ratio must be (B,), (B, 1) or (B, T) with (B, T)={tuple(mask.shape)}, "
            f"got {tuple(values.shape)}"
        )
    return values.expand(mask.shape)


def _with_vespo_weights(
    loss: PolicyLoss, ratio: Tensor, old_logprobs: Tensor | None, mask: Tensor
) -> tuple[PolicyLoss, Tensor]:
    """Return the loss and rollout log-probs that bring the given ratios into VESPO's sequence weight.

    Ratios per token enter as their product. A ratio per sequence, (B,) or (B, 1), enters once.
    """
    if old_logprobs is None:
        raise ValueError("vllm_is_ratio with loss_type='vespo' needs old_per_token_logps, which it is a ratio to")
    difference = _spread(ratio, mask).log()
    level = "token"
    if ratio.dim() == 1 or ratio.shape[1] == 1:
        level = "sequence_sum"
        # The correction sums over the tokens, so each gets an equal share of the sequence's log-ratio.
        difference = difference / (mask != 0).sum(1, keepdim=True).clamp(min=1)
    correction = RolloutCorrection(level=level, op="truncate", high=_VESPO_WEIGHT_MAX)
    return dataclasses.replace(loss, correction=correction), old_logprobs.detach() - difference


def _mean(metric: tuple[Tensor, Tensor]) -> Tensor:
    total, count = metric
    return (total / count.clamp(min=1)).to(torch.float32)
