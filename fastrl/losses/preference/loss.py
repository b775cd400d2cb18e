"""Preference losses: DPO and its relatives as values of one frozen dataclass.

    scores -> transform -> feature -> z = sign (beta feature - shift) -> link -> mean      (preference_terms.py)

Everything after the sums over tokens is one number per completion: it is computed in float64 (where the device has it)
and returned in float32, or float64 for float64 inputs. Masked positions are removed by selection.

Legend: P pairs, B rows, T time, N tokens, D hidden, V vocabulary. A batch of pairs has 2P rows: the chosen ones first,
then the rejected ones, in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl import checks
from fastrl.losses.output import LossOutput, shown, with_path, with_sparse_stats
from fastrl.losses.preference.checks import validate
from fastrl.losses.preference.fused import PreferenceInputs, fused_preference, policy_rows
from fastrl.losses.preference.presets import ALIASES, PRESETS, preset_fields
from fastrl.losses.preference.rows import (
    Counts,
    PairRows,
    check_like,
    check_one_reference,
    check_rows,
    checked_lengths,
    halved,
    kl_reference_point,
    pair_rows,
)
from fastrl.losses.preference.terms import (
    BATCH_FEATURES,
    F_DIVERGENCES,
    FEATURES,
    LINKS,
    SCORE_EXP_LIMIT,
    SQUARED_EXP_LIMIT,
    Scores,
    Term,
    alphapo,
    identity,
    log_odds,
)
from fastrl.losses.scalars import (
    cast_metrics,
    choose,
    constant,
    divisor,
    live,
    masked_mean,
    result_dtype,
    scalar_like,
    wide,
)
from fastrl.ops import linear_token_logprobs, token_logprobs
from fastrl.ops.sparse_rows import SparseStats, collect_sparse_stats


@dataclass(frozen=True, repr=False)
class PreferenceLoss:
    """A preference loss, put together from parts; `PreferenceLoss.preset(name, ...)` gives the published ones.

    Callable on sequence log-probs (`loss(...)`), per-token log-probs (`from_logprobs`), logits (`from_logits`) or
    hidden states and the head (`from_hidden`). Gradients are with respect to the policy's numbers only. Losses are
    means over pairs (over rows for kto, apo_zero_unpaired, bco). Summed over any split into micro-batches they are the
    same when `n_pairs` (and `n_tokens`, for an NLL over tokens) is the global count; except aot and aot_unpaired,
    which sort the batch, and bco without a given baseline.

    Raises:
        ValueError: when the object is built with options that contradict each other or that it would not use.
    """

    name: str = "sigmoid"
    """For messages; what the loss computes is in the other fields."""
    terms: tuple[Term, ...] = (Term("margin", "logistic"),)
    """What is summed; see `preference_terms`."""
    beta: float = 0.1
    """Scale of the features, > 0."""
    smoothing: str | None = "conservative"
    """How `label_smoothing` e enters: "conservative" (1-e) link(z) + e link(-z), "robust" ((1-e) link(z) - e
    link(-z)) / (1-2e), "target" (exo), None: not at all."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round."""
    margin: float = 0.0
    """Target margin (SimPO's gamma): z = beta feature - margin."""
    f_divergence: str = "reverse_kl"
    """"reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence": the transform of the log-ratio."""
    alpha: float | None = None
    """Order of the alpha divergence (None: 0.5); with reference=False AlphaPO's alpha (None or 0.0: log-probs)."""
    tau: float | None = None
    """Modulation temperature of discopop."""
    reduce: str = "sum"
    """"sum" or "mean" over the tokens of a completion, before everything else."""
    odds: bool = False
    """Scores are log-odds of the mean log-prob."""
    reference: bool = True
    """Whether the reference's log-prob is subtracted."""
    score_normalise: str | None = None
    """"length": transformed scores are divided by the completion's length."""
    length_desensitisation: float | None = None
    """LD-DPO's alpha: weight of the tokens beyond the shorter completion's length (arXiv 2409.06411)."""
    weighting: str | None = None
    """"wpo": pairs are weighted by exp(mean_t(logp - log sum p^2)) of both rows, detached (arXiv 2406.11827, eq. 2)."""
    sft_coef: float = 0.0
    """Weight of the NLL of the chosen rows."""
    sft_normalise: str | None = None
    """NLL as the mean over pairs of the sum (None) or of the mean ("length") over tokens, or as one mean over all
    chosen tokens ("tokens")."""
    sft_optional: bool = False
    """Whether calls on sequence log-probs without lengths, where no NLL over tokens can be known, leave it out
    (cpo and orpo as presets) instead of raising."""
    desirable_weight: float = 1.0
    """Weight of rows whose label is true."""
    undesirable_weight: float = 1.0
    """Weight of rows whose label is false."""
    shift: str | None = None
    """What is subtracted from the rows' scores: "reference_point" (kto; without a given one as the next),
    "paired_mean": the positive part of the mean score of the rows with the other label, its gradient kept, or
    "baseline" (bco)."""
    components: tuple[tuple[PreferenceLoss, float], ...] = ()
    """A weighted sum of other losses, made by `mixture`."""

    def __repr__(self) -> str:
        return shown(self)

    def __post_init__(self) -> None:
        validate(self)

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def presets(cls) -> list[str]:
        """Return the names `preset` knows."""
        return list(PRESETS)

    @classmethod
    def preset(cls, name: str, *, style: str | None = None, **overrides: Any) -> PreferenceLoss:
        """Return the published loss `name`, with `overrides` for any field.

        `fastrl.losses.preference.presets.describe(name)` prints its formula, paper, fields and trainers.

        Args:
            name: one of `presets()`.
            style: None for the preset itself, or a trainer that has the loss, for its arithmetic and defaults: "ipo"
                averages over the length in "trl" and sums in "openrlhf" and "roll"; "kto" always takes the other rows'
                mean as reference point in "openrlhf".
            overrides: fields. `gamma` is `margin`, `ld_alpha` is `length_desensitisation`, `nll_coef` is `sft_coef`,
                `use_weighting=True` is `weighting="wpo"`; `alpha=None` and `tau=None` keep the preset's.

        Raises:
            ValueError: unknown name, style or field, or a combination that the loss does not have.
        """
        fields = preset_fields(name, style)
        given = _fields_of(overrides)
        if "sft_coef" in given:
            fields["sft_optional"] = False
        return cls(**(fields | given))

    @classmethod
    def mixture(cls, parts: Sequence[tuple[str | PreferenceLoss, float]], **shared: Any) -> PreferenceLoss:
        """Return the weighted sum of several losses (MPO, arXiv 2411.10442).

        Args:
            parts: (preset name or PreferenceLoss, weight).
            shared: fields for the parts given by name. `beta`, `length_desensitisation` and `weighting` go to all; any
                other one to those that have a use for it, at least one.
        """
        given = _fields_of(shared)
        if "sft_coef" in given:
            raise ValueError("sft_coef does not go with a mixture; add ('sft', weight) to the parts")
        common = {k: v for k, v in given.items() if k in ("beta", "length_desensitisation", "weighting")}
        unused = set(given) - set(common)
        components = []
        for part, weight in parts:
            if isinstance(part, PreferenceLoss):
                components.append((part, float(weight)))
                continue
            loss = cls.preset(part, **common)
            for field in sorted(set(given) - set(common)):
                try:
                    loss = dataclasses.replace(loss, **{field: given[field]})
                except ValueError:
                    continue
                unused.discard(field)
            components.append((loss, float(weight)))
        if not components:
            raise ValueError("a mixture needs at least one part, got none")
        if unused:
            raise ValueError(f"no part of the mixture has a use for {', '.join(sorted(unused))}")
        common.setdefault("beta", components[0][0].beta)
        name = " + ".join(f"{weight:g} {loss.name}" for loss, weight in components)
        reference = any(loss.reads_reference for loss, _ in components)
        return cls(name=name, terms=(), components=tuple(components), reference=reference, **common)

    @property
    def unpaired(self) -> bool:
        """Whether the loss is of single rows with a label."""
        return bool(self.terms) and self.terms[0].feature == "label"

    @property
    def reads_reference(self) -> bool:
        """Whether the loss needs the reference's log-probs."""
        if self.components:
            return any(loss.reads_reference for loss, _ in self.components)
        return self.reference and bool(self.terms)

    @property
    def couples_pairs(self) -> bool:
        """Whether a pair's gradient depends on the other pairs of the batch."""
        parts = [loss for loss, _ in self.components] or [self]
        return any(term.feature in BATCH_FEATURES for part in parts for term in part.terms)

    # --- entry points -----------------------------------------------------------------------------------------------

    def __call__(
        self,
        chosen_logps: Tensor,  # (P,)
        rejected_logps: Tensor,  # (P,), or any number of rows for losses of single rows
        ref_chosen_logps: Tensor | None = None,  # (P,)
        ref_rejected_logps: Tensor | None = None,  # (P,)
        *,
        chosen_lengths: Tensor | None = None,  # (P,)
        rejected_lengths: Tensor | None = None,  # (P,)
        reference_point: float | Tensor | None = None,
        baseline: float | Tensor | None = None,
        n_pairs: float | Tensor | None = None,
        n_tokens: float | Tensor | None = None,
    ) -> LossOutput:
        """Return the loss of sequence log-probs.

        With lengths the log-probs are sums over tokens, and the losses that average (ipo, sigmoid_norm, simpo, alphapo,
        orpo) divide by them. Without lengths the numbers are taken as they are: already averaged for those losses.
        The NLL of cpo and orpo is added when lengths are given.

        Args:
            chosen_logps: log-probs of the chosen (or desirable) completions; rejected_logps likewise.
            ref_chosen_logps: the reference's, and ref_rejected_logps; needed unless the loss is reference-free.
            chosen_lengths: tokens of each completion, and rejected_lengths.
            reference_point: kto's z0, in log-prob units, detached; the paper's is >= 0. None: the positive part of the
                mean score of the rows with the other label, its gradient kept, as OpenRLHF has it.
            baseline: bco's delta, in reward (beta log-ratio) units, detached. None: the mean reward of these rows.
            n_pairs: the global number of pairs (rows), for micro-batches and ranks; n_tokens that of chosen tokens.

        Raises:
            ValueError: shapes that differ, a missing or unused reference, inputs that the loss does not use.
        """
        tensors = {
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "ref_chosen_logps": ref_chosen_logps,
            "ref_rejected_logps": ref_rejected_logps,
        }
        check_rows(tensors, same=not self.unpaired)
        self._check_reference("ref_chosen_logps and ref_rejected_logps", ref_chosen_logps, ref_rejected_logps)
        dtype = result_dtype(chosen_logps)
        chosen, rejected = wide(chosen_logps), wide(rejected_logps)
        ref_chosen, ref_rejected = constant(ref_chosen_logps), constant(ref_rejected_logps)
        if self.unpaired:
            if chosen_lengths is not None or rejected_lengths is not None:
                raise ValueError(f"lengths are not used by the loss {self.name!r}; leave them out")
            assert ref_chosen is not None
            assert ref_rejected is not None
            scores = torch.cat([chosen - ref_chosen, rejected - ref_rejected])
            labels = torch.arange(scores.numel(), device=scores.device) < chosen.numel()
            shift = self._shift(scores, labels, reference_point, baseline)
            return self._of_rows(scores, torch.cat([chosen, rejected]).detach(), labels, shift, n_pairs, dtype)
        self._check_pairs_only(reference_point=reference_point, baseline=baseline)
        for field in ("length_desensitisation", "weighting"):
            if getattr(self, field) is not None:
                raise ValueError(f"{field} needs the tokens: call from_logprobs, from_logits or from_hidden")
        over_w, over_l, tokens = checked_lengths(chosen_lengths, rejected_lengths, chosen)
        rows = PairRows(
            chosen, rejected, ref_chosen, ref_rejected, over_w, over_l, None if over_w is None else chosen, tokens
        )
        return self._of_pairs(rows, n_pairs, n_tokens, dtype)

    def from_logprobs(
        self,
        logprobs: Tensor,  # (2P, T), or (B, T) for losses of single rows
        mask: Tensor,  # the same shape, 1 on the tokens of the completion
        ref_logprobs: Tensor | None = None,  # the same shape
        *,
        log_sum_squared_probs: Tensor | None = None,  # (2P, T) log sum_v p_v^2, for weighting="wpo"
        labels: Tensor | None = None,  # (B,) bool: desirable or not, for losses of single rows
        kl_logprobs: Tensor | None = None,  # (B', T') log-probs of mismatched completions, for kto's reference point
        kl_ref_logprobs: Tensor | None = None,  # (B', T')
        kl_mask: Tensor | None = None,  # (B', T'), None: they are 0 outside the completion
        reference_point: float | Tensor | None = None,
        baseline: float | Tensor | None = None,
        n_pairs: float | Tensor | None = None,
        n_tokens: float | Tensor | None = None,
    ) -> LossOutput:
        """Return the loss of per-token log-probs.

        Rows are the chosen completions, then the rejected ones; for kto, apo_zero_unpaired and bco any rows, with
        `labels`. kto takes its reference point as for `loss(...)`, or as max(0, mean(sum kl_logprobs - sum
        kl_ref_logprobs)), detached, from completions of other prompts (the paper's).
        What stands under the mask has no effect. The other arguments are those of `loss(...)`.

        Raises:
            ValueError: shapes that differ, an odd number of rows, inputs that are missing or not used.
        """
        checks.float_tensor("logprobs", logprobs)
        if logprobs.dim() != 2:
            raise ValueError(f"logprobs must be (2P, T) or (B, T), got shape {tuple(logprobs.shape)}")
        keep, poison = checks.keep_mask("mask", mask, logprobs.shape, logprobs.device)
        self._check_reference("ref_logprobs", ref_logprobs)
        check_like(logprobs, ref_logprobs=ref_logprobs, log_sum_squared_probs=log_sum_squared_probs)
        if (log_sum_squared_probs is None) != (self.weighting is None):
            raise ValueError(f"log_sum_squared_probs goes with weighting='wpo', got weighting={self.weighting!r}")
        kl = (kl_logprobs, kl_ref_logprobs, kl_mask)
        if self.unpaired:
            output = self._from_row_tokens(logprobs, keep, ref_logprobs, labels, kl, reference_point, baseline, n_pairs)
        else:
            self._check_pairs_only(
                labels=labels,
                kl_logprobs=kl_logprobs,
                kl_ref_logprobs=kl_ref_logprobs,
                kl_mask=kl_mask,
                reference_point=reference_point,
                baseline=baseline,
            )
            rows = pair_rows(logprobs, keep, ref_logprobs, log_sum_squared_probs, self.length_desensitisation)
            output = self._of_pairs(rows, n_pairs, n_tokens, result_dtype(logprobs))
        return output if poison is None else output._replace(loss=output.loss + poison)

    def from_logits(
        self,
        logits: Tensor,  # (2P, T, V), or (B, T, V) for losses of single rows
        labels: Tensor,  # (2P, T) token ids, already aligned with the logits
        mask: Tensor,  # (2P, T)
        *,
        ref_logits: Tensor | None = None,  # (2P, T, V)
        ref_logprobs: Tensor | None = None,  # (2P, T)
        temperature: float | Tensor | None = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        backend: str = "auto",
        desirable: Tensor | None = None,  # (B,) bool, the `labels` of from_logprobs
        **inputs: Any,
    ) -> LossOutput:
        """Return the loss of logits; the reference is given as logits or as log-probs.

        The gradient is with respect to `logits`.

        Args:
            logits, labels: as `fastrl.token_logprobs` takes them; what stands under the mask has no effect.
            mask: as in `from_logprobs`.
            ref_logits, ref_logprobs: the reference, one of the two, unless the loss reads none.
            temperature, logit_scale, softcap, backend: of `fastrl.token_logprobs`, for policy and reference alike.
            desirable: the `labels` of `from_logprobs`, for kto, apo_zero_unpaired and bco.
            inputs: the remaining arguments of `from_logprobs`; with weighting="wpo" sum p^2 is taken from the logits.

        Raises:
            ValueError, TypeError: as `fastrl.token_logprobs` and `from_logprobs` do; a reference given twice.
        """
        head: dict[str, Any] = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "backend": backend,
            "ignore_index": checks.MASKED_LABEL,
        }
        ids = checks.masked_labels(labels, mask, logits, "logits")
        policy = token_logprobs(logits, ids, **head)
        with torch.no_grad():
            if ref_logits is not None:
                check_one_reference(ref_logprobs, "ref_logits")
                ref_logprobs = token_logprobs(ref_logits, ids, **head).logprobs
            if self.weighting is not None:
                head["temperature"] = halved(temperature)
                squared = token_logprobs(logits, ids, **head)
                inputs["log_sum_squared_probs"] = squared.logsumexp - 2.0 * policy.logsumexp
        return self._with_tokens(policy, mask, ref_logprobs, desirable, inputs)

    def from_hidden(
        self,
        hidden: Tensor,  # (2P, T, D), or (B, T, D) for losses of single rows
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (2P, T) token ids, already aligned with the hidden states
        mask: Tensor,  # (2P, T)
        *,
        ref_hidden: Tensor | None = None,  # (2P, T, D')
        ref_weight: Tensor | None = None,  # (V, D'), None: `weight`, detached
        ref_bias: Tensor | None = None,  # (V,)
        ref_logprobs: Tensor | None = None,  # (2P, T)
        bias: Tensor | None = None,  # (V,)
        temperature: float | Tensor | None = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        chunk_tokens: int | None = None,
        tail_mass: float = 0.0,
        tp_group: Any = None,
        backend: str = "auto",
        desirable: Tensor | None = None,  # (B,) bool, the `labels` of from_logprobs
        **inputs: Any,
    ) -> LossOutput:
        """Return the loss of hidden states and the output head, without the logits in memory.

        The gradient is formed in the forward, in blocks of whole pairs (rows for kto and bco): 3 GEMM units, 2 with a
        frozen head; a pair longer than 4 chunks has its logits formed twice (4 units). Losses in which pairs depend on
        each other take the log-probs first, 4 units: aot and aot_unpaired, which sort the batch; kto and bco whose
        reference point or baseline is the batch's own; weighting="wpo", with one more for sum p^2; and tp_group.
        `ref_hidden` is one more unit. `metrics["path/gemm_units"]` says what ran, as the mean over live tokens. With
        `tail_mass` > 0, `sparse/rows` and `sparse/left_max` are those of `PolicyLoss.from_hidden`; where the gradient
        of a trainable head takes 4 units, the backward fills them in.

        The options are those of `fastrl.ops.linear_token_logprobs`, used for policy and reference alike; `desirable`
        and `inputs` are as in `from_logits`. Gradients are with respect to `hidden`, `weight` and `bias`.

        Inside `torch.compile` a gradient that is formed in the forward is a graph break, as for `PolicyLoss`.

        Raises:
            ValueError, TypeError: as `linear_token_logprobs` and `from_logprobs` do; a reference given twice, or a head
                of the reference without its states.
        """
        exact: dict[str, Any] = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "chunk_tokens": chunk_tokens,
            "tp_group": tp_group,
            "backend": backend,
            "ignore_index": checks.MASKED_LABEL,
        }
        if (ref_hidden is None and ref_weight is not None) or (ref_weight is None and ref_bias is not None):
            raise ValueError("ref_bias goes with ref_weight, and ref_weight with ref_hidden")
        ids, mask = checks.labels_and_mask(labels, mask, hidden, "hidden")
        with torch.no_grad():
            if ref_hidden is not None:
                check_one_reference(ref_logprobs, "ref_hidden")
                ref_head = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
                ref_logprobs = linear_token_logprobs(ref_hidden, ref_head[0], ids, bias=ref_head[1], **exact).logprobs
        extra = float(ref_hidden is not None)
        trains_head = any(isinstance(x, Tensor) and x.requires_grad for x in (weight, bias))
        training = torch.is_grad_enabled() and (trains_head or (isinstance(hidden, Tensor) and hidden.requires_grad))
        if training and trains_head and tp_group is None and not self._couples(inputs):
            inputs["labels"] = desirable
            rows = policy_rows(hidden, weight, ids, bias=bias, tail_mass=tail_mass, **exact)
            return fused_preference(self, rows, PreferenceInputs(mask, ref_logprobs, inputs), extra)
        stats = SparseStats(hidden.device) if tail_mass and training else None
        with collect_sparse_stats(stats):
            policy = linear_token_logprobs(hidden, weight, ids, bias=bias, tail_mass=tail_mass, **exact)
        if self.weighting is not None:
            extra += 1.0
            with torch.no_grad():
                exact["temperature"] = halved(temperature)
                squared = linear_token_logprobs(hidden, weight, ids, bias=bias, **exact)
                inputs["log_sum_squared_probs"] = squared.logsumexp - 2.0 * policy.logsumexp.detach()
        output = self._with_tokens(policy, mask, ref_logprobs, desirable, inputs)
        output = output if stats is None else with_sparse_stats(output, stats)
        return with_path(output, extra + (4.0 if trains_head else 2.0) if training else extra + 1.0)

    def _couples(self, inputs: dict[str, Any]) -> bool:
        """Return whether the gradient of a pair (or row) depends on others, given the inputs of `from_logprobs`."""
        if self.couples_pairs or self.weighting is not None or self.shift == "paired_mean":
            return True
        own_point = all(inputs.get(name) is None for name in ("reference_point", "kl_logprobs"))
        own_baseline = inputs.get("baseline") is None
        return (self.shift == "reference_point" and own_point) or (self.shift == "baseline" and own_baseline)

    # --- pairs ------------------------------------------------------------------------------------------------------

    def _with_tokens(
        self, policy: Any, mask: Tensor, ref_logprobs: Tensor | None, desirable: Tensor | None, inputs: dict[str, Any]
    ) -> LossOutput:
        output = self.from_logprobs(policy.logprobs, mask, ref_logprobs, labels=desirable, **inputs)
        entropy = policy.entropy.detach()
        metrics = output.metrics | cast_metrics({"entropy": (entropy.sum(), (mask != 0).sum())})
        return LossOutput(output.loss, metrics, policy.logprobs.detach(), entropy)

    def _scores(self, rows: PairRows) -> Scores:
        """Return what the features compare: log-ratios or log-probs, transformed and normalised."""
        rows = rows.reduced(self.reduce)
        policy_margin = rows.chosen - rows.rejected
        chosen, rejected, ref_margin = rows.chosen, rows.rejected, torch.zeros_like(policy_margin)
        if self.reference and rows.ref_chosen is not None:
            assert rows.ref_rejected is not None
            chosen, rejected = chosen - rows.ref_chosen, rejected - rows.ref_rejected
            ref_margin = rows.ref_chosen - rows.ref_rejected
        if self.odds:
            chosen, rejected = log_odds(chosen), log_odds(rejected)
        else:
            transform, alpha = self._transform()
            squared = any(term.link == "square" for term in self.terms)
            limit = SQUARED_EXP_LIMIT if squared else SCORE_EXP_LIMIT
            chosen, rejected = transform(chosen, alpha, limit), transform(rejected, alpha, limit)
        if self.score_normalise == "length" and rows.chosen_lengths is not None and rows.rejected_lengths is not None:
            chosen, rejected = chosen / rows.chosen_lengths, rejected / rows.rejected_lengths
        return Scores(chosen, rejected, policy_margin, ref_margin)

    def _transform(self) -> tuple[Any, float]:
        if self.f_divergence != "reverse_kl":
            return F_DIVERGENCES[self.f_divergence], 0.5 if self.alpha is None else self.alpha
        return (alphapo, self.alpha) if self.alpha else (identity, 0.0)

    def _linked(self, link: str, z: Tensor) -> Tensor:
        """Return link(z), with the label smoothing of the loss."""
        function, e = LINKS[link], self.label_smoothing
        if e == 0.0 or self.smoothing not in ("conservative", "robust"):
            return function(z, self)
        kept, flipped = (1.0 - e) * function(z, self), e * function(-z, self)
        return kept + flipped if self.smoothing == "conservative" else (kept - flipped) / (1.0 - 2.0 * e)

    def _pair_loss(self, rows: PairRows, counts: Counts) -> Tensor:
        """Return the scalar loss of pairs, NLL included."""
        if self.components:
            return torch.stack([weight * loss._pair_loss(rows, counts) for loss, weight in self.components]).sum()
        total = rows.chosen.new_zeros(())
        if self.terms:
            scores = self._scores(rows)
            per_pair = torch.zeros_like(scores.chosen)  # (P,)
            for term in self.terms:
                z = term.sign * (self.beta * FEATURES[term.feature](scores) - self.margin)
                per_pair = per_pair + term.weight * self._linked(term.link, z)
            if rows.weights is not None:
                per_pair = per_pair * rows.weights
            total = per_pair.sum() / counts.pairs
        if self.sft_coef and not (self.sft_optional and rows.chosen_total is None):
            total = total + self.sft_coef * self._nll(rows, counts)
        return total

    def _nll(self, rows: PairRows, counts: Counts) -> Tensor:
        if rows.chosen_total is None or rows.chosen_lengths is None:
            raise ValueError(f"the NLL of the loss {self.name!r} needs chosen_lengths and rejected_lengths, got None")
        if self.sft_normalise == "tokens":
            n_tokens = rows.chosen_tokens if counts.tokens is None else counts.tokens
            return -rows.chosen_total.sum() / divisor(n_tokens)
        per_pair = rows.chosen_total / rows.chosen_lengths if self.sft_normalise == "length" else rows.chosen_total
        return -per_pair.sum() / counts.pairs

    def _of_pairs(
        self, rows: PairRows, n_pairs: float | Tensor | None, n_tokens: float | Tensor | None, dtype: torch.dtype
    ) -> LossOutput:
        counts = Counts(divisor(rows.chosen.numel() if n_pairs is None else n_pairs), n_tokens)
        loss = self._pair_loss(rows, counts)
        with torch.no_grad():
            metrics = self._pair_metrics(rows)
        return LossOutput(loss.to(dtype), cast_metrics(metrics), None, None)

    def _pair_metrics(self, rows: PairRows) -> dict[str, tuple[Tensor, Tensor]]:
        """Return TRL's metrics of a batch of pairs; rewards are beta times the (untransformed) score."""
        reduced = rows.reduced(self.reduce)
        chosen, rejected = reduced.chosen, reduced.rejected
        if reduced.ref_chosen is not None and reduced.ref_rejected is not None:
            chosen, rejected = chosen - reduced.ref_chosen, rejected - reduced.ref_rejected
        elif self.alpha:
            chosen, rejected = alphapo(chosen, self.alpha), alphapo(rejected, self.alpha)
        chosen, rejected = self.beta * chosen, self.beta * rejected
        count = torch.full_like(chosen.sum(), chosen.numel())
        metrics = {
            "rewards/chosen": (chosen.sum(), count),
            "rewards/rejected": (rejected.sum(), count),
            "rewards/accuracies": ((chosen > rejected).sum(), count),
            "rewards/margins": ((chosen - rejected).sum(), count),
            "logps/chosen": (reduced.chosen.sum(), count),
            "logps/rejected": (reduced.rejected.sum(), count),
            "nonfinite": ((~(chosen - rejected).isfinite()).sum(), count),
        }
        if rows.chosen_total is not None and rows.chosen_tokens is not None:
            metrics["nll_loss"] = (-rows.chosen_total.sum(), rows.chosen_tokens)
        if self.odds:
            scores = self._scores(rows)
            odds = scores.chosen - scores.rejected
            metrics["log_odds_chosen"] = (odds.sum(), count)
            metrics["log_odds_ratio"] = (F.logsigmoid(odds).sum(), count)
        return metrics

    # --- single rows with a label -----------------------------------------------------------------------------------

    def _from_row_tokens(
        self,
        logprobs: Tensor,  # (B, T)
        keep: Tensor,  # (B, T)
        ref: Tensor | None,  # (B, T)
        labels: Tensor | None,  # (B,)
        kl: tuple[Tensor | None, Tensor | None, Tensor | None],
        reference_point: float | Tensor | None,
        baseline: float | Tensor | None,
        n_pairs: float | Tensor | None,
    ) -> LossOutput:
        assert ref is not None
        if labels is None:
            raise ValueError(f"the loss {self.name!r} needs labels (B,): True for desirable rows, got None")
        desirable, poison = checks.keep_mask("labels", labels, logprobs.shape[:1], logprobs.device)
        policy = live(logprobs, keep).sum(1)
        scores = policy - live(ref, keep).detach().sum(1)
        if any(part is not None for part in kl):
            if self.shift != "reference_point" or reference_point is not None:
                raise ValueError("kl_logprobs give kto's reference point: pass them or reference_point, not both")
            reference_point = kl_reference_point(*kl)
        shift = self._shift(scores, desirable, reference_point, baseline)
        output = self._of_rows(scores, policy.detach(), desirable, shift, n_pairs, result_dtype(logprobs))
        return output if poison is None else output._replace(loss=output.loss + poison)

    def _shift(
        self,
        scores: Tensor,  # (B,)
        labels: Tensor,  # (B,) bool
        reference_point: float | Tensor | None,
        baseline: float | Tensor | None,
    ) -> Tensor:
        """Return what is subtracted from beta * score, () or (B,)."""
        for field, value in (("reference_point", reference_point), ("baseline", baseline)):
            if value is not None and self.shift != field:
                raise ValueError(f"{field} is not used by the loss {self.name!r} (shift={self.shift!r}); leave it out")
        if self.shift is None:
            return scores.new_zeros(())
        if self.shift == "baseline":
            if baseline is None:
                return (self.beta * scores.detach()).sum() / max(scores.numel(), 1)
            return scalar_like("baseline", baseline, scores)
        if reference_point is not None:
            return self.beta * scalar_like("reference_point", reference_point, scores)
        mean_w, mean_l = masked_mean(scores, labels), masked_mean(scores, ~labels)
        return self.beta * torch.where(labels, torch.relu(mean_l), torch.relu(mean_w))

    def _of_rows(
        self,
        scores: Tensor,  # (B,) log-ratios
        logps: Tensor,  # (B,) detached
        labels: Tensor,  # (B,) bool
        shift: Tensor,  # () or (B,)
        n_rows: float | Tensor | None,
        dtype: torch.dtype,
    ) -> LossOutput:
        sign = choose(labels, 1.0, -1.0, scores)
        z = sign * (self.beta * scores - shift)
        per_row = torch.stack([term.weight * LINKS[term.link](term.sign * z, self) for term in self.terms]).sum(0)
        weights = choose(labels, self.desirable_weight, self.undesirable_weight, scores)
        loss = (weights * per_row).sum() / divisor(scores.numel() if n_rows is None else n_rows)
        with torch.no_grad():
            rewards = self.beta * scores
            metrics = {"nonfinite": ((~scores.isfinite()).sum(), torch.full_like(labels.sum(), labels.numel()))}
            for side, rows in (("chosen", labels), ("rejected", ~labels)):
                count = rows.sum()
                metrics[f"rewards/{side}"] = (torch.where(rows, rewards, 0.0).sum(), count)
                metrics[f"logps/{side}"] = (torch.where(rows, logps, 0.0).sum(), count)
            if self.shift is not None and shift.dim() == 0:
                name, scale = ("kl", self.beta) if self.shift == "reference_point" else ("baseline", 1.0)
                metrics[name] = (shift / scale, torch.ones_like(shift))
        return LossOutput(loss.to(dtype), cast_metrics(metrics), None, None)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check_reference(self, what: str, *tensors: Tensor | None) -> None:
        given = [tensor is not None for tensor in tensors]
        if self.reads_reference and not all(given):
            raise ValueError(f"the loss {self.name!r} needs {what}; without a reference build it with reference=False")
        if any(given) and not self.reference:
            raise ValueError(f"the loss {self.name!r} reads no reference: leave {what} out, or use reference=True")
        if any(given) != all(given):
            raise ValueError(f"{what} go together, got only one of them")

    def _check_pairs_only(self, **inputs: Any) -> None:
        for name, value in inputs.items():
            if value is not None:
                raise ValueError(f"{name} is for losses of rows with a label (kto, bco), not for {self.name!r}")


def _fields_of(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return overrides under the names of the fields; None for alpha or tau keeps the preset's value."""
    known = {field.name for field in dataclasses.fields(PreferenceLoss)} - {"name", "components"}
    fields: dict[str, Any] = {}
    for key, value in overrides.items():
        if key == "use_weighting":
            key, value = "weighting", "wpo" if value else None
        name = ALIASES.get(key, key)
        if name not in known:
            raise ValueError(f"unknown option {key!r}; known: {', '.join(sorted(known))}")
        if name in fields:
            raise ValueError(f"{name} was given twice (once as {key!r})")
        if value is None and name in ("alpha", "tau"):
            continue
        fields[name] = value
    return fields
