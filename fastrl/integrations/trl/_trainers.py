"""TRL's trainers with the gradient of their loss formed while the head runs.

Data, rollouts, loss and metrics are TRL's. Only the gradient of the head and of the hidden states comes from fastrl
(see `_prediction`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

from fastrl.integrations.trl import _seams
from fastrl.integrations.trl._prediction import PolicyPrediction, Prediction, SupervisedPrediction, predicting
from fastrl.integrations.trl._preferences import PairPrediction, RowPrediction
from fastrl.integrations.trl._switch import patched
from fastrl.integrations.trl._translate import policy_loss_from_config, preference_loss_from_config

LOSS_ARGUMENTS = ("self", "model", "inputs")
for _trainer, _method, _arguments in (
    (GRPOTrainer, "_compute_loss", LOSS_ARGUMENTS),
    (RLOOTrainer, "_compute_loss", LOSS_ARGUMENTS),
    (DPOTrainer, "_compute_loss", (*LOSS_ARGUMENTS, "return_outputs")),
    (DPOTrainer, "compute_ref_log_probs", LOSS_ARGUMENTS),
    (KTOTrainer, "_compute_loss", (*LOSS_ARGUMENTS, "return_outputs")),
    (KTOTrainer, "compute_ref_log_probs", LOSS_ARGUMENTS),
    (KTOTrainer, "_compute_kl_logps", ("self", "model", "batch")),
    (SFTTrainer, "compute_loss", (*LOSS_ARGUMENTS, "return_outputs", "num_items_in_batch")),
):
    _seams.check_arguments(f"trl.{_trainer.__name__}.{_method}", getattr(_trainer, _method, None), _arguments)


class FastLossMixin:
    """Put before a trainer of TRL: log-probs from fastrl, and the gradient of the loss formed in the forward.

    `fastrl_path` says how the gradient of the last training batch was formed, or why it could not be formed in the
    forward. Options that fastrl does not compute raise `ValueError` when the trainer is built.
    """

    # For type checkers: TRL's trainers have narrower types than transformers' Trainer.
    args: Any
    model: Any
    ref_model: Any

    fastrl_path: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with patched():
            super().__init__(*args, **kwargs)
        self.fastrl_loss = self._fastrl_translate()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as TRL does, on fastrl's log-probs."""
        with patched():
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as TRL does, on fastrl's log-probs."""
        with patched():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as TRL does, on fastrl's log-probs."""
        with patched():
            return super().predict(*args, **kwargs)  # type: ignore[misc]

    def _fastrl_translate(self) -> Any:
        """Return the loss of the configuration."""
        raise NotImplementedError(
            f"{type(self).__name__} says no loss: put the class that knows it in front of your trainer, "
            "class Mine(FastDPOTrainer, YourDPOTrainer), or define _fastrl_translate"
        )

    def _fastrl_reference_model(self) -> Any:
        """Return the reference model."""
        # Not `self.ref_model or self.model`: a compiled model has no truth value.
        return self.model if self.ref_model is None else self.ref_model

    @contextmanager
    def _fastrl_predicting(self, prediction: Prediction | str) -> Iterator[None]:
        """Predict the gradient of the loss computed inside this context, or show the given reason why not."""
        if not torch.is_grad_enabled():
            with patched():
                yield
            return
        if isinstance(prediction, str):
            self.fastrl_path = f"log-probs first, 4 GEMM units (2 with a frozen head): {prediction}"
            with patched():
                yield
            return
        with patched(), predicting(prediction):
            yield
        if not prediction.path:
            raise RuntimeError(
                f"{type(self).__name__} computed its loss without a pass through the fused head: another patch stands "
                "between; fastrl.integrations.trl.patched() is the adapter that leaves the loss alone"
            )
        self.fastrl_path = prediction.path


def _packed(keep: Tensor, mask: Tensor) -> tuple[dict[str, Any], Any]:
    """Return (`mask`, `cu_seqlens` and `n_sequences` of the packed tokens, the function that packs a (B, T) tensor)."""
    lengths = keep.sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    inputs = {"mask": mask[keep], "cu_seqlens": offsets, "n_sequences": float(keep.shape[0])}
    return inputs, lambda x: None if x is None else x[keep]


