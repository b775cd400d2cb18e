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
from fastrl.backends.choice import choose, companion_backend, graph_break
from fastrl.losses.layout import Layout
from fastrl.losses.output import LossOutput, with_path, with_sparse_stats
from fastrl.losses.policy.axes import PolicyAxes
from fastrl.losses.policy.correction import RolloutCorrection
from fastrl.losses.policy.fused import fused_from_hidden
from fastrl.losses.policy.inputs import Batch, _check_inputs, _check_names, _named_inputs
from fastrl.losses.policy.metrics import policy_metrics
from fastrl.losses.policy.presets import PRESETS, preset_fields
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
    """A policy loss as a point on independent axes; `PolicyLoss.preset(name)` gives the losses of the field by name.

    Every invalid or contradictory combination raises `ValueError` at construction. Fields that a loss does not use
    must keep their default or be None.
    """

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
        batch = self._batch(layout, checks.wide(logprobs.dtype), **_named_inputs(inputs))
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
        batch = self._batch(layout, checks.wide(logits.dtype), **_named_inputs(inputs))
        columns = self.columns(layout, batch, None, segment_sum_for(rows.backend))
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
        masked, inputs["mask"] = checks.labels_and_mask(labels, inputs["mask"], hidden, "hidden")
        trains = [torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad for x in (hidden, weight, bias)]
        frozen = not any(trains[1:])
        keep_token_grads = not self.uses_entropy
        # A correction without old log-probs takes the current ones, and KL-Cov ranks the whole batch: log-probs first,
        # as for a head whose rows are spread over ranks.
        needs_all = self.kl_fraction is not None or (self.correction is not None and inputs.get("old_logprobs") is None)
        if tp_group is not None or needs_all or (self.couples_sequences and frozen and not self.uses_entropy):
            stats = SparseStats(hidden.device) if tail_mass and any(trains) and isinstance(hidden, Tensor) else None
            with collect_sparse_stats(stats):
                result = linear_token_logprobs(
                    hidden, weight, masked, bias=bias, temperature=temperature, logit_scale=logit_scale,
                    softcap=softcap, ignore_index=checks.MASKED_LABEL, chunk_tokens=chunk_tokens, tail_mass=tail_mass,
                    tp_group=tp_group, keep_token_grads=keep_token_grads, backend=backend, allowed=allowed,
                    logits_rounding=logits_rounding,
                )  # fmt: skip
            chosen = choose(backend, hidden.device).backend
            output = self._of_logprobs(result.logprobs, result.entropy, inputs, chosen)
            again = any(trains) and not (frozen and keep_token_grads and not self.uses_entropy)
            kept = trains[0] and frozen and keep_token_grads
            output = output if stats is None else with_sparse_stats(output, stats)
            return with_path(output, 1.0 + kept + again * (1.0 + trains[0] + trains[1]))
        rows = LinearRows.checked(
            hidden, weight, masked, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap,
            ignore_index=checks.MASKED_LABEL, chunk_tokens=chunk_tokens, tail_mass=tail_mass, backend=backend,
            allowed=allowed, logits_rounding=logits_rounding,
        )  # fmt: skip
        layout = Layout.of(masked.shape, masked.device, inputs.pop("cu_seqlens", None), "labels")
        batch = self._batch(layout, checks.wide(rows.hidden.dtype), **_named_inputs(inputs))
        return fused_from_hidden(self, layout, batch, rows)

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
        dtype, sums = checks.wide(logprobs.dtype), segment_sum_for(backend)
        live = torch.where(batch.mask, logprobs.to(dtype), 0.0)
        live_entropy = None if entropy is None else torch.where(batch.mask, entropy.to(dtype), 0.0)
        columns = self.columns(layout, batch, live, sums)
        columns = reference.pooled_columns(self, live, columns, batch.mask, layout.lengths, sums)
        terms = fused_policy_terms(self, live, live_entropy, columns, backend=companion_backend(backend))
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
    batch = spec._batch(layout, checks.wide(logprobs.dtype), **_named_inputs(inputs))
    flat = layout.tokens("logprobs", logprobs)
    return spec._evaluate(layout, batch, flat, None, "auto", with_metrics=False).loss
