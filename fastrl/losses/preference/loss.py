"""Preference losses: DPO and its relatives as values of one frozen dataclass.

    scores -> transform -> feature -> z = sign (beta feature - shift) -> link -> mean      (terms.py)

This module holds the four entrances: sequence log-probs, per-token log-probs, logits, and hidden states. After the sums
over tokens a completion is one number. It is computed in float64 (on devices that have it) and returned in float32, or
in float64 for float64 inputs. Masked positions are removed by selection.

Legend: P pairs, B rows, T time, N tokens, D hidden, V vocabulary. A batch of pairs has 2P rows: the chosen ones first,
then the rejected ones, in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from fastrl import checks
from fastrl.losses.output import LossOutput, gemm_units, with_path, with_sparse_stats
from fastrl.losses.preference.axes import PreferenceAxes
from fastrl.losses.preference.fused import fused_preference, policy_rows
from fastrl.losses.preference.inputs import PreferenceInputs, check_names, check_no_squares, either_name
from fastrl.losses.preference.pairs import loss_of_pairs
from fastrl.losses.preference.presets import ALIASES, PRESETS, describe, preset_fields
from fastrl.losses.preference.rows import PairRows, check_one_reference, check_rows, checked_lengths, halved
from fastrl.losses.preference.tokens import check_pairs_only, check_reference, loss_of_tokens
from fastrl.losses.preference.unpaired import loss_of_rows, shift_of
from fastrl.losses.scalars import cast_metrics, constant, result_dtype, wide
from fastrl.ops import TokenLogprobs, linear_token_logprobs, token_logprobs
from fastrl.ops.sparse_rows import SparseStats, collect_sparse_stats


@dataclass(frozen=True, repr=False)
class PreferenceLoss(PreferenceAxes):
    """A preference loss, put together from parts. `PreferenceLoss.preset(name, ...)` gives the published ones.

    Callable on sequence log-probs (`loss(...)`), per-token log-probs (`from_logprobs`), logits (`from_logits`) or
    hidden states and the head (`from_hidden`). Gradients are with respect to the policy's numbers only. Losses are
    means over pairs (over rows for kto, apo_zero_unpaired, bco). Micro-batches add up to the loss of the whole batch if
    `n_pairs` (and `n_tokens`, for an NLL over tokens) is the global count. Exceptions: aot and aot_unpaired, which sort
    the batch, and bco without a given baseline.

    Raises:
        ValueError: the options contradict each other, or the loss would not use one.
    """

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def presets(cls) -> list[str]:
        """Return the names `preset` knows."""
        return list(PRESETS)

    @classmethod
    def preset(cls, name: str, *, style: str | None = None, **overrides: Any) -> PreferenceLoss:
        """Return the published loss `name`, with `overrides` for any field.

        `PreferenceLoss.describe(name)` gives its formula, paper, fields and trainers.

        Args:
            name: one of `presets()`.
            style: None for the preset itself, or a trainer that has the loss, for its arithmetic and defaults. For
                example "ipo" averages over the length in "trl" and sums in "openrlhf" and "roll".
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
    def describe(cls, name: str) -> str:
        """Return a preset as text: formula, source, fields, and each trainer that has it with its differences.

        Raises:
            ValueError: unknown preset. The message lists the known ones.
        """
        return describe(name)

    @classmethod
    def mixture(cls, parts: Sequence[tuple[str | PreferenceLoss, float]], **shared: Any) -> PreferenceLoss:
        """Return the weighted sum of several losses (MPO, arXiv 2411.10442).

        Args:
            parts: (preset name or PreferenceLoss, weight).
            shared: fields for the parts given by name. `beta`, `length_desensitisation` and `weighting` go to every
                part. Any other field goes to the parts that have a use for it, at least one.
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
        orpo) divide by the lengths. Without lengths the numbers are taken as they are: already averaged for those
        losses. cpo and orpo add their NLL only if lengths are given.

        Args:
            chosen_logps: log-probs of the chosen (or desirable) completions, and rejected_logps.
            ref_chosen_logps: the reference's, and ref_rejected_logps. Needed unless the loss is reference-free.
            chosen_lengths: tokens of each completion, and rejected_lengths.
            reference_point: kto's z0, in log-prob units, detached. The paper's is >= 0. None: the positive part of the
                mean score of the rows on the other side, its gradient kept, as OpenRLHF has it.
            baseline: bco's delta, in reward (beta log-ratio) units, detached. None: the mean reward of these rows.
            n_pairs: the global number of pairs (rows), for micro-batches and ranks.
            n_tokens: the global number of chosen tokens.

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
        check_reference(self, "ref_chosen_logps and ref_rejected_logps", ref_chosen_logps, ref_rejected_logps)
        dtype = result_dtype(chosen_logps)
        chosen, rejected = wide(chosen_logps), wide(rejected_logps)
        ref_chosen, ref_rejected = constant(ref_chosen_logps), constant(ref_rejected_logps)
        if self.unpaired:
            if chosen_lengths is not None or rejected_lengths is not None:
                raise ValueError(f"lengths are not used by the loss {self.name!r}; leave them out")
            assert ref_chosen is not None
            assert ref_rejected is not None
            scores = torch.cat([chosen - ref_chosen, rejected - ref_rejected])
            desirable = torch.arange(scores.numel(), device=scores.device) < chosen.numel()
            shift = shift_of(self, scores, desirable, reference_point, baseline)
            logps = torch.cat([chosen, rejected]).detach()
            return loss_of_rows(self, scores, logps, desirable, shift, n_pairs, dtype)
        check_pairs_only(self, {"reference_point": reference_point, "baseline": baseline})
        for field in ("length_desensitisation", "weighting"):
            if getattr(self, field) is not None:
                raise ValueError(f"{field} needs the tokens: call from_logprobs, from_logits or from_hidden")
        over_w, over_l, tokens = checked_lengths(chosen_lengths, rejected_lengths, chosen)
        rows = PairRows(
            chosen, rejected, ref_chosen, ref_rejected, over_w, over_l, None if over_w is None else chosen, tokens
        )
        return loss_of_pairs(self, rows, n_pairs, n_tokens, dtype)

    def from_logprobs(
        self,
        logprobs: Tensor,  # (2P, T), or (B, T) for losses of single rows
        mask: Tensor,  # the same shape, 1 on the tokens of the completion
        ref_logprobs: Tensor | None = None,  # the same shape
        *,
        log_sum_squared_probs: Tensor | None = None,  # (2P, T) log sum_v p_v^2, for weighting="wpo"
        desirable: Tensor | None = None,  # (B,) bool, for losses of single rows
        kl_logprobs: Tensor | None = None,  # (B', T') log-probs of mismatched completions, for kto's reference point
        kl_ref_logprobs: Tensor | None = None,  # (B', T')
        kl_mask: Tensor | None = None,  # (B', T'), None: they are 0 outside the completion
        reference_point: float | Tensor | None = None,
        baseline: float | Tensor | None = None,
        n_pairs: float | Tensor | None = None,
        n_tokens: float | Tensor | None = None,
        labels: Tensor | None = None,  # the name that `desirable` had before
    ) -> LossOutput:
        """Return the loss of per-token log-probs.

        Rows are the chosen completions, then the rejected ones. For kto, apo_zero_unpaired and bco they are any rows,
        with `desirable`. Values under the mask have no effect.

        Args:
            logprobs: (2P, T), or (B, T) for losses of single rows.
            mask: the same shape, 1 on the tokens of the completion.
            ref_logprobs: the same shape, from the reference.
            log_sum_squared_probs: (2P, T) log sum_v p_v^2, for weighting="wpo".
            desirable: (B,) bool, for kto, apo_zero_unpaired and bco.
            kl_logprobs, kl_ref_logprobs, kl_mask: completions of other prompts, for the paper's reference point of kto:
                max(0, mean(sum kl_logprobs - sum kl_ref_logprobs)), detached. Without `kl_mask` the log-probs are 0
                outside the completion.
            reference_point, baseline, n_pairs, n_tokens: as for `loss(...)`.
            labels: the old name of `desirable`, accepted for one version.

        Raises:
            ValueError: shapes that differ, an odd number of rows, inputs that are missing or not used.
        """
        inputs: PreferenceInputs = {
            "log_sum_squared_probs": log_sum_squared_probs,
            "desirable": either_name(desirable, labels),
            "kl_logprobs": kl_logprobs,
            "kl_ref_logprobs": kl_ref_logprobs,
            "kl_mask": kl_mask,
            "reference_point": reference_point,
            "baseline": baseline,
            "n_pairs": n_pairs,
            "n_tokens": n_tokens,
        }
        return loss_of_tokens(self, logprobs, mask, ref_logprobs, inputs)

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
        **inputs: Unpack[PreferenceInputs],
    ) -> LossOutput:
        """Return the loss of logits, with its gradient with respect to `logits`.

        Args:
            logits, labels: as `fastrl.token_logprobs` takes them. Values under the mask have no effect.
            mask: as in `from_logprobs`.
            ref_logits, ref_logprobs: the reference as logits or as log-probs, one of the two, unless the loss reads
                none.
            temperature, logit_scale, softcap, backend: as in `fastrl.token_logprobs`, for policy and reference alike.
            inputs: `desirable`, `kl_logprobs`, `kl_ref_logprobs`, `kl_mask`, `reference_point`, `baseline`, `n_pairs`,
                `n_tokens`: the arguments of `from_logprobs`. Its `log_sum_squared_probs` is taken from the logits.

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
        check_names(inputs)
        check_no_squares(inputs)
        ids, kept = checks.masked_labels(labels, mask, logits, "logits")
        policy = token_logprobs(logits, ids, **head)
        with torch.no_grad():
            if ref_logits is not None:
                check_one_reference(ref_logprobs, "ref_logits")
                ref_logprobs = token_logprobs(ref_logits, ids, **head).logprobs
            if self.weighting is not None:
                head["temperature"] = halved(temperature)
                squared = token_logprobs(logits, ids, **head)
                inputs["log_sum_squared_probs"] = squared.logsumexp - 2.0 * policy.logsumexp
        return self._with_tokens(policy, kept, ref_logprobs, inputs)

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
        **inputs: Unpack[PreferenceInputs],
    ) -> LossOutput:
        """Return the loss of hidden states and the output head, without the logits in memory.

        Gradients are with respect to `hidden`, `weight` and `bias`. The forward forms them, in blocks of whole pairs
        (rows for kto and bco), unless pairs depend on each other. `metrics["path/gemm_units"]` gives the cost, as the
        mean over live tokens. A unit is one product of the size of hidden times head.

        | case | units |
        |---|---|
        | trained head | 3 |
        | a pair longer than 4 chunks, whose logits are formed twice | 4 |
        | trained head, log-probs first: see below | 4 |
        | frozen head | 2 |
        | no gradient | 1 |
        | `ref_hidden` | 1 more |
        | weighting="wpo", for sum p^2 | 1 more |

        The log-probs come first in these cases:

        - aot and aot_unpaired, which sort the batch
        - kto and bco, if the batch gives the reference point or the baseline
        - weighting="wpo"
        - `tp_group`

        With `tail_mass` > 0 the metrics include `sparse/rows` and `sparse/left_max`, as in `PolicyLoss.from_hidden`. If
        a trained head takes 4 units, the backward fills them in. Inside `torch.compile` a gradient that the forward
        forms is a graph break, as for `PolicyLoss`.

        Args:
            hidden, weight, labels, bias: as `fastrl.linear_token_logprobs` takes them.
            mask: as in `from_logprobs`.
            ref_hidden, ref_weight, ref_bias, ref_logprobs: the reference as hidden states, with its head unless that is
                the policy's, or as log-probs.
            temperature, logit_scale, softcap, chunk_tokens, tp_group, backend: as in `fastrl.linear_token_logprobs`,
                for policy and reference alike.
            tail_mass: as in `fastrl.linear_token_logprobs`, for the policy.
            inputs: `desirable`, `kl_logprobs`, `kl_ref_logprobs`, `kl_mask`, `reference_point`, `baseline`, `n_pairs`,
                `n_tokens`: the arguments of `from_logprobs`. Its `log_sum_squared_probs` is taken from the states.

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
        check_names(inputs)
        check_no_squares(inputs)
        ids, kept = checks.masked_labels(labels, mask, hidden, "hidden")
        with torch.no_grad():
            if ref_hidden is not None:
                check_one_reference(ref_logprobs, "ref_hidden")
                ref_head = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
                ref_logprobs = linear_token_logprobs(ref_hidden, ref_head[0], ids, bias=ref_head[1], **exact).logprobs
        extra = float(ref_hidden is not None)
        trains_head = any(isinstance(x, Tensor) and x.requires_grad for x in (weight, bias))
        trains_hidden = isinstance(hidden, Tensor) and hidden.requires_grad
        training = torch.is_grad_enabled() and (trains_head or trains_hidden)
        if training and trains_head and tp_group is None and not self.couples(inputs):
            keep, poison = kept
            rows = policy_rows(hidden, weight, ids, bias=bias, tail_mass=tail_mass, **exact)
            output = fused_preference(self, rows, keep, ref_logprobs, inputs, extra)
            return output if poison is None else output._replace(loss=output.loss + poison)
        stats = SparseStats(hidden.device) if tail_mass and training else None
        with collect_sparse_stats(stats):
            policy = linear_token_logprobs(hidden, weight, ids, bias=bias, tail_mass=tail_mass, **exact)
        if self.weighting is not None:
            extra += 1.0
            with torch.no_grad():
                exact["temperature"] = halved(temperature)
                squared = linear_token_logprobs(hidden, weight, ids, bias=bias, **exact)
                inputs["log_sum_squared_probs"] = squared.logsumexp - 2.0 * policy.logsumexp.detach()
        output = self._with_tokens(policy, kept, ref_logprobs, inputs)
        output = output if stats is None else with_sparse_stats(output, stats)
        # With a frozen head the forward keeps dlogp/dhidden. With one that trains the backward forms the logits again.
        trains_head = training and trains_head
        units = gemm_units(training and trains_hidden, trains_head, again=float(trains_head), before=extra)
        return with_path(output, units)

    def _with_tokens(
        self,
        policy: TokenLogprobs,
        kept: tuple[Tensor, Tensor | None],  # of checks.keep_mask
        ref_logprobs: Tensor | None,
        inputs: PreferenceInputs,
    ) -> LossOutput:
        keep, poison = kept
        output = loss_of_tokens(self, policy.logprobs, keep, ref_logprobs, inputs)
        entropy = policy.entropy.detach()
        metrics = output.metrics | cast_metrics({"entropy": (entropy.sum(), keep.sum())})
        loss = output.loss if poison is None else output.loss + poison
        return LossOutput(loss, metrics, policy.logprobs.detach(), entropy)


def _fields_of(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return overrides under the names of the fields. None for alpha or tau keeps the preset's value."""
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
