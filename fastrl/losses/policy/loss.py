"""One policy loss over its axes: every policy-gradient loss of the field is a value of `PolicyLoss`.

    loss = sum_t s_t [ keep_t w_t l(r_t, A_t) + kl_coef k_t ] - entropy_coef sum_t H_t / n_tokens

`fastrl.reference` holds the formulas. This module holds the three entrances: it checks the inputs, flattens the batch
to tokens, and chooses the path through the vocabulary.

Legend: B batch, T time, N tokens, S sequences, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.backends.choice import choose, companion_backend, graph_break
from fastrl.losses.layout import Layout
from fastrl.losses.output import LossOutput, gemm_units, with_path, with_sparse_stats
from fastrl.losses.policy.axes import PolicyAxes
from fastrl.losses.policy.correction import RolloutCorrection
from fastrl.losses.policy.fused import fused_from_hidden
from fastrl.losses.policy.inputs import Batch, Mask, PolicyInputs, check_names, check_no_entropy
from fastrl.losses.policy.metrics import policy_metrics
from fastrl.losses.policy.presets import PRESETS, describe, preset_fields
from fastrl.ops.head import LinearRows
from fastrl.ops.linear_token_logprobs import linear_token_logprobs
from fastrl.ops.policy import fused_policy_terms
from fastrl.ops.policy_logits import policy_logits
from fastrl.ops.rows import checked_rows
from fastrl.ops.segments import segment_sum_for
from fastrl.ops.sparse_rows import SparseStats, collect_sparse_stats
from fastrl.ops.token_logprobs import token_logprobs


@dataclass(frozen=True, kw_only=True, repr=False)
class PolicyLoss(PolicyAxes):
    """A policy loss as a point on independent axes. `PolicyLoss.preset(name)` gives the losses of the field by name.

    Every invalid or contradictory combination raises `ValueError` at construction. Fields that a loss does not use
    must keep their default or be None.
    """

    @classmethod
    def preset(cls, name: str, *, style: str | None = None, **fields: Any) -> PolicyLoss:
        """Return a loss of the field by name, with `fields` for single axes.

        Args:
            name: one of `PolicyLoss.presets()`.
            style: None for the paper's arithmetic, or a trainer's name where its arithmetic differs.
            fields: fields of `PolicyLoss`.

        Raises:
            ValueError: unknown name or style, listing the known ones, or unknown or contradictory fields.
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

    @classmethod
    def describe(cls, name: str) -> str:
        """Return a preset as text: formula, source, fields, and each trainer that has it with its differences.

        Raises:
            ValueError: unknown preset. The message lists the known ones.
        """
        return describe(name)

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

        Every loss accepts the columns that trainers carry in every batch: `advantages`, `old_logprobs`, `ref_logprobs`,
        `rollout_logprobs`, `entropy`, `group_ids`, `n_tokens` and `n_sequences`. Their types and shapes are checked. A
        loss that has no use for one ignores it, or reports a metric from it, as listed below. `scores`, which only one
        loss reads, is refused by the others.

        Args:
            logprobs: (B, T) padded, or (N,) packed with `cu_seqlens`, in nats.
            advantages: per sequence (B,), (B, 1), (S,) or per token (B, T), (N,); constants. "nll" and
                "dft" ignore them.
            mask: 0/1, bool, int or float. Tokens outside cannot matter, whatever they hold.
            old_logprobs: log-probs of the policy in the ratio's denominator. None: on-policy, the detached `logprobs`.
                Losses without a ratio report the metric approx_kl_old from them. Constants, as are the next two.
            ref_logprobs: of the reference policy, for kl_to="ref"; ignored without such a KL.
            rollout_logprobs: as the inference engine reported them, for anchors and corrections that name them. Every
                loss reports the metrics rollout_kl and rollout_abs_diff from them.
            entropy: per token, for entropy_coef != 0 (and as a metric).
            n_tokens, n_sequences: global counts in the denominator, in place of those counted from the mask (live
                tokens; sequences with a live token), so that micro-batches and ranks add up. Aggregates over sequences
                ignore `n_tokens` (but for an entropy bonus), those over tokens `n_sequences`, "prompt_mean" both.
            selection: 0/1 keep-mask on the policy term, per token or per sequence. The denominator stays.
            group_ids: (B,) prompt of each sequence, for aggregate="prompt_mean", ignored by the others.
            scores: (B,) or per token, for surrogate="topr" alone. A token is positive if its score is > 0, and without
                scores if its advantage is.
            cu_seqlens: (S+1,) offsets of packed sequences.

        Returns:
            `LossOutput`. Metrics are (sum, count) tensors on the device: add them over micro-batches, divide once.
        """
        inputs: PolicyInputs = {
            "advantages": advantages, "mask": mask, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
            "rollout_logprobs": rollout_logprobs, "n_tokens": n_tokens, "n_sequences": n_sequences,
            "selection": selection, "group_ids": group_ids, "scores": scores, "cu_seqlens": cu_seqlens,
        }  # fmt: skip
        return self._of_logprobs(logprobs, entropy, _batch_of_logprobs(self, logprobs, inputs), "auto")

    def _of_logprobs(self, logprobs: Tensor, entropy: Tensor | None, batch: Batch, backend: str) -> LossOutput:
        """Return the output of the call, for vocabulary rows of the given backend."""
        tokens = batch.layout.tokens
        flat_entropy = None if entropy is None else tokens("entropy", checks.float_tensor("entropy", entropy))
        if self.uses_entropy and flat_entropy is None:
            raise ValueError(f"entropy_coef={self.entropy_coef} needs entropy=, per token")
        return self._evaluate(batch, tokens("logprobs", logprobs), flat_entropy, backend)

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
        **inputs: Unpack[PolicyInputs],
    ) -> LossOutput:
        """Return the loss from logits aligned with `labels`, and its gradient with respect to `logits`, in their dtype.

        Masked rows never enter the log-prob: their labels may hold any id and their logits NaN. The backward takes any
        upstream factor, and `create_graph=True` is refused.

        If a token's gradient depends on its own row alone, the forward forms it and the backward hands it out. Then the
        only memory of the size of the logits is the gradient's, and the logits are not kept. The backward forms the
        gradient instead in these cases:

        - losses that couple the tokens of a sequence or of the batch: a sequence ratio, VESPO, GMPO, KL-Cov, a
          correction without `old_logprobs`
        - `allowed` and `logits_rounding`
        - float16 logits, because the loss scale must come before the rounding
        - graphs of `torch.compile`, whose backward cannot hand out a tensor of the forward

        Args:
            logits: (B, T, V) or (N, V), of any strides: a slice is not copied.
            labels: (B, T) or (N,) int64 or int32.
            temperature, logit_scale, softcap, backend: as in `token_logprobs`.
            inplace: write the gradient over the logits, which are lost, so that no memory of their size is taken. Their
                version is raised: an earlier operation whose backward needs them raises there, as in PyTorch. The
                memory then belongs to the gradient and must not be written to. Ignored if no gradient is wanted. Inside
                `torch.compile` on Triton only: half the memory of a graph that keeps the logits for the backward, for
                one more write of the logits' size.
            allowed, logits_rounding: as in `token_logprobs`, if the sampler drew from a subset of the tokens or from
                rounded logits. Log-probs, ratio and entropy then follow the sampler's distribution. Not with
                `inplace`.
            inputs: `advantages`, `mask`, `old_logprobs`, `ref_logprobs`, `rollout_logprobs`, `n_tokens`, `n_sequences`,
                `selection`, `group_ids`, `scores`, `cu_seqlens`: the arguments of `__call__`. `mask` is needed.

        Raises:
            ValueError, TypeError, RuntimeError: as `token_logprobs` and the call do. With `inplace`, also for losses,
                dtypes and options whose gradient the backward forms, leaves and views of leaves that require grad, rows
                that overlap or whose entries are apart, and inference tensors.
        """
        check_no_entropy(inputs)
        check_names(inputs)
        masked, mask = checks.masked_labels(labels, inputs["mask"], logits, "logits")
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
            batch = _batch_of_logprobs(self, result.logprobs, inputs, mask)
            return self._of_logprobs(result.logprobs, result.entropy, batch, choose(backend, logits.device).backend)
        rows = checked_rows(logits, masked, **options)
        layout = Layout.of(masked.shape, masked.device, inputs.get("cu_seqlens"), "labels")
        batch = Batch.of(self, layout, inputs, mask, checks.wide(logits.dtype))
        columns = batch.columns(self, None, segment_sum_for(rows.backend))
        loss, logprobs, entropy, terms = policy_logits(self, logits, rows, columns, layout.lengths, inplace=inplace)
        metrics = policy_metrics(batch, logprobs, entropy, columns, terms)
        return LossOutput(loss, metrics, layout.restore(logprobs), layout.restore(entropy))

    def _why_in_backward(
        self, logits: Any, inputs: PolicyInputs, restricted: list[str], inplace: bool, backend: str
    ) -> str | None:
        """Return why `from_logits` cannot form the gradient in the forward, or None.

        `restricted` names the options in use that change the rows.
        """
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

    @graph_break
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
        **inputs: Unpack[PolicyInputs],
    ) -> LossOutput:
        """Return the loss from hidden states and the LM head, without the logits of more than one chunk of tokens.

        The forward forms the gradient, chunk by chunk. `metrics["path/gemm_units"]` gives the cost, as the mean over
        live tokens. A unit is one product of the size of hidden times head.

        | case | units |
        |---|---|
        | trained head | 3 |
        | frozen head | 2 |
        | a loss that couples the tokens of a sequence: the same in blocks of whole sequences | 3, 2 |
        | such a loss, a sequence longer than 4 chunks: its logits are formed twice | 4 |
        | trained head with `tp_group`, KL-Cov or a correction without `old_logprobs`: log-probs first | 4 |

        Masked tokens are free. Tokens with zero gradient cost the forward's product only. With `tail_mass` > 0 a row
        whose gradient has a short list of entries within that bound skips the two products of the gradient (see
        `linear_token_logprobs`). The metrics `sparse/rows` and `sparse/left_max` count these rows and give the largest
        mass left out. For KL-Cov and for a correction without `old_logprobs` the backward forms the gradient of a
        trained head: it fills in these two, and `path/gemm_units` counts every row.

        The gradient is with respect to `hidden`, `weight` and `bias`, for any upstream factor. A second backward
        (`retain_graph=True`) forms it anew, to the same bits. `LossOutput.logprobs` and `.entropy` are detached.
        Autocast has no effect: hidden and weight are promoted to the wider dtype. Inside `torch.compile` the call is a
        graph break, because the number of chunks depends on the data. `fullgraph=True` refuses it, but
        accepts `linear_token_logprobs`.

        Extra memory in bytes, C tokens a chunk:

        | for | bytes |
        |---|---|
        | logits | C V 4, for up to 4 chunks if the loss couples the tokens of a sequence |
        | gradient of the hidden states | N D times the size of their dtype |
        | gradient of the head, summed in float32 | V D 4 |
        | its cast, for a head of half precision | V D 2 once the logits are gone, or nothing if they were larger |
        | operands and products of such a head on a GPU | C V 2 + 16384 D 4 |

        backward scales in place and allocates nothing, except for float16. float16 gradients are kept in float32 until
        then (4 N D + 4 V D bytes), because the loss scale must come before rounding. For them backward allocates the
        results, 2 N D + 2 V D. docs/engine.md lists the host syncs.

        Args:
            hidden: (B, T, D) or (N, D).
            weight: (V, D).
            labels: (B, T) or (N,) int64 or int32, aligned with `hidden`.
            bias, temperature, logit_scale, softcap, chunk_tokens, tail_mass, tp_group, backend: as in
                `linear_token_logprobs`.
            allowed, logits_rounding: as in `linear_token_logprobs`, if the sampler drew from a subset of the tokens or
                from rounded logits. Log-probs, ratio and entropy then follow the sampler's distribution.
            inputs: `advantages`, `mask`, `old_logprobs`, `ref_logprobs`, `rollout_logprobs`, `n_tokens`, `n_sequences`,
                `selection`, `group_ids`, `scores`, `cu_seqlens`: the arguments of `__call__`. `mask` is needed.

        Raises:
            ValueError, TypeError, RuntimeError: as `linear_token_logprobs` and the call do.
        """
        check_no_entropy(inputs)
        check_names(inputs)
        masked, mask = checks.masked_labels(labels, inputs["mask"], hidden, "hidden")
        trains = [torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in (hidden, weight, bias)]
        frozen = not any(trains[1:])
        if self._needs_logprobs_first(inputs, frozen, tp_group) is not None:
            stats = SparseStats(hidden.device) if tail_mass and any(trains) and isinstance(hidden, Tensor) else None
            with collect_sparse_stats(stats):
                result = linear_token_logprobs(
                    hidden, weight, masked, bias=bias, temperature=temperature, logit_scale=logit_scale,
                    softcap=softcap, ignore_index=checks.MASKED_LABEL, chunk_tokens=chunk_tokens, tail_mass=tail_mass,
                    tp_group=tp_group, keep_token_grads=not self.uses_entropy, backend=backend, allowed=allowed,
                    logits_rounding=logits_rounding,
                )  # fmt: skip
            batch = _batch_of_logprobs(self, result.logprobs, inputs, mask)
            output = self._of_logprobs(result.logprobs, result.entropy, batch, choose(backend, hidden.device).backend)
            output = output if stats is None else with_sparse_stats(output, stats)
            # The backward forms the logits again, unless the forward could keep dlogp/dhidden of each token.
            again = any(trains) and (self.uses_entropy or not frozen)
            return with_path(output, gemm_units(trains[0], trains[1], again=float(again)))
        rows = LinearRows.checked(
            hidden, weight, masked, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
            ignore_index=checks.MASKED_LABEL, chunk_tokens=chunk_tokens, tail_mass=tail_mass, backend=backend,
            allowed=allowed, logits_rounding=logits_rounding,
        )  # fmt: skip
        layout = Layout.of(masked.shape, masked.device, inputs.get("cu_seqlens"), "labels")
        batch = Batch.of(self, layout, inputs, mask, checks.wide(rows.hidden.dtype))
        return fused_from_hidden(self, batch, rows)

    def _needs_logprobs_first(self, inputs: PolicyInputs, frozen_head: bool, tp_group: Any) -> str | None:
        """Return why `from_hidden` needs all log-probs before it can form a gradient, or None."""
        if tp_group is not None:
            return "the rows of the head are spread over ranks"
        if self.kl_fraction is not None:
            return "KL-Cov ranks the tokens of the whole batch"
        if self.correction is not None and inputs.get("old_logprobs") is None:
            return "a correction without old_logprobs= takes the current log-probs, of the whole batch"
        if self.couples_sequences and frozen_head and not self.uses_entropy:
            return "with a frozen head dlogp/dhidden is kept per token, and a sequence of any length costs 2 GEMM units"
        return None

    def _evaluate(
        self,
        batch: Batch,
        logprobs: Tensor,  # (N,)
        entropy: Tensor | None,  # (N,)
        backend: str,
        with_metrics: bool = True,
    ) -> LossOutput:
        """Return the loss from flat log-probs, by the fused kernel if it runs on their device, else by PyTorch."""
        layout = batch.layout
        dtype, sums = checks.wide(logprobs.dtype), segment_sum_for(backend)
        live = torch.where(batch.mask, logprobs.to(dtype), 0.0)
        live_entropy = None if entropy is None else torch.where(batch.mask, entropy.to(dtype), 0.0)
        columns = batch.columns(self, live, sums)
        columns = reference.pooled_columns(self, live, columns, batch.mask, layout.lengths, sums)
        terms = fused_policy_terms(self, live, live_entropy, columns, backend=companion_backend(backend))
        loss = reference.total(terms.contribution, layout.lengths, sums)
        if not with_metrics:
            return LossOutput(loss, {}, None, None)
        metrics = policy_metrics(
            batch, live.detach(), None if live_entropy is None else live_entropy.detach(), columns, terms
        )
        kept = None if live_entropy is None else layout.restore(live_entropy.detach())
        return LossOutput(loss, metrics, layout.restore(live.detach()), kept)


def loss_value(
    spec: PolicyLoss,
    logprobs: Tensor,  # (B, T) or (N,)
    **inputs: Unpack[PolicyInputs],
) -> Tensor:
    """Return the loss of `spec(logprobs, ...)` alone, for callers that have metrics of their own.

    The metrics of a call cost as much time as its loss. `inputs` are the inputs of the call, without `entropy`.
    """
    check_names(inputs)
    batch = _batch_of_logprobs(spec, logprobs, inputs)
    return spec._evaluate(batch, batch.layout.tokens("logprobs", logprobs), None, "auto", with_metrics=False).loss


def _batch_of_logprobs(spec: PolicyAxes, logprobs: Tensor, inputs: PolicyInputs, mask: Mask | None = None) -> Batch:
    """Return the batch of per-token log-probs. `mask` is the checked mask, or None to check it here."""
    checks.float_tensor("logprobs", logprobs)
    layout = Layout.of(logprobs.shape, logprobs.device, inputs.get("cu_seqlens"))
    mask = checks.keep_mask("mask", inputs["mask"], layout.shape, layout.device) if mask is None else mask
    return Batch.of(spec, layout, inputs, mask, checks.wide(logprobs.dtype))
