"""One policy loss over its axes: every policy-gradient loss of the field is a value of `PolicyLoss`.

    loss = sum_t s_t [ keep_t w_t l(r_t, A_t) + kl_coef k_t ] - entropy_coef sum_t H_t / n_tokens

The formulas stand in `fastrl.reference`; this module holds the axes, checks them, brings the batch to flat tokens and
chooses the path to the vocabulary. Legend: B batch, T time, N tokens, S sequences, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.losses.layout import Layout
from fastrl.losses.output import LossOutput, shown
from fastrl.losses.policy_hidden import Batch, fused_from_hidden, with_path, with_tally
from fastrl.losses.policy_metrics import policy_metrics
from fastrl.losses.policy_presets import PRESETS, preset_fields
from fastrl.ops.dispatch import beside, choose, outside_graphs
from fastrl.ops.linear_token_logprobs import (
    check_head,
    check_restrictions,
    inverse_temperature,
    linear_token_logprobs,
    make_head,
)
from fastrl.ops.policy import fused_policy_terms
from fastrl.ops.policy_logits import policy_logits
from fastrl.ops.segments import segment_sum, sums_beside
from fastrl.ops.sparse_rows import Tally, counted
from fastrl.ops.token_logprobs import checked_rows, token_logprobs

RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum", "none")
SURROGATES = (
    "clip",
    "reinforce",
    "importance",
    "square",
    "nll",
    "dft",
    "clipped_weight",
    "masked_weight",
    "sapo",
    "vespo",
    "geometric",
    "divergence_tv",
    "divergence_tv_symmetric",
    "divergence_kl",
    "topr",
)
DIVERGENCES = ("divergence_tv", "divergence_tv_symmetric", "divergence_kl")
CLIPPED = ("clip", "geometric", *DIVERGENCES)
WEIGHTED = ("clipped_weight", "masked_weight", "topr", *DIVERGENCES)
RATIO_FREE = ("reinforce", "nll", "dft")
OWN_SEQUENCE_RATIO = ("vespo", "geometric")
AGGREGATES = ("token_mean", "sequence_mean", "sequence_sum", "constant", "token_sum", "prompt_mean")
# Numbers of one surrogate.
OWNERS = {
    **dict.fromkeys(("tau_pos", "tau_neg"), "sapo"),
    **dict.fromkeys(("k_pos", "k_neg", "lambda_pos", "lambda_neg"), "vespo"),
    "square_tau": "square",
}
KL_GRADIENTS = ("plain", "ratio_weighted", "straight_through", "straight_through_ratio")


@dataclass(frozen=True, kw_only=True, repr=False)
class RolloutCorrection:
    """Weights that correct for the gap between the inference engine and the trainer, w = pi_old / pi_rollout, detached.

    "truncate" clamps the weight to [low, high] (TIS), "mask" sets it to zero outside (MIS, IcePop), "gate" keeps the
    token weights where `statistic`, taken at `level`, lies inside [low, high]. Levels: token, the geometric mean over
    the sequence ("sequence"), the product over it ("sequence_sum"). The weight multiplies the policy term only; the
    denominator keeps every token. A NaN rollout log-prob counts as weight 1.

    Statistics of a token, d = log pi_old - log pi_rollout: "ratio" e^d; "tv" |pi_old - pi_rollout|; "binary_kl" the KL
    of the rollout to the trainer over (token, any other); "k1" -d, "k2" d^2/2, "k3" e^d - 1 - d, estimates of the same
    KL. Over a sequence d, or the statistic if it is not the ratio, is averaged ("sequence") or summed.
    """

    level: str = "token"
    op: str = "truncate"
    statistic: str = "ratio"
    low: float | None = None
    high: float | None = None
    log_weight_clamp: float | None = None
    batch_normalize: bool = False

    def __post_init__(self) -> None:
        checks.one_of("correction.level", self.level, ("token", "sequence", "sequence_sum"))
        checks.one_of("correction.op", self.op, ("truncate", "mask", "gate"))
        checks.one_of("correction.statistic", self.statistic, ("ratio", "tv", "binary_kl", "k1", "k2", "k3"))
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is not None:
                checks.plain_float(f"correction.{name}", value)
        # A ratio is positive: a cap below 0 would turn the sign of the policy term, one of 0 end it.
        if self.statistic == "ratio" and ((self.low or 0.0) < 0.0 or (self.high is not None and self.high <= 0.0)):
            raise ValueError(
                f"correction.low must be >= 0 and correction.high > 0 for the ratio, got {self.low} and {self.high}"
            )
        if self.low is None and self.high is None:
            raise ValueError("correction needs low, high or both: without a bound nothing is corrected")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"correction.low must be <= correction.high, got {self.low} > {self.high}")
        if self.op != "gate" and self.statistic != "ratio":
            raise ValueError(
                f"correction.statistic {self.statistic!r} needs op='gate'; {self.op!r} bounds the ratio itself"
            )
        if self.log_weight_clamp is not None:
            checks.plain_float("correction.log_weight_clamp", self.log_weight_clamp, low=0.0, open_low=True)

    def __repr__(self) -> str:
        return shown(self)

    def weights(
        self, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the detached weights, of the shape of `old_logprobs`; 1 outside the mask.

        Args:
            old_logprobs: (B, T), or (N,) with `cu_seqlens`: the trainer's own log-probs before the update.
            rollout_logprobs: same shape: the log-probs that the inference engine reported.
            mask: same shape, 0/1.
            cu_seqlens: (S+1,) offsets of packed sequences.
        """
        layout = Layout.of(old_logprobs.shape, old_logprobs.device, cu_seqlens, "old_logprobs")
        keep, _ = checks.keep_mask("mask", mask, layout.shape, layout.device)
        keep = keep.reshape(-1)
        old = torch.where(keep, layout.tokens("old_logprobs", old_logprobs), 0.0)
        rollout = torch.where(keep, layout.tokens("rollout_logprobs", rollout_logprobs).to(old.dtype), 0.0)
        return layout.restore(reference.correction_weights(self, old, rollout, keep, layout.lengths, segment_sum))