class FastGRPOTrainer(FastLossMixin, GRPOTrainer):
    """`trl.GRPOTrainer`, any `loss_type`, with the gradient of the loss formed in the forward: 3 GEMM units, TRL's 4.

    `top_entropy_quantile` and `off_policy_mask_threshold` choose tokens by the whole batch. With them the log-probs
    come first, as in `patched()`.
    """

    def _fastrl_translate(self) -> Any:
        return policy_loss_from_config(self.args)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self._fastrl_predicting(self._fastrl_prediction(inputs)):
            return super()._compute_loss(model, inputs)

    def _fastrl_prediction(self, inputs: dict[str, Any]) -> Prediction | str:
        if self.top_entropy_quantile < 1.0:
            return "top_entropy_quantile selects by the entropies of the whole batch"
        if self.off_policy_mask_threshold is not None:
            return "off_policy_mask_threshold selects by the log-probs of whole sequences"
        keep = inputs["completion_mask"].bool()
        mask = inputs["completion_mask"] * inputs["tool_mask"] if "tool_mask" in inputs else inputs["completion_mask"]
        packed, pack = _packed(keep, mask)
        advantages = inputs["advantages"]
        packed["advantages"] = pack(advantages) if advantages.dim() == 2 else advantages
        packed["old_logprobs"] = pack(inputs.get("old_per_token_logps"))
        if self.fastrl_loss.kl is not None:
            packed["ref_logprobs"] = pack(inputs["ref_per_token_logps"])
        if self.fastrl_loss.correction is not None:
            packed["rollout_logprobs"] = pack(inputs["sampling_per_token_logps"])
        steps = self.current_gradient_accumulation_steps if self.model.training else 1.0
        scale = 1.0
        if self.loss_type in ("cispo", "dapo", "vespo"):
            total = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            packed["n_tokens"] = total * steps / self.args.steps_per_generation if self.model.training else total
            # TRL's entropy is a mean over the micro-batch, even if the policy term has another denominator.
            scale = float(packed["n_tokens"] / (mask.sum().clamp(min=1.0) * steps)) if self._fastrl_entropy() else 1.0
        return PolicyPrediction(replace(self.fastrl_loss, entropy_coef=self._fastrl_entropy() * scale), packed)

    def _fastrl_entropy(self) -> float:
        """Return the entropy coefficient of this step; the adaptive one is 0 while the entropy exceeds its target."""
        if self.use_adaptive_entropy and not self._last_world_entropy <= self.args.entropy_target:
            return 0.0
        return self.entropy_coef


class FastRLOOTrainer(FastLossMixin, RLOOTrainer):
    """`trl.RLOOTrainer` with the gradient of the loss formed in the forward: 3 GEMM units, TRL's 4."""

    def _fastrl_translate(self) -> Any:
        return policy_loss_from_config(self.args)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self._fastrl_predicting(self._fastrl_prediction(inputs)):
            return super()._compute_loss(model, inputs)

    def _fastrl_prediction(self, inputs: dict[str, Any]) -> Prediction:
        keep = inputs["completion_mask"].bool()
        packed, pack = _packed(keep, inputs["completion_mask"])
        packed["advantages"] = inputs["advantages"]
        # RLOO's ratio compares sums over a sequence, so the old sum may be spread over its tokens in any way.
        share = inputs["old_logps"] / keep.sum(1).clamp(min=1)
        packed["old_logprobs"] = pack(share[:, None].expand(keep.shape))
        return PolicyPrediction(self.fastrl_loss, packed)


