"""Golden cases of the policy loss: the `PolicyLoss` that a case describes, and its value on the case's inputs."""

from __future__ import annotations

import dataclasses

import torch
from golden import Case
from torch import Tensor

from fastrl.losses.masks import (
    covariance_keep_mask,
    high_entropy_mask,
    off_policy_sequence_mask,
    rollout_divergence_mask,
)
from fastrl.losses.output import LossOutput
from fastrl.losses.policy import PolicyLoss, RolloutCorrection

FIELDS = {field.name for field in dataclasses.fields(PolicyLoss)}


def _correction(case: Case) -> RolloutCorrection | None:
    given = case.hyper.get("correction")
    if given is None:
        return None
    names = {field.name for field in dataclasses.fields(RolloutCorrection)}
    return RolloutCorrection(**{k: v for k, v in given.items() if k in names})


def build(case: Case) -> PolicyLoss:
    """Return the `PolicyLoss` that the case's neutral hyper-parameters describe."""
    hyper = {k: v for k, v in case.hyper.items() if k in FIELDS and k != "correction"}
    if hyper["aggregate"] == "microbatch_token_mean":
        hyper["aggregate"] = "token_mean"
    if case.hyper.get("kl_tokens"):
        hyper["kl_fraction"] = case.hyper["kl_tokens"]["fraction"]
    return PolicyLoss(**hyper, correction=_correction(case))


def selection_of(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the selection or the replaced mask that the case describes, from its formula."""
    given, mask = case.hyper.get("selection"), inputs["mask"] != 0
    if given is None:
        return {}
    logprobs = inputs["logprobs"].detach()
    if given["kind"] == "off_policy_sequence":
        other = inputs["rollout_logprobs"] if given["against"] == "rollout" else inputs["old_logprobs"]
        keep = off_policy_sequence_mask(logprobs, other, inputs["advantages"], mask, threshold=given["threshold"])
        return {"selection": keep}
    if given["kind"] == "high_entropy":
        return {"selection": high_entropy_mask(inputs["entropy"], mask, fraction=given["fraction"])}
    if given["kind"] == "drop_covariance":
        bounds = {name: case.hyper[name] for name in ("clip_low", "clip_high")}
        bounds |= {name: given[name] for name in ("low", "high", "fraction")}
        keep = covariance_keep_mask(logprobs, inputs["old_logprobs"], inputs["advantages"], mask, **bounds)
        return {"selection": keep}
    fields = {name: given[name] for name in ("level", "divergence", "low", "high", "log_ratio_clamp")}
    train = inputs[given.get("train") or "old_logprobs"].detach()
    rollout = inputs[given.get("rollout") or "rollout_logprobs"]
    keep = mask & rollout_divergence_mask(train, rollout, mask, **fields)
    if "effective_mask" in case.outputs:
        assert torch.equal(keep, case.outputs["effective_mask"] != 0)
    return {"mask": keep}


def arguments_of(case: Case, loss: PolicyLoss, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    hyper = case.hyper
    names = ("logprobs", "advantages", "mask", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy", "scores")
    arguments = {name: inputs[name] for name in names if name in inputs}
    arguments |= {name: hyper[name] for name in ("n_tokens", "n_sequences") if hyper.get(name) is not None}
    if hyper.get("advantage"):
        arguments["advantages"] = (inputs["ref_logprobs"] - inputs["logprobs"]).detach()
    if loss.aggregate == "prompt_mean":
        arguments["group_ids"] = inputs["group_ids"]
    if "old_logprobs" in arguments and hyper["ratio_anchor"] == "self" and hyper["kl_to"] != "old":
        del arguments["old_logprobs"]
    return arguments | selection_of(case, inputs)


def output_of(case: Case, loss: PolicyLoss, inputs: dict[str, Tensor]) -> LossOutput:
    return loss(**arguments_of(case, loss, inputs))


def call(case: Case, loss: PolicyLoss, inputs: dict[str, Tensor]) -> Tensor:
    hyper, arguments = case.hyper, arguments_of(case, loss, inputs)
    if hyper["aggregate"] == "microbatch_token_mean":
        size = hyper["micro_batch_size"]
        rows = inputs["mask"].shape[0]
        parts = [{k: v[i : i + size] for k, v in arguments.items()} for i in range(0, rows, size)]
        value = sum(loss(**part).loss for part in parts) / len(parts)
    else:
        value = output_of(case, loss, inputs).loss
    value = value * hyper.get("scale", 1.0)
    if hyper.get("positive_nll_coef"):
        right = (inputs["rewards"] > 0).unsqueeze(1) & (inputs["mask"] != 0)
        value = value + hyper["positive_nll_coef"] * PolicyLoss.preset("sft")(inputs["logprobs"], mask=right).loss
    return value