@dataclass(frozen=True, kw_only=True, repr=False)
class PolicyLoss:
    """A policy loss as a point on independent axes; `PolicyLoss.preset(name)` gives the losses of the field by name.

    Every invalid or contradictory combination raises `ValueError` at construction. Fields that a loss does not use
    must keep their default or be None.
    """

    ratio_level: str = "token"
    """Where the importance ratio lives: "token", "sequence" (geometric mean, GSPO), "sequence_token" (the same value,
    gradient per token), "sequence_sum" (product over the sequence, RLOO), "none"."""
    ratio_anchor: str = "old"
    """Denominator of the ratio: "old", "rollout", or "self" (the detached log-prob: ratio 1 with a gradient)."""
    log_ratio_clamp: float | None = None
    """Bound c of token log-ratios, clamped to [-c, c] with zero gradient outside (VESPO: at most 20)."""
    sequence_log_ratio_max: float | None = None
    """Upper clamp of the sequence's log-ratio."""
    surrogate: str = "clip"
    """l(r, A); the formulas are listed in `fastrl.reference.token_terms`."""
    clip_low: float | None = 0.2
    """Width of the clip below 1 (clip), of the log-ratio (geometric), bound of the divergence; None: open. With one
    bound alone, divergence_tv holds every token to it, whatever the sign of A."""
    clip_high: float | None = 0.2
    """The same above 1."""
    weight_low: float | None = None
    """Lower bound of the detached weight of clipped_weight, masked_weight, topr, divergence_* with logprob carrier."""
    weight_high: float | None = None
    """Upper bound of the same."""
    carrier: str | None = None
    """What divergence_* multiplies: "logprob" (with a detached weight) or "ratio"; None stands for "logprob"."""
    dual_clip: float | None = None
    """c > 1: for A < 0 the clip loss is at most -c A (arXiv 1912.09729)."""
    max_ratio: float | None = None
    """delta > 1 + clip_high: cap of the unclipped ratio (INTELLECT-2, arXiv 2505.07291)."""
    tau_pos: float | None = 1.0
    """SAPO temperature for A > 0."""
    tau_neg: float | None = 1.05
    """SAPO temperature for A <= 0."""
    k_pos: float | None = 2.0
    """VESPO exponent for A >= 0."""
    k_neg: float | None = 3.0
    """VESPO exponent for A < 0."""
    lambda_pos: float | None = 3.0
    """VESPO rate for A >= 0."""
    lambda_neg: float | None = 2.0
    """VESPO rate for A < 0."""
    square_tau: float | None = 0.1
    """tau of surrogate "square", which pulls tau times the log-ratio (of `ratio_level`) to A."""
    kl: str | None = None
    """KL estimate in the loss: None, "k1", "k2", "k3", "abs"."""
    kl_coef: float = 0.0
    """Its coefficient; 0 with an estimator set only measures."""
    kl_to: str | None = "ref"
    """The other policy of the KL: "ref", "old", "rollout"."""
    kl_gradient: str | None = "plain"
    """"plain", "ratio_weighted", "straight_through", "straight_through_ratio"; see `fastrl.reference.kl_estimate`."""
    kl_log_ratio_clamp: float | None = None
    """Bound of logp - logp_other inside the estimate."""
    kl_value_clamp: float | None = None
    """Bound of the estimate's value."""
    kl_value_clamp_order: str = "before"
    """With "ratio_weighted": whether `kl_value_clamp` bounds the estimate "before" it is multiplied by the ratio,
    or the product, "after" (NeMo-RL, slime): then a bounded term has no gradient."""
    kl_ratio_max: float | None = None
    """Cap of the ratio in "straight_through_ratio"."""
    kl_ratio_anchor: str | None = None
    """Denominator of the token's ratio in the KL term: "old", "rollout", "self"; None: the ratio of `ratio_level` to
    `ratio_anchor`, of which vespo and geometric have the token's alone."""
    kl_fraction: float | None = None
    """Share of the live tokens, those of largest covariance of advantage and log-prob, that carry the KL (KL-Cov)."""
    entropy_coef: float = 0.0
    """Coefficient c of the entropy bonus -c sum_t H_t / n_tokens, whatever `aggregate` is."""
    correction: RolloutCorrection | None = None
    """Train-inference correction of the policy term; for VESPO it joins the sequence weight, a sequence's once."""
    aggregate: str = "token_mean"
    """"token_mean", "sequence_mean", "sequence_sum", "constant", "token_sum", "prompt_mean"; all but "prompt_mean" are
    invariant to splitting the batch when `n_tokens` or `n_sequences` are the global counts."""
    constant: float | None = None
    """Length in the denominator of aggregate="constant" (Dr. GRPO): the longest completion allowed. None: the padded
    length T of the batch, as verl takes it, which then matters; refused for packed tokens."""
    denominator_eps: float = 0.0
    """Added to each length in aggregate="sequence_mean", as verl and OpenRLHF do (1e-8)."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for anything outside the axes."""
        for field in ("kl_to", "kl_gradient", *OWNERS):
            if getattr(self, field) is None:
                object.__setattr__(self, field, _DEFAULTS[field])
        if self.carrier is None and self.surrogate in DIVERGENCES:
            object.__setattr__(self, "carrier", "logprob")
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    def __repr__(self) -> str:
        return shown(self)

    def _check_choices(self) -> None:
        checks.one_of("ratio_level", self.ratio_level, RATIO_LEVELS)
        checks.one_of("ratio_anchor", self.ratio_anchor, ("old", "rollout", "self"))
        checks.one_of("surrogate", self.surrogate, SURROGATES)
        checks.one_of("carrier", self.carrier, (None, "logprob", "ratio"))
        checks.one_of("kl", self.kl, (None, "k1", "k2", "k3", "abs"))
        checks.one_of("kl_to", self.kl_to, ("ref", "old", "rollout"))
        checks.one_of("kl_gradient", self.kl_gradient, KL_GRADIENTS)
        checks.one_of("kl_value_clamp_order", self.kl_value_clamp_order, ("before", "after"))
        checks.one_of("kl_ratio_anchor", self.kl_ratio_anchor, (None, "old", "rollout", "self"))
        checks.one_of("aggregate", self.aggregate, AGGREGATES)
        if self.correction is not None and not isinstance(self.correction, RolloutCorrection):
            raise TypeError(f"correction must be a RolloutCorrection or None, got {type(self.correction).__name__}")

    def _check_numbers(self) -> None:
        positive = ("log_ratio_clamp", "sequence_log_ratio_max", "kl_log_ratio_clamp", "kl_value_clamp", "kl_ratio_max")
        for name in (*positive, "constant", "tau_pos", "tau_neg", "square_tau"):
            if getattr(self, name) is not None:
                checks.plain_float(name, getattr(self, name), low=0.0, open_low=True)
        for name in (
            "clip_low",
            "clip_high",
            "weight_low",
            "weight_high",
            "k_pos",
            "k_neg",
            "lambda_pos",
            "lambda_neg",
        ):
            if getattr(self, name) is not None:
                checks.plain_float(name, getattr(self, name), low=0.0)
        checks.plain_float("kl_coef", self.kl_coef, low=0.0)
        checks.plain_float("entropy_coef", self.entropy_coef)
        checks.plain_float("denominator_eps", self.denominator_eps, low=0.0)
        if self.surrogate == "clip" and self.clip_low is not None and self.clip_low > 1.0:
            raise ValueError(
                f"clip_low must be in [0, 1] for surrogate 'clip' (the ratio is positive), got {self.clip_low}"
            )
        if self.dual_clip is not None:
            checks.plain_float("dual_clip", self.dual_clip, low=1.0, open_low=True)
        if self.max_ratio is not None:
            floor = 1.0 + (self.clip_high or 0.0)
            checks.plain_float("max_ratio", self.max_ratio, low=floor, open_low=True)
        if self.kl_fraction is not None:
            checks.plain_float("kl_fraction", self.kl_fraction, low=0.0, high=1.0, open_low=True)
        if self.weight_low is not None and self.weight_high is not None and self.weight_low > self.weight_high:
            raise ValueError(f"weight_low must be <= weight_high, got {self.weight_low} > {self.weight_high}")

    def _check_combinations(self) -> None:
        unused = {
            "dual_clip": self.surrogate == "clip",
            "max_ratio": self.surrogate == "clip",
            "carrier": self.surrogate in DIVERGENCES,
            "weight_low": self.surrogate in WEIGHTED and self.carrier != "ratio",
            "weight_high": self.surrogate in WEIGHTED and self.carrier != "ratio",
            "constant": self.aggregate == "constant",
            "kl_log_ratio_clamp": self.kl is not None,
            "kl_value_clamp": self.kl is not None,
            "kl_ratio_max": self.kl_gradient == "straight_through_ratio",
            "kl_ratio_anchor": self.kl is not None and "ratio" in str(self.kl_gradient),
            "kl_fraction": self.kl is not None,
            "sequence_log_ratio_max": self.ratio_level in ("sequence", "sequence_token", "sequence_sum"),
        }
        for name, used in unused.items():
            if getattr(self, name) is not None and not used:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here: {_NEEDS[name]}")
        for name, owner in OWNERS.items():
            if getattr(self, name) != _DEFAULTS[name] and self.surrogate != owner:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here: it needs surrogate={owner!r}")
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) not in (None, _DEFAULTS[name]) and self.surrogate not in CLIPPED:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect here: it needs a surrogate among {CLIPPED}"
                )
        if self.kl is None and self.kl_coef != 0.0:
            raise ValueError(f"kl_coef={self.kl_coef} needs an estimator: kl='k1', 'k2', 'k3' or 'abs'")
        if self.kl is None and self.kl_gradient != "plain":
            raise ValueError(f"kl_gradient={self.kl_gradient!r} needs an estimator: kl='k1', 'k2', 'k3' or 'abs'")
        if self.kl_value_clamp_order == "after" and (
            self.kl_gradient != "ratio_weighted" or self.kl_value_clamp is None
        ):
            raise ValueError(
                "kl_value_clamp_order='after' has no effect here: it needs kl_gradient='ratio_weighted' and "
                "kl_value_clamp"
            )
        if self.denominator_eps != 0.0 and self.aggregate != "sequence_mean":
            raise ValueError(
                f"denominator_eps={self.denominator_eps} has no effect here: it needs aggregate='sequence_mean'"
            )
        ratio_free = (*RATIO_FREE, *OWN_SEQUENCE_RATIO)
        if self.ratio_level == "none" and self.surrogate not in ratio_free:
            raise ValueError(f"ratio_level='none' needs a surrogate among {ratio_free}, got {self.surrogate!r}")
        if (
            self.surrogate == "divergence_tv_symmetric"
            and (self.clip_high if self.clip_high is not None else self.clip_low) is None
        ):
            raise ValueError("surrogate='divergence_tv_symmetric' needs clip_high, the bound on |p - q|")
        weighted = "ratio" in str(self.kl_gradient) and self.kl_ratio_anchor is None
        if self.surrogate in OWN_SEQUENCE_RATIO and weighted and self.ratio_level not in ("token", "none"):
            raise ValueError(
                f"surrogate={self.surrogate!r} with kl_gradient={self.kl_gradient!r} needs ratio_level='token' or "
                f"'none', or kl_ratio_anchor: it forms a sequence ratio of its own; got {self.ratio_level!r}"
            )
        if self.surrogate in DIVERGENCES and self.ratio_level != "token":
            raise ValueError(f"surrogate={self.surrogate!r} needs ratio_level='token', got {self.ratio_level!r}")

    @classmethod
    def preset(cls, name: str, *, style: str | None = None, **fields: Any) -> PolicyLoss:
        """Return a loss of the field by name, with `fields` replacing single axes.

        Args:
            name: one of `PolicyLoss.presets()`.
            style: None for the paper's arithmetic, or a trainer's name where its arithmetic differs.
            fields: fields of `PolicyLoss`.

        Raises:
            ValueError: unknown name or style, listing the known ones; unknown or contradictory fields.
        """
        values = preset_fields(name, style, fields)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown field {', '.join(unknown)} of PolicyLoss; known: {', '.join(sorted(known))}")
        merged = {**values, **fields}
        if isinstance(merged.get("correction"), dict):
            merged["correction"] = RolloutCorrection(**merged["correction"])
        return cls(**merged)

    @classmethod
    def presets(cls) -> list[str]:
        """Return the names that `preset` knows."""
        return list(PRESETS)

    @property
    def couples_sequences(self) -> bool:
        """Whether a token's gradient depends on the log-probs of other tokens."""
        return (
            self.surrogate in OWN_SEQUENCE_RATIO
            or self.kl_fraction is not None
            or (self.ratio_level in ("sequence", "sequence_token", "sequence_sum") and not self._ratio_unused)
        )

    @property
    def _ratio_unused(self) -> bool:
        return self.surrogate in RATIO_FREE and self.kl_gradient in ("plain", "straight_through")

    @property
    def uses_entropy(self) -> bool:
        """Whether the entropy enters the loss."""
        return self.entropy_coef != 0.0

    def __call__(
        self,
        logprobs: Tensor,  # (B, T) or (N,)
        *,
        advantages: Tensor | None = None,  # (B,), (B, 1), (B, T), or packed (N,), (S,)
        mask: Tensor,  # (B, T) or (N,)
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        entropy: Tensor | None = None,
        n_tokens: float | Tensor | None = None,
        n_sequences: float | Tensor | None = None,
        selection: Tensor | None = None,
        group_ids: Tensor | None = None,
        scores: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LossOutput:
        """Return the loss of a batch of tokens, differentiable with respect to `logprobs` and `entropy`.

        Columns that trainers carry in every batch may be passed to every loss: `advantages`, `old_logprobs`,
        `ref_logprobs`, `rollout_logprobs`, `entropy`, `group_ids`, `n_tokens` and `n_sequences`. Their types and shapes
        are checked; a loss that has no use for one ignores it, or takes it for a metric, as said below. An argument
        that only one loss reads, `scores`, is refused elsewhere.

        Args:
            logprobs: (B, T) padded, or (N,) packed with `cu_seqlens`; nats.
            advantages: per sequence (B,), (B, 1), (S,) or per token (B, T), (N,); constants. "nll" and
                "dft" ignore them.
            mask: 0/1, bool, int or float; tokens outside cannot matter, whatever they hold.
            old_logprobs: log-probs of the policy that the ratio is taken to; None: on-policy, the detached `logprobs`.
                Losses without a ratio take them for the metric approx_kl_old. Constants, as are those that follow.
            ref_logprobs: of the reference policy, for kl_to="ref"; ignored without such a KL.
            rollout_logprobs: as the inference engine reported them, for anchors and corrections that name them; else
                for the metrics rollout_kl and rollout_abs_diff.
            entropy: per token, for entropy_coef != 0 (and as a metric).
            n_tokens, n_sequences: global counts in the denominator, replacing those counted from the mask (live tokens;
                sequences with a live token), so that micro-batches and ranks add up. Aggregates over sequences
                ignore `n_tokens` (but for an entropy bonus), those over tokens `n_sequences`, "prompt_mean" both.
            selection: 0/1 keep-mask on the policy term, per token or per sequence; the denominator stays.
            group_ids: (B,) prompt of each sequence, for aggregate="prompt_mean"; ignored by the others.
            scores: (B,) or per token, for surrogate="topr" alone: the token is positive where the score is > 0; without
                it, where the advantage is.
            cu_seqlens: (S+1,) offsets of packed sequences.

        Returns:
            `LossOutput`; metrics are (sum, count) tensors on the device, to be added over micro-batches and divided
            once.
        """
        inputs = {
            "advantages": advantages, "mask": mask, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
            "rollout_logprobs": rollout_logprobs, "n_tokens": n_tokens, "n_sequences": n_sequences,
            "selection": selection, "group_ids": group_ids, "scores": scores, "cu_seqlens": cu_seqlens,
        }  # fmt: skip
        return self._of_logprobs(logprobs, entropy, inputs, "auto")

    def _of_logprobs(
        self, logprobs: Tensor, entropy: Tensor | None, inputs: dict[str, Any], backend: str
    ) -> LossOutput:
        """Return what the call returns, beside vocabulary rows of a chosen backend."""
        checks.float_tensor("logprobs", logprobs)
        layout = Layout.of(logprobs.shape, logprobs.device, inputs.pop("cu_seqlens", None))
        batch = self._batch(layout, _wide(logprobs.dtype), **_named_inputs(inputs))
        flat_entropy = None if entropy is None else layout.tokens("entropy", checks.float_tensor("entropy", entropy))
        if self.uses_entropy and flat_entropy is None:
            raise ValueError(f"entropy_coef={self.entropy_coef} needs entropy=, per token")
        return self._evaluate(layout, batch, layout.tokens("logprobs", logprobs), flat_entropy, backend)

    def from_logits(
        self,
        logits: Tensor,  # (B, T, V) or (N, V)
        labels: Tensor,  # (B, T) or (N,)
        *,
        temperature: float | Tensor | None = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        backend: str = "auto",
        inplace: bool = False,
        allowed: Tensor | None = None,  # (..., V) bool, (..., ceil(V/32)) int32 or (..., K) int64
        logits_rounding: str | None = None,
        **inputs: Any,
    ) -> LossOutput:
        """Return the loss from logits aligned with `labels`; `inputs` are those of the call, without `entropy`.

        Masked rows never enter the log-prob: their labels may hold any id and their logits NaN. The gradient is with
        respect to `logits`, in their dtype, for any upstream factor, once (`create_graph=True` is refused).

        Where a token's gradient depends on its own row alone, it is formed here and the backward hands it out: the
        only memory of the size of the logits is the gradient's, and the logits are not kept. Losses that couple the
        tokens of a sequence or of the batch (a sequence ratio, VESPO, GMPO, KL-Cov, a correction without
        `old_logprobs`) form it in the backward, and so do `allowed` and `logits_rounding`, float16 logits, whose
        gradient must see the loss scale before it is rounded, and graphs of `torch.compile`, whose backward cannot
        hand out what the forward made. Without a gradient to form, none is.

        Args:
            logits: (B, T, V) or (N, V), of any strides: a slice is not copied.
            labels: (B, T) or (N,) int64 or int32.
            temperature, logit_scale, softcap, backend: as in `token_logprobs`.
            inplace: write the gradient over the logits, which are lost: no memory of their size is taken at all. Their
                version is raised, so that an earlier operation whose backward needs them raises there as PyTorch does.
                The memory is the gradient's from then on and must not be written to. Ignored where no gradient is
                wanted. Inside `torch.compile` on Triton only: half the memory of a graph that keeps the logits for the
                backward, for one more write of the logits' size.
            allowed, logits_rounding: as in `token_logprobs`, for rollout log-probs over the tokens that a sampler left,
                or of rounded logits; so ratio and entropy are those of what was sampled from. Not with `inplace`.
            inputs: `advantages`, `mask`, `old_logprobs`, ...: see the call.

        Raises:
            ValueError, TypeError, RuntimeError: as `token_logprobs` and the call do; with `inplace`, for losses, dtypes
                and options whose gradient is formed in the backward, leaves and views of leaves that require grad, rows
                that overlap or whose entries are apart, and inference tensors.
        """
        _check_inputs(inputs)
        masked = checks.masked_labels(labels, inputs["mask"], logits, "logits")
        options = {
            "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "backend": backend,
            "ignore_index": checks.MASKED_LABEL,
        }  # fmt: skip
        restricted = {"allowed": allowed, "logits_rounding": logits_rounding}
        changed = [name for name, x in restricted.items() if x is not None]
        reason = self._why_in_backward(logits, inputs, changed, inplace, backend)
        if inplace and reason is not None:
            raise ValueError(f"inplace=True needs the gradient to be formed in the forward, but {reason}")
        wanted = torch.is_grad_enabled() and isinstance(logits, Tensor) and logits.requires_grad
        if reason is not None or not wanted:
            result = token_logprobs(logits, masked, **options, **restricted)
            return self._of_logprobs(result.logprobs, result.entropy, inputs, choose(backend, logits.device).backend)
        rows = checked_rows(logits, masked, **options)
        layout = Layout.of(masked.shape, masked.device, inputs.pop("cu_seqlens", None), "labels")
        batch = self._batch(layout, _wide(logits.dtype), **_named_inputs(inputs))
        columns = self.columns(layout, batch, None, sums_beside(rows.backend))
        loss, logprobs, entropy, terms = policy_logits(self, logits, rows, columns, layout.lengths, inplace=inplace)
        metrics = policy_metrics(self, batch, logprobs, entropy, columns, terms)
        return LossOutput(loss, metrics, layout.restore(logprobs), layout.restore(entropy))

    def _why_in_backward(
        self, logits: Any, inputs: dict[str, Any], restricted: list[str], inplace: bool, backend: str
    ) -> str | None:
        """Return why the gradient cannot be formed in the forward, or None; `restricted`: options that change rows."""
        if restricted:
            return f"for {' and '.join(f'{name}=' for name in restricted)} copies of the rows are prepared tile by tile"
        if self.couples_sequences or self.ratio_level not in ("token", "none"):
            return "this loss couples the tokens of a sequence or of the batch"
        if self.correction is not None and inputs.get("old_logprobs") is None:
            return "correction without old_logprobs= needs the log-probs of the whole batch"
        if isinstance(logits, Tensor) and logits.dtype == torch.float16:
            return "a float16 gradient must see the loss scale before it is rounded"
        if not torch.compiler.is_compiling():
            return None
        if not inplace:
            return "the backward of a graph cannot hand out what its forward made, and scaling that costs more"
        if isinstance(logits, Tensor) and choose(backend, logits.device).backend != "triton":
            return "inside torch.compile only the Triton kernel writes over the logits"
        return None

    @outside_graphs
    def from_hidden(
        self,
        hidden: Tensor,  # (B, T, D) or (N, D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (B, T) or (N,)
        *,
        bias: Tensor | None = None,  # (V,)
        temperature: float | Tensor | None = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        chunk_tokens: int | None = None,
        tail_mass: float = 0.0,
        tp_group: Any = None,
        backend: str = "auto",
        allowed: Tensor | None = None,
        logits_rounding: str | None = None,
        **inputs: Any,
    ) -> LossOutput:
        """Return the loss from hidden states and the LM head, without the logits of more than one chunk of tokens.

        The gradient is formed in the forward: 3 GEMM units (2 with a frozen head), chunk by chunk, or for a loss that
        couples the tokens of a sequence in blocks of whole sequences; a sequence longer than 4 chunks has its logits
        formed twice (4 units). `metrics["path/gemm_units"]` says what ran, as the mean over live tokens.
        With `tail_mass` > 0 only rows whose gradient has no short list within that bound take the two GEMMs of the
        gradient (see `linear_token_logprobs`); `sparse/rows` and `sparse/left_max` then say how many did not, and the
        largest mass left out. A correction without `old_logprobs` and KL-Cov form the gradient of a trainable head in
        the backward, which fills these two in, and count every row in `path/gemm_units`.
        `LossOutput.logprobs` and `.entropy` are detached. The gradient is with respect to `hidden`, `weight` and
        `bias`, for any upstream factor; a second backward (`retain_graph=True`) forms it anew, to the same bits.
        Autocast changes nothing: states and head keep their dtypes and meet in the wider one. Tokens outside the mask
        cost nothing, tokens whose gradient is zero 1 unit; what a GPU's host waits for to know their numbers stands in
        `fastrl.ops.linear_token_logprobs`.

        `allowed` and `logits_rounding` are those of `linear_token_logprobs`, for rollout log-probs over the tokens that
        a sampler left, or of rounded logits; so `logprobs`, ratio and entropy are those of what was sampled from.

        Inside `torch.compile` the call is a graph break, which `fullgraph=True` refuses: how many chunks run depends on
        the data. `linear_token_logprobs` goes into a graph.

        Extra memory in bytes: C V 4 for the logits of a chunk of C tokens (up to 4 chunks where the loss couples the
        tokens of a sequence), N D for the gradient of the hidden states and V D 4 for that of the head; a head of half
        precision has its gradient summed in float32 and cast when the logits are gone: V D 2 more, or nothing where the
        logits were larger. On a GPU such a head takes C V 2 + 16384 D 4 beside the logits, for operands and products.
        The backward scales the gradients where they are and adds nothing. Those of float16 wait for it in float32, N D
        4 and V D 4, as the loss scale must come before the rounding; it then takes N D 2 and V D 2 for what it returns.
        """
        _check_inputs(inputs)
        masked = checks.masked_labels(labels, inputs["mask"], hidden, "hidden")
        trains = [torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in (hidden, weight, bias)]
        frozen = not any(trains[1:])
        keep_units = not self.uses_entropy
        # A correction without old log-probs takes the current ones, and KL-Cov ranks the whole batch: log-probs first,
        # as for a head whose rows are spread over ranks.
        needs_all = self.kl_fraction is not None or (self.correction is not None and inputs.get("old_logprobs") is None)
        if tp_group is not None or needs_all or (self.couples_sequences and frozen and not self.uses_entropy):
            tally = Tally(hidden.device) if tail_mass and any(trains) and isinstance(hidden, Tensor) else None
            with counted(tally):
                result = linear_token_logprobs(
                    hidden, weight, masked, bias=bias, temperature=temperature, logit_scale=logit_scale,
                    softcap=softcap, ignore_index=checks.MASKED_LABEL, chunk_tokens=chunk_tokens, tail_mass=tail_mass,
                    tp_group=tp_group, keep_units=keep_units, backend=backend, allowed=allowed,
                    logits_rounding=logits_rounding,
                )  # fmt: skip
            chosen = choose(backend, hidden.device).backend
            output = self._of_logprobs(result.logprobs, result.entropy, inputs, chosen)
            again = any(trains) and not (frozen and keep_units and not self.uses_entropy)
            kept = trains[0] and frozen and keep_units
            output = output if tally is None else with_tally(output, tally)
            return with_path(output, 1.0 + kept + again * (1.0 + trains[0] + trains[1]))
        hidden, weight, masked, bias = check_head(hidden, weight, masked, bias, checks.MASKED_LABEL)
        options = {"chunk_tokens": chunk_tokens, "tail_mass": tail_mass, "tp_group": tp_group, "backend": backend}
        head = make_head(hidden, logit_scale, softcap, checks.MASKED_LABEL, **options)
        layout = Layout.of(masked.shape, masked.device, inputs.pop("cu_seqlens", None), "labels")
        batch = self._batch(layout, _wide(hidden.dtype), **_named_inputs(inputs))
        inverse = inverse_temperature(temperature, masked, hidden)
        sets, rounding = check_restrictions(allowed, logits_rounding, masked, weight.shape[0], head)
        return fused_from_hidden(self, layout, batch, hidden, weight, bias, masked, inverse, head, sets, rounding)

    def _batch(self, layout: Layout, dtype: torch.dtype, **inputs: Any) -> Batch:
        """Return the batch as flat columns, or raise for inputs that the loss needs or that do not fit."""
        mask, poison = checks.keep_mask("mask", inputs["mask"], layout.shape, layout.device)
        flat: dict[str, Tensor | None] = {}
        for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
            value = inputs[name]
            flat[name] = (
                None if value is None else layout.tokens(name, checks.float_tensor(name, value)).detach().to(dtype)
            )
        self._check_needed(layout, inputs)
        advantages = inputs["advantages"]
        if advantages is None:
            spread = torch.ones(layout.n_tokens, dtype=dtype, device=layout.device)
        else:
            checks.float_tensor("advantages", advantages)
            spread = layout.tokens_or_sequences("advantages", advantages.detach()).to(dtype)
        if poison is not None:
            spread = spread + poison.to(dtype)
        selection = inputs["selection"]
        if selection is not None:
            selection = layout.tokens_or_sequences(
                "selection", checks.keep_mask("selection", selection, selection.shape, layout.device)[0]
            )
        positive = None
        if self.surrogate == "topr":
            scores = inputs["scores"]
            positive = spread > 0 if scores is None else layout.tokens_or_sequences("scores", scores) > 0
        group_ids = None if inputs["group_ids"] is None else layout.sequences("group_ids", inputs["group_ids"])
        checks.count("n_tokens", inputs["n_tokens"], mask)
        checks.count("n_sequences", inputs["n_sequences"], mask)
        return Batch(
            advantages=spread,
            mask=mask.reshape(-1),
            selection=selection,
            positive=positive,
            group_ids=group_ids,
            n_tokens=inputs["n_tokens"],
            n_sequences=inputs["n_sequences"],
            **flat,
        )

    def _check_needed(self, layout: Layout, inputs: dict[str, Any]) -> None:
        if inputs["advantages"] is None and self.surrogate not in ("nll", "dft"):
            raise ValueError(f"surrogate={self.surrogate!r} needs advantages=")
        if self.kl is not None and self.kl_to == "ref" and inputs["ref_logprobs"] is None:
            measured = ", also to measure it with kl_coef=0" if self.kl_coef == 0.0 else ""
            raise ValueError(
                f"kl={self.kl!r} with kl_to='ref' needs ref_logprobs={measured}; kl=None leaves the KL out"
            )
        if inputs["scores"] is not None and self.surrogate != "topr":
            raise ValueError(
                f"scores= is read by surrogate='topr' alone and would change nothing with {self.surrogate!r}: "
                "leave it out"
            )
        uses_rollout = self.ratio_anchor == "rollout" or self.kl_ratio_anchor == "rollout"
        uses_rollout = uses_rollout or self.correction is not None or (self.kl is not None and self.kl_to == "rollout")
        if uses_rollout and inputs["rollout_logprobs"] is None:
            raise ValueError("rollout_logprobs= is needed by the correction, ratio_anchor or kl_to of this loss")
        if self.aggregate == "constant" and self.constant is None and layout.packed:
            raise ValueError("aggregate='constant' of packed tokens needs constant=, the longest completion allowed")
        if self.aggregate == "prompt_mean" and inputs["group_ids"] is None:
            raise ValueError("aggregate='prompt_mean' needs group_ids=, the prompt of each sequence")

    def _evaluate(
        self,
        layout: Layout,
        batch: Batch,
        logprobs: Tensor,
        entropy: Tensor | None,
        backend: str,
        with_metrics: bool = True,
    ) -> LossOutput:
        """Return the loss from flat log-probs: plain PyTorch, or the fused kernel where it runs."""
        dtype, sums = _wide(logprobs.dtype), sums_beside(backend)
        live = torch.where(batch.mask, logprobs.to(dtype), 0.0)
        live_entropy = None if entropy is None else torch.where(batch.mask, entropy.to(dtype), 0.0)
        columns = self.columns(layout, batch, live, sums)
        columns = reference.pooled_columns(self, live, columns, batch.mask, layout.lengths, sums)
        terms = fused_policy_terms(self, live, live_entropy, columns, backend=beside(backend))
        loss = reference.total(terms.contribution, layout.lengths, sums)
        if not with_metrics:
            return LossOutput(loss, {}, None, None)
        metrics = policy_metrics(
            self, batch, live.detach(), None if live_entropy is None else live_entropy.detach(), columns, terms
        )
        kept = None if live_entropy is None else layout.restore(live_entropy.detach())
        return LossOutput(loss, metrics, layout.restore(live.detach()), kept)

    def columns(
        self, layout: Layout, batch: Batch, live: Tensor | None, sums: reference.SegmentSum
    ) -> reference.TokenColumns:
        """Return the columns of the token arithmetic; `live` are the log-probs, where the columns depend on them."""
        kl_tokens = None
        if self.kl_fraction is not None:
            assert live is not None
            kl_tokens = reference.top_covariance(live.detach(), batch.advantages, batch.mask, self.kl_fraction)
        return reference.policy_columns(
            self,
            advantages=batch.advantages,
            mask=batch.mask,
            lengths=layout.lengths,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            selection=batch.selection,
            positive=batch.positive,
            kl_tokens=kl_tokens,
            group_ids=batch.group_ids,
            n_tokens=batch.n_tokens,
            n_sequences=batch.n_sequences,
            constant=self.constant if self.constant is not None else layout.shape[-1],
            logprobs=None if live is None else live.detach(),
            sums=sums,
        )


def loss_value(
    spec: PolicyLoss,
    logprobs: Tensor,  # (B, T) or (N,)
    *,
    cu_seqlens: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """Return the loss of `spec(logprobs, ...)` without its metrics, which cost as much again, for callers with others.

    `inputs` are those of the call, without `entropy`.
    """
    _check_names(inputs)
    checks.float_tensor("logprobs", logprobs)
    layout = Layout.of(logprobs.shape, logprobs.device, cu_seqlens)
    batch = spec._batch(layout, _wide(logprobs.dtype), **_named_inputs(inputs))
    flat = layout.tokens("logprobs", logprobs)
    return spec._evaluate(layout, batch, flat, None, "auto", with_metrics=False).loss


_INPUTS = (
    "advantages", "mask", "old_logprobs", "ref_logprobs", "rollout_logprobs",
    "n_tokens", "n_sequences", "selection", "group_ids", "scores",
)  # fmt: skip


def _named_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs.get(name) for name in _INPUTS}


def _check_names(inputs: dict[str, Any]) -> None:
    known = (*_INPUTS, "cu_seqlens")
    if unknown := sorted(set(inputs) - set(known)):
        raise TypeError(f"unexpected argument {', '.join(unknown)}; known: {', '.join(known)}")


def _check_inputs(inputs: dict[str, Any]) -> None:
    if "entropy" in inputs:
        raise TypeError("entropy= is computed here from the logits; pass it only to the loss on log-probs")
    _check_names(inputs)
    if inputs.get("mask") is None:
        raise TypeError("mask= is needed: 1 for tokens that count")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PolicyLoss)}
_NEEDS = {
    "dual_clip": "it needs surrogate='clip'",
    "max_ratio": "it needs surrogate='clip'",
    "carrier": f"it needs a surrogate among {DIVERGENCES}",
    "weight_low": f"it needs a surrogate among {WEIGHTED}, and carrier='logprob' for the divergences",
    "weight_high": f"it needs a surrogate among {WEIGHTED}, and carrier='logprob' for the divergences",
    "constant": "it needs aggregate='constant'",
    "kl_log_ratio_clamp": "it needs kl='k1', 'k2', 'k3' or 'abs'",
    "kl_value_clamp": "it needs kl='k1', 'k2', 'k3' or 'abs'",
    "kl_ratio_max": "it needs kl_gradient='straight_through_ratio'",
    "kl_ratio_anchor": "it needs kl_gradient='ratio_weighted' or 'straight_through_ratio'",
    "kl_fraction": "it needs kl='k1', 'k2', 'k3' or 'abs'",
    "sequence_log_ratio_max": "it needs ratio_level='sequence', 'sequence_token' or 'sequence_sum'",
}