class FastDPOTrainer(FastLossMixin, DPOTrainer):
    """`trl.DPOTrainer`, any `loss_type`, with the gradient of the loss formed in the forward: 3 GEMM units, TRL's 4.

    TRL's own function computes the reference's log-probs, before the policy's. With `ld_alpha`, with `use_weighting`,
    and with "aot" and "aot_unpaired", which sort the batch, the log-probs come first, as in `patched()`.
    """

    def _fastrl_translate(self) -> Any:
        return preference_loss_from_config(self.args)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        reason = self._fastrl_reason()
        if reason or not torch.is_grad_enabled():
            with self._fastrl_predicting(reason):
                return super()._compute_loss(model, inputs, return_outputs)
        before = self.precompute_ref_logps
        with patched():
            if not before:
                names = ("ref_chosen_logps", "ref_rejected_logps")
                reference = self.compute_ref_log_probs(self._fastrl_reference_model(), inputs)
                inputs = inputs | dict(zip(names, reference, strict=True))
        prediction = PairPrediction(
            self.fastrl_loss,
            inputs["completion_mask"][:, 1:].sum(1),
            inputs["completion_mask"].sum(1),
            inputs["ref_chosen_logps"],
            inputs["ref_rejected_logps"],
        )
        self.precompute_ref_logps = True
        try:
            with self._fastrl_predicting(prediction):
                return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = before

    def _fastrl_reason(self) -> str:
        if any(name in ("aot", "aot_unpaired") for name in self.loss_types):
            return "aot sorts the pairs of the batch"
        if self.ld_alpha is not None:
            return "ld_alpha weighs the tokens by the lengths of the pair"
        return "use_weighting weighs the pairs by the policy's probabilities" if self.use_weighting else ""


class FastKTOTrainer(FastLossMixin, KTOTrainer):
    """`trl.KTOTrainer`, any `loss_type`, with the gradient of the loss formed in the forward: 3 GEMM units, TRL's 4.

    TRL's own functions compute two more sets of log-probs before the policy's: the reference's, and the mismatched
    completions', from which TRL estimates the KL in the loss of every row. With images the log-probs come first, as in
    `patched()`, because TRL's function for the reference takes text only.
    """

    _fastrl_kl_logps: Tensor | None = None

    def _fastrl_translate(self) -> Any:
        return preference_loss_from_config(self.args)

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor | None:
        if self._fastrl_kl_logps is not None:
            return self._fastrl_kl_logps
        return super()._compute_kl_logps(model, batch)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        reason = "TRL's function for the reference takes no images" if self._is_vision_dataset else ""
        if reason or not torch.is_grad_enabled():
            with self._fastrl_predicting(reason):
                return super()._compute_loss(model, inputs, return_outputs)
        before = self.precompute_ref_logps
        with patched():
            kl_logps = self._compute_kl_logps(model, inputs)
            if not before:
                inputs = inputs | self._fastrl_reference(inputs)
        prediction = RowPrediction(
            self.fastrl_loss,
            inputs["completion_mask"][:, 1:].sum(1),
            inputs["label"].bool(),
            inputs["ref_logps"],
            self._fastrl_reference_point(kl_logps, inputs),
        )
        self.precompute_ref_logps, self._fastrl_kl_logps = True, kl_logps
        try:
            with self._fastrl_predicting(prediction):
                return super()._compute_loss(model, inputs, return_outputs)
        finally:
            self.precompute_ref_logps, self._fastrl_kl_logps = before, None

    def _fastrl_reference(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return the reference's log-probs (B,) under the names of precomputed ones."""
        # TRL's function leaves the cache of keys and values on, which nothing reads.
        model: Any = self._fastrl_reference_model()
        logps, kl_logps = self.compute_ref_log_probs(partial(model, use_cache=False), inputs)
        return {"ref_logps": logps} if kl_logps is None else {"ref_logps": logps, "ref_KL_logps": kl_logps}

    def _fastrl_reference_point(self, kl_logps: Tensor | None, inputs: dict[str, Any]) -> Tensor | None:
        """Return TRL's estimate of the KL, (), from the mismatched completions of all ranks."""
        if kl_logps is None:
            return None
        kl: Any = self.accelerator.gather_for_metrics((kl_logps - inputs["ref_KL_logps"]).mean().detach())
        return kl.mean().clamp(min=0)


class FastSFTTrainer(FastLossMixin, SFTTrainer):
    """`trl.SFTTrainer` with the gradient of the loss formed in the forward: 3 GEMM units, TRL's 4."""

    def _fastrl_translate(self) -> Any:
        return policy_loss_from_config(self.args)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss. A `compute_loss_func` and label smoothing use the logits of the whole batch."""
        prediction: Prediction | str = SupervisedPrediction(self.args.loss_type)
        if self.compute_loss_func is not None:
            prediction = "compute_loss_func takes the logits"
        elif self.label_smoother is not None and self.args.loss_type == "nll":
            prediction = "label_smoothing_factor takes the logits"
        with self._fastrl_predicting(prediction):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
