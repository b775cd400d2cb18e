"""Small faults put into the policy arithmetic by replacing source text: a check worth having notices each of them."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Mutation(NamedTuple):
    """A fault: `old`, found once in the source, becomes `new`."""

    name: str
    old: str
    new: str


REFERENCE = [
    Mutation("correction weight dropped", "weights = weights * correction", "weights = weights"),
    Mutation("correction inverted", "torch.where(known, old - rollout, 0.0)", "torch.where(known, rollout - old, 0.0)"),
    Mutation("correction not normalised", "weights = weights / mean.clamp(", "weights = weights * mean.clamp("),
    Mutation("correction bounds open", "weights = one_sided(weights, spec.low, spec.high)", "weights = weights * 1.0"),
    Mutation("selection ignored", "weights = torch.where(batch.selection, weights, 0.0)", "weights = weights * 1.0"),
    Mutation("kl_coef dropped", "kl_weights = spec.kl_coef * scale", "kl_weights = scale"),
    Mutation(
        "kl_tokens ignored",
        "kl_weights = torch.where(batch.kl_tokens, kl_weights, 0.0)",
        "kl_weights = kl_weights * 1.0",
    ),
    Mutation(
        "entropy sign flipped",
        "contribution = contribution - torch.where(columns.entropy_weights",
        "contribution = contribution + torch.where(columns.entropy_weights",
    ),
    Mutation(
        "entropy follows the aggregate",
        'entropy_weights = spec.entropy_coef * aggregate_weights(\n            "token_mean", mask',
        'entropy_weights = spec.entropy_coef * aggregate_weights(\n            "token_sum", mask',
    ),
    Mutation("clip bounds swapped", "else 1.0 + spec.clip_high", "else 1.0 + (spec.clip_low or 0.0)"),
    Mutation("lower clip sign flipped", "else 1.0 - spec.clip_low", "else 1.0 + spec.clip_low"),
    Mutation("minimum for maximum", "loss = torch.maximum(-capped", "loss = torch.minimum(-capped"),
    Mutation("dual clip on the other side", "floor = -spec.dual_clip * adv", "floor = spec.dual_clip * adv"),
    Mutation(
        "dual clip for every sign",
        "loss = torch.where(advantages < 0, torch.minimum(loss, floor), loss)",
        "loss = torch.minimum(loss, floor)",
    ),
    Mutation("max_ratio ignored", "capped = one_sided(ratio, None, spec.max_ratio)", "capped = ratio"),
    Mutation("weight not detached", "weight = ratio.detach()", "weight = ratio * 1.0"),
    Mutation("weight bounds open", "loss = -one_sided(weight, spec.weight_low, spec.weight_high)", "loss = -weight"),
    Mutation("reinforce sign flipped", "return -advantages * logprobs, never", "return advantages * logprobs, never"),
    Mutation("importance detached", "return -advantages * ratio, never", "return -advantages * weight, never"),
    Mutation("square residual sign flipped", "return tau * u - target", "return tau * u + target"),
    Mutation("square without its tau", ".square() / (2.0 * spec.square_tau), never", ".square() / 2.0, never"),
    Mutation("nll sign flipped", "return -logprobs, never", "return logprobs, never"),
    Mutation("dft weight not detached", "-logprobs.detach().exp() * logprobs", "-logprobs.exp() * logprobs"),
    Mutation("sapo temperatures swapped", "spec.tau_pos, spec.tau_neg, ratio", "spec.tau_neg, spec.tau_pos, ratio"),
    Mutation("sapo factor dropped", "return -(2.0 / tau) * (1.0 + torch", "return -(1.0 / tau) * (1.0 + torch"),
    Mutation("vespo rate sign flipped", "u.detach() - rate * u.detach()", "u.detach() + rate * u.detach()"),
    Mutation("vespo exponents swapped", "spec.k_pos, spec.k_neg, ratio", "spec.k_neg, spec.k_pos, ratio"),
    Mutation("geometric detached", "return -ratio * advantages, below", "return -weight * advantages, below"),
    Mutation(
        "geometric clips the other side",
        "columns.advantages > 0, one_sided(u, None",
        "columns.advantages < 0, one_sided(u, None",
    ),
    Mutation("mask inverted", "torch.where(outside, 0.0, weight)", "torch.where(outside, weight, 0.0)"),
    Mutation("topr sign swapped", "torch.where(columns.positive, 1.0", "torch.where(~columns.positive, 1.0"),
    Mutation("divergence low bound flipped", "(p - q < -low) & (~pos", "(p - q < low) & (~pos"),
    Mutation("divergence sign rule swapped", "(p - q > high) & (positive", "(p - q > high) & (~positive"),
    Mutation(
        "binary KL direction ignored", "(divergence > high) & positive & (p > q)", "(divergence > high) & positive"
    ),
    Mutation(
        "divergence weight unbounded",
        "0.0, one_sided(weight, spec.weight_low, spec.weight_high))\n    return -capped",
        "0.0, weight)\n    return -capped",
    ),
    Mutation("k3 linear term flipped", "exp_linear(-x) - 1.0, inside) + x", "exp_linear(-x) - 1.0, inside) - x"),
    Mutation("k3 series with another derivative", "return grad * torch.expm1(x)", "return grad * x"),
    Mutation("k3 series without its half", "return 0.5 * x * x * series", "return x * x * series"),
    Mutation(
        "k3 series of the other sign",
        "exp_remainder(torch.where(near, -x, 0.0))",
        "exp_remainder(torch.where(near, x, 0.0))",
    ),
    Mutation("k2 without its half", "return 0.5 * x.square()", "return x.square()"),
    Mutation("abs without its bars", "return x.abs()", "return x"),
    Mutation("KL ratio detached", "if late else value * ratio", "if late else value * ratio.detach()"),
    Mutation(
        "straight-through gradient is the estimate's",
        "return value.detach() + (k2 - k2.detach())",
        "return value + (k2.detach() - k2.detach())",
    ),
    Mutation("kl_ratio_max ignored", "one_sided(ratio.detach(), None, ratio_max)", "ratio.detach()"),
    Mutation("KL value clamp ignored", "value = one_sided(value, *_symmetric(value_clamp))", "value = value * 1.0"),
    Mutation(
        "KL clamp always before",
        'late = gradient == "ratio_weighted" and value_clamp_order == "after"',
        "late = False",
    ),
    Mutation(
        "KL clamp always after", 'late = gradient == "ratio_weighted" and value_clamp_order == "after"', "late = True"
    ),
    Mutation(
        "KL log-ratio clamp ignored", "value = kl_value(one_sided(raw, low, high), est", "value = kl_value(raw, est"
    ),
    Mutation("one token too many", "per_sequence = (one / n_tokens)", "per_sequence = (one / (n_tokens + 1))"),
    Mutation("denominator_eps ignored", "(counts.clamp(min=1.0) + denominator_eps)", "counts.clamp(min=1.0)"),
    Mutation("empty sequences counted", "n_sequences = (counts > 0).sum()", "n_sequences = (counts >= 0).sum()"),
    Mutation("sequence_sum divided by nothing", "per_sequence = (one / n_sequences)", "per_sequence = (one / 1)"),
    Mutation("constant dropped", "(one / (n_sequences * constant))", "(one / n_sequences)"),
    Mutation("prompts not averaged", "one / (n_groups * per_group", "one / (per_group"),
    Mutation("sum for mean", 'if spec.ratio_level == "sequence_sum"', 'if spec.ratio_level != "sequence_sum"'),
    Mutation("GSPO-token not detached", "pooled.detach() + (logprobs", "pooled + (logprobs"),
    Mutation(
        "sequence_log_ratio_max ignored", "return one_sided(pooled, None, spec.sequence_log_ratio_max)", "return pooled"
    ),
    Mutation("log_ratio_clamp ignored", "return one_sided(u, *_symmetric(spec.log_ratio_clamp))", "return u"),
]

KERNEL = [
    Mutation("tie not halved", "to_free = tl.where(tie, 0.5, ", "to_free = tl.where(tie, 1.0, "),
    Mutation("free branch loses its gate", "_gate(-to_free * advantages, ratio,", "_gate(-to_free * advantages, 0.0,"),
    Mutation("clamp bounds exclusive", "(x >= low) & (x <= high), gradient", "(x > low) & (x < high), gradient"),
    Mutation("roof on the wrong side", "roof = -dual_clip * advantages", "roof = dual_clip * advantages"),
    Mutation("sigmoid slope without its factor", "-4.0 * slope * advantages", "-4.0 * slope * sigmoid * advantages"),
    Mutation("policy weight dropped", "tl.where(counts, weights * d_ratio, 0.0)", "tl.where(counts, d_ratio, 0.0)"),
    Mutation("weight 0 multiplies", "tl.where(counts, weights * surrogate, 0.0)", "weights * surrogate * 2.0"),
    Mutation("slope of the tangent", "tl.where(far, EXP_AT_LIMIT, near)", "tl.where(far, beyond, near)"),
    Mutation("KL product not bounded", "value = _between(weighted, ", "value = weighted + 0.0 * _between(weighted, "),
    Mutation("KL product's gate dropped", "d_ratio = let_through * raw_value", "d_ratio = raw_value"),
    Mutation("square without its tau", "surrogate = d_u * d_u / (2.0 * tau)", "surrogate = d_u * d_u / 2.0"),
    Mutation("square residual halved", "d_u = tau * u - advantages", "d_u = 0.5 * (tau * u - advantages)"),
    Mutation("log-ratio gate dropped", "tl.where(token_inside > 0, grad_u, 0.0)", "grad_u"),
    Mutation("own ratio's gate dropped", "tl.where(kl_inside > 0, d_ratio * kl_slope, 0.0)", "d_ratio * kl_slope"),
    Mutation(
        "limit of the sequence dropped",
        "tl.where(u <= LOG_RATIO_LIMIT, grad_ratio * ratio_slope, 0.0)",
        "grad_ratio * ratio_slope",
    ),
    Mutation("KL gradient sign flipped", "beyond_linear), -expm1", "beyond_linear), expm1"),
    Mutation(
        "entropy ignored", "contribution -= tl.where(entropy_weights", "contribution -= 0.5 * tl.where(entropy_weights"
    ),
    Mutation("sign of 0 is 1", "tl.where(x > 0, 1.0, tl.where", "tl.where(x >= 0, 1.0, tl.where"),
]

LOGITS_KERNEL = [
    Mutation("entropy gradient flipped", "h -= tl.load(", "h += tl.load("),
    Mutation("residual ignored", "bias = -LOG2E * residual", "bias = 0.0 * residual"),
    Mutation("masked rows are read", "live = label != ignore_index", "live = label == label"),
    Mutation("zero rows not written", "        zero_row(out_block_ptr, stride_out_v, V, BLOCK_V)", "        pass"),
    Mutation("weight 0 multiplies", "live & ((g != 0) | (h != 0))", "live"),
    Mutation("entropy's rows left out", "((g != 0) | (h != 0))", "(g != 0)"),
    Mutation("other order of sums", "BLOCK_SCAN=tile.block", "BLOCK_SCAN=tile.block // 4"),
    Mutation("label outside is finite", 'logp = tl.where(in_vocab, logp, float("nan"))', "logp = logp * 1.0"),
    Mutation("factor never 1", "(factor == 1.0) & IN_PLACE", "(factor != 1.0) & IN_PLACE"),
    Mutation("anchors swapped", "anchors = (anchor_ptr, kl_anchor_ptr, ", "anchors = (kl_anchor_ptr, anchor_ptr, "),
]


def mutated_source(mutation: Mutation, modules: Sequence[ModuleType]) -> tuple[ModuleType, str]:
    """Return the module of the list that holds the text, and its source with the fault in it."""
    sources = [(module, inspect.getsource(module)) for module in modules]
    counts = {module.__name__: source.count(mutation.old) for module, source in sources}
    assert sum(counts.values()) == 1, f"{mutation.name}: expected {mutation.old!r} once, found {counts}"
    module, source = next((module, source) for module, source in sources if mutation.old in source)
    return module, source.replace(mutation.old, mutation.new)


def load(source: str, name: str, folder: Path) -> ModuleType:
    """Return a module made from source text; a file, because Triton reads the source of its kernels."""
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module
