"""The checks of `fastrl verify`: inputs on which kernels go wrong, properties, and the losses of several presets.

Every operation has a function that yields (name of the check, function that runs it). The second draws its inputs from
the check's own seed, runs the operation, and returns a `Verdict` by the rule of `fastrl.verify.judge`.

Legend: N rows, B batch, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import reference
from fastrl.losses.advantages.group import BACKENDS as ADVANTAGE_BACKENDS
from fastrl.losses.advantages.group import group_advantages
from fastrl.losses.policy.correction import RolloutCorrection
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.ops import linear_token_logprobs, token_logprobs
from fastrl.verify.judge import ROUNDINGS, Look, Named, Setting, Verdict, judged, max_error, same_bits, worst

OUTPUTS = ("logprobs", "entropy", "logsumexp")
HALVES = (torch.bfloat16, torch.float16)
# Vocabularies of SmolLM2, Qwen2.5 and Gemma 2.
REAL_VOCABULARIES = (49152, 151936, 256000)
# The interpreter takes seconds for one real vocabulary.
INTERPRETED_VOCABULARY = 49152
# Number of batches whose losses are judged together, because one scalar can be right by luck.
BATCHES = 8


def _on(device: torch.device, x: Any) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


def _weighted(outputs: Sequence[Tensor], upstream: Mapping[str, Tensor]) -> Tensor:
    """Return sum_t (g_t logp_t + h_t H_t + l_t lse_t) over the outputs that have an upstream gradient."""
    total = outputs[0].new_zeros(())
    for name, output in zip(OUTPUTS, outputs, strict=True):
        if name in upstream:
            total = total + (upstream[name].to(output) * output).sum()
    return total


def _upstream(n: int, generator: torch.Generator, names: Sequence[str] = OUTPUTS) -> dict[str, Tensor]:
    return {name: torch.randn(n, generator=generator) for name in names}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a vocabulary operation, and the leaves and outputs that the gradient goes through."""

    leaves: dict[str, Tensor]  # logits (N, V), or hidden (N, D), weight (V, D), bias (V,)
    labels: Tensor  # (N,)
    upstream: dict[str, Tensor]  # output -> (N,)
    options: dict[str, Any] = field(default_factory=dict)
    trains: tuple[str, ...] = ("logits", "hidden", "weight", "bias")
    own: dict[str, Any] = field(default_factory=dict)
    """Options of the operation that the reference lacks."""

    def evaluate(self, operation: Callable[..., Sequence[Tensor]], device: torch.device, dtype: Any, **own: Any) -> Any:
        """Return outputs and gradients by name. `dtype` None keeps the dtype of every leaf."""
        leaves = {
            name: leaf.to(device, dtype or leaf.dtype).detach().clone().requires_grad_(name in self.trains)
            for name, leaf in self.leaves.items()
        }
        options = {name: _on(device, value) for name, value in self.options.items()}
        if dtype is not None:
            options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        outputs = operation(**leaves, labels=self.labels.to(device), **options, **own)
        upstream = {name: g.to(device) for name, g in self.upstream.items()}
        _weighted(outputs, upstream).backward()
        found = {name: x.detach() for name, x in zip(OUTPUTS, outputs, strict=True)}
        return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}

    def run(self, setting: Setting) -> dict[str, Tensor]:
        """Return outputs and gradients of the operation under test."""
        operation = token_logprobs if "logits" in self.leaves else linear_token_logprobs
        return self.evaluate(operation, setting.device, None, backend=setting.backend, **self.own)

    def plain(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return outputs and gradients of the reference at `dtype`."""
        operation = reference.token_logprobs if "logits" in self.leaves else reference.linear_token_logprobs
        return self.evaluate(operation, device, dtype)

    def judge(self, setting: Setting) -> Verdict:
        """Judge the operation against the reference in float64 on the CPU, because some devices have no float64."""
        exact = self.plain(torch.device("cpu"), torch.float64)
        return judged(self.run(setting), exact, self.plain(setting.device, torch.float32))

    def rows(self, index: Any) -> Inputs:
        """Return the inputs of some rows."""
        per_row = ("logits", "hidden")
        return replace(
            self,
            leaves={name: x[index] if name in per_row else x for name, x in self.leaves.items()},
            labels=self.labels[index],
            upstream={name: x[index] for name, x in self.upstream.items()},
            options={name: x[index] if isinstance(x, Tensor) else x for name, x in self.options.items()},
        )


ALL_OPTIONS: dict[str, Any] = {"temperature": 0.7, "logit_scale": 0.25, "softcap": 5.0}


def logits_inputs(
    generator: torch.Generator, n: int, vocabulary: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Inputs:
    """Return random rows, the second one ignored."""
    logits = (3.0 * torch.randn(n, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    labels[1:2] = -100
    return Inputs({"logits": logits}, labels, _upstream(n, generator), options)


def hidden_inputs(
    generator: torch.Generator, n: int, vocabulary: int, dtype: torch.dtype = torch.float32, **options: Any
) -> Inputs:
    """Return random hidden states and an LM head with bias, every fifth row ignored, in chunks of 8."""
    dim = 16
    leaves = {
        "hidden": torch.randn(n, dim, generator=generator),
        "weight": torch.randn(vocabulary, dim, generator=generator) * 2 / math.sqrt(dim),
        "bias": torch.randn(vocabulary, generator=generator),
    }
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    labels[1::5] = -100
    cast = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    return Inputs(cast, labels, _upstream(n, generator), options, own={"chunk_tokens": 8})


def hard_rows(generator: torch.Generator, vocabulary: int) -> dict[str, Inputs]:
    """Return name -> four rows on which careless kernels go wrong. Most labels are the last entry."""
    base = 2.0 * torch.randn(4, vocabulary, generator=generator)
    last = torch.full((4,), vocabulary - 1)
    blocks_first, blocks_last, label_banned = base.clone(), base.clone(), base.clone()
    blocks_first[:, : vocabulary - 2] = -math.inf
    blocks_last[:, 2:] = -math.inf
    label_banned[:, -1] = -math.inf
    half = torch.where(torch.rand(base.shape, generator=generator) < 0.5, -math.inf, base)
    half[:, -1] = 1.0
    only = torch.full_like(base, -math.inf)
    only[:, -1] = 0.3
    peaked = base.clone()
    peaked[:, -1] = 14.0 + base.logsumexp(-1)
    rows = {
        "first blocks -inf": (blocks_first, last),
        "last blocks -inf": (blocks_last, torch.zeros_like(last)),
        "half of the entries -inf": (half, last),
        "all but the label -inf": (only, last),
        "label at 1 - p = 1e-6": (peaked, last),
        "label -inf": (label_banned, last),
        "offset -1e6": (base - 1e6, last),
        "equal logits": (torch.zeros_like(base), last),
    }
    # log p = -inf has no gradient of its own.
    silent = {"label -inf": OUTPUTS[1:]}
    return {
        name: Inputs({"logits": logits}, labels, _upstream(4, generator, silent.get(name, OUTPUTS)))
        for name, (logits, labels) in rows.items()
    }


def _sizes(setting: Setting) -> tuple[int, ...]:
    if setting.interpreted:
        return (INTERPRETED_VOCABULARY,)
    return REAL_VOCABULARIES[1:2] if setting.quick else REAL_VOCABULARIES


def check_token_logprobs(setting: Setting) -> Named:
    """Yield the checks of logits in."""

    def inputs(name: str, *shape: Any, **options: Any) -> Look:
        return lambda: logits_inputs(setting.generator(name), *shape, **options).judge(setting)

    for dtype in (torch.float32, *HALVES):
        name = f"{_short(dtype)}"
        yield name, inputs(name, 6, 1025, dtype)
        name = f"{_short(dtype)}, temperature, scale, softcap"
        yield name, inputs(name, 6, 1025, dtype, **ALL_OPTIONS)
    heat = torch.tensor([0.5, 1.0, 2.0, 0.1, 10.0, 0.7])
    yield "temperature per token", inputs("temperature per token", 6, 503, temperature=heat)
    yield "softcap", inputs("softcap", 6, 503, softcap=4.0)
    yield "small and ragged vocabularies", lambda: worst(inputs(f"V={v}", 5, v)() for v in (1, 2, 127, 128, 1023))
    hard = hard_rows(setting.generator("hard"), 1030)
    for name, case in hard.items():
        yield name, lambda case=case: case.judge(setting)
    yield "offset 1e6 costs nothing", lambda: _offset(setting)
    yield "1 - p down to 1e-12, relative", lambda: _near_certain(setting)
    for size in _sizes(setting):
        for dtype in (torch.float32,) if setting.quick or setting.interpreted else (torch.float32, torch.bfloat16):
            name = f"vocabulary {size}, {_short(dtype)}"
            yield name, inputs(name, 3, size, dtype)
    yield from _bitwise(setting, logits_inputs)


def check_linear_token_logprobs(setting: Setting) -> Named:
    """Yield the checks of hidden states in: trainable head, frozen head, every dtype."""

    def case(name: str, *shape: Any, frozen: bool = False, only: tuple[str, ...] = OUTPUTS, **options: Any) -> Look:
        def look() -> Verdict:
            drawn = hidden_inputs(setting.generator(name), *shape, **options)
            upstream = {output: g for output, g in drawn.upstream.items() if output in only}
            trains = ("hidden",) if frozen else drawn.trains
            return replace(drawn, upstream=upstream, trains=trains).judge(setting)

        return look

    for dtype in (torch.float32, *HALVES):
        name = _short(dtype)
        yield name, case(name, 20, 300, dtype)
        yield f"{name}, temperature, scale, softcap", case(f"{name} options", 20, 300, dtype, **ALL_OPTIONS)
        name = f"{name}, frozen head"
        yield name, case(name, 20, 300, dtype, frozen=True, only=("logprobs",))
    name = "frozen head, entropy and logsumexp"
    yield name, case(name, 20, 300, frozen=True)
    heat = torch.linspace(0.3, 3.0, 20)
    yield "temperature per token", case("temperature per token", 20, 300, temperature=heat)
    yield "tokens banned by a bias of -inf", lambda: _banned(setting)
    for size in _sizes(setting):
        name = f"vocabulary {size}, float32"
        yield name, case(name, 5, size)
        # Some GEMMs of a row count that is not a multiple of 4 sum the vocabulary ten times less accurately.
        name = f"vocabulary {size}, 3 live rows"
        yield name, case(name, 4, size)
    yield from _bitwise(setting, hidden_inputs)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _offset(setting: Setting) -> Verdict:
    """Judge rows at an offset of 1e6 by the error of eager code on the same rows without the offset.

    float32 logits near 1e6 are multiples of 1/16, so removing the offset is exact. Adding it to the logsumexp rounds.
    """
    inputs = logits_inputs(setting.generator("offset"), 6, 1025)
    inputs = replace(inputs, upstream={name: inputs.upstream[name] for name in OUTPUTS[:2]})
    shifted = replace(inputs, leaves={"logits": inputs.leaves["logits"] + 1e6})
    centred = replace(inputs, leaves={"logits": shifted.leaves["logits"] - 1e6})
    result = shifted.run(setting)
    exact = shifted.plain(torch.device("cpu"), torch.float64)
    eager = centred.plain(setting.device, torch.float32)
    live = inputs.labels != -100
    eager["logsumexp"][live.to(setting.device)] += 1e6
    return judged(result, exact, eager)


def _near_certain(setting: Setting) -> Verdict:
    """Judge the relative errors of log p and p - 1 for p that float32 rounds to 1. Eager code gets these all wrong.

    The bound is `ROUNDINGS` roundings of the largest gap between logits, the error of rounding the argument of exp.
    """
    gaps = torch.tensor([6e-6, 1e-7, 1e-9, 1e-12], dtype=torch.float64)
    logits = torch.zeros(gaps.numel(), 64)
    logits[:, 7] = (63.0 / gaps).log().float()
    inputs = Inputs({"logits": logits}, torch.full((gaps.numel(),), 7), {"logprobs": torch.ones(gaps.numel())})
    result, exact = inputs.run(setting), inputs.plain(torch.device("cpu"), torch.float64)
    # The float64 reference forms log p as a difference, in which 1e-12 has 4 digits. Exactly, it is -log1p(63 / e^z).
    others = 63.0 * torch.exp(-logits[:, 7].double())
    truth = {"logprobs": -torch.log1p(others), "dlogits": others / (1.0 + others)}
    found = {"logprobs": result["logprobs"], "dlogits": result["dlogits"][:, 7]}
    granted = ROUNDINGS * torch.finfo(torch.float32).eps * float(logits.max())
    max_error(result["dlogits"], exact["dlogits"])
    return worst(
        Verdict(f"{name} / exact", max_error(found[name].double().cpu() / right, torch.ones_like(right)), granted)
        for name, right in truth.items()
    )


def _banned(setting: Setting) -> Verdict:
    inputs = hidden_inputs(setting.generator("banned"), 20, 300)
    bias = inputs.leaves["bias"].clone()
    bias[50:250] = -math.inf
    labels = torch.where(inputs.labels >= 0, inputs.labels % 50, inputs.labels)
    return replace(inputs, leaves=inputs.leaves | {"bias": bias}, labels=labels).judge(setting)


def _bitwise(setting: Setting, draw: Callable[..., Inputs]) -> Named:
    """Yield the checks that two ways to compute the same rows give the same bits."""
    n = 21 if setting.interpreted else 77
    inputs = draw(setting.generator("bitwise"), n, 203 if setting.interpreted else 1003)
    # A head's gradient sums over rows, so its bits depend on their order. Bits of a row must not.
    per_row = (*OUTPUTS, "dlogits") if draw is logits_inputs else OUTPUTS

    def rows(of: Inputs) -> dict[str, Tensor]:
        return {name: x for name, x in of.run(setting).items() if name in per_row}

    def permuted() -> Verdict:
        order = torch.randperm(n, generator=setting.generator("order"))
        whole = {name: x[order.to(x.device)] for name, x in rows(inputs).items()}
        return same_bits(rows(inputs.rows(order)), whole)

    def split() -> Verdict:
        cuts = (0, 1, n // 3, n)
        parts = [rows(inputs.rows(slice(a, b))) for a, b in itertools.pairwise(cuts)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return same_bits(joined, rows(inputs))

    def masked() -> Verdict:
        name = "logits" if draw is logits_inputs else "hidden"
        dead = inputs.labels == -100
        leaf = inputs.leaves[name].clone()
        leaf[dead] = math.nan
        upstream = {output: torch.where(dead, math.nan, g) for output, g in inputs.upstream.items()}
        poisoned = replace(inputs, leaves=inputs.leaves | {name: leaf}, upstream=upstream)
        clean = replace(inputs, upstream={output: torch.where(dead, 0.0, g) for output, g in inputs.upstream.items()})
        return same_bits(_run_masked(poisoned, setting), _run_masked(clean, setting))

    yield "bits: NaN under the mask", masked
    yield "bits: row order", permuted
    yield "bits: batch split", split
    yield "bits: repeat", lambda: same_bits(inputs.run(setting), inputs.run(setting))


def _run_masked(inputs: Inputs, setting: Setting) -> dict[str, Tensor]:
    """Return outputs and gradients. A weighted sum would turn an upstream NaN under the mask into NaN everywhere."""
    operation = token_logprobs if "logits" in inputs.leaves else linear_token_logprobs
    leaves = {name: leaf.to(setting.device).clone().requires_grad_() for name, leaf in inputs.leaves.items()}
    outputs = operation(**leaves, labels=inputs.labels.to(setting.device), backend=setting.backend, **inputs.own)
    upstream = [inputs.upstream[name].to(setting.device) for name in OUTPUTS]
    gradients = torch.autograd.grad(list(outputs), list(leaves.values()), upstream)
    found = {name: x.detach() for name, x in zip(OUTPUTS, outputs, strict=True)}
    return found | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


POLICIES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss.preset("grpo", kl="k3", kl_coef=0.05),
    "dapo": PolicyLoss.preset("dapo"),
    "gspo": PolicyLoss.preset("gspo"),
    "grpo + entropy, truncated correction": PolicyLoss.preset(
        "grpo", entropy_coef=0.01, correction=RolloutCorrection(low=0.5, high=1.1)
    ),
    "sft": PolicyLoss.preset("sft"),
    "ppo": PolicyLoss.preset("ppo"),
    "dr_grpo": PolicyLoss.preset("dr_grpo"),
    "rloo": PolicyLoss.preset("rloo"),
    "cispo": PolicyLoss.preset("cispo"),
    "gmpo": PolicyLoss.preset("gmpo"),
    "sapo": PolicyLoss.preset("sapo"),
    "vespo": PolicyLoss.preset("vespo"),
    "topr": PolicyLoss.preset("topr"),
}
QUICK_POLICIES = 4
# Its inverse is exact. A rounded 1/T would be a common factor of all log-probs, which does not average out in a loss.
TEMPERATURE = 2.0


class PolicyBatch(NamedTuple):
    """One batch: hidden states and head, or their logits, and a trainer's values for the tokens."""

    leaves: dict[str, Tensor]  # logits (B, T, V), or hidden (B, T, D), weight (V, D)
    labels: Tensor  # (B, T)
    tokens: dict[str, Tensor]  # (B, T), advantages (B,)


def policy_batch(generator: torch.Generator, from_logits: bool, dtype: torch.dtype) -> PolicyBatch:
    """Return a batch whose old, reference and rollout log-probs lie near the current ones."""
    b, t, dim, vocabulary = 4, 7, 12, 211
    hidden = torch.randn(b, t, dim, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, dim, generator=generator) * 2 / math.sqrt(dim)).to(dtype)
    labels = torch.randint(0, vocabulary, (b, t), generator=generator)
    mask = torch.rand(b, t, generator=generator) < 0.75
    mask[:, 0] = True
    logits = (hidden.float() @ weight.float().t()).to(dtype)
    current = (logits.float() / TEMPERATURE).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def near(distance: float) -> Tensor:
        return current + distance * torch.randn(b, t, generator=generator)

    tokens = {"old_logprobs": near(0.2), "ref_logprobs": near(0.3), "rollout_logprobs": near(0.2)}
    tokens |= {"mask": mask, "advantages": torch.randn(b, generator=generator)}
    leaves = {"logits": logits} if from_logits else {"hidden": hidden, "weight": weight}
    return PolicyBatch(leaves, labels, tokens)


def fused_loss(spec: PolicyLoss, batch: PolicyBatch, setting: Setting) -> dict[str, Tensor]:
    """Return loss and gradients of the operation under test, with NaN under the mask."""
    mask = batch.tokens["mask"]
    leaves = {
        name: (leaf if name == "weight" else torch.where(mask.unsqueeze(-1), leaf, math.nan))
        .to(setting.device)
        .clone()
        .requires_grad_()
        for name, leaf in batch.leaves.items()
    }
    inputs = {name: value.to(setting.device) for name, value in batch.tokens.items()}
    labels = batch.labels.to(setting.device)
    options = {"temperature": TEMPERATURE, "backend": setting.backend, **inputs}
    if "logits" in leaves:
        output = spec.from_logits(leaves["logits"], labels, **options)
    else:
        output = spec.from_hidden(leaves["hidden"], leaves["weight"], labels, chunk_tokens=8, **options)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {f"d{name}": _gradient(leaf) for name, leaf in leaves.items()}


def plain_loss(spec: PolicyLoss, batch: PolicyBatch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return loss and gradients of the reference at `dtype`."""
    leaves = {name: leaf.to(device, dtype).clone().requires_grad_() for name, leaf in batch.leaves.items()}
    tokens = {name: x.to(device) if x.dtype == torch.bool else x.to(device, dtype) for name, x in batch.tokens.items()}
    mask, (b, t) = tokens.pop("mask"), batch.labels.shape
    labels = torch.where(mask, batch.labels.to(device), -100)
    if "logits" in leaves:
        logprobs, entropy, _ = reference.token_logprobs(leaves["logits"], labels, TEMPERATURE)
    else:
        hidden, weight = leaves["hidden"], leaves["weight"]
        logprobs, entropy, _ = reference.linear_token_logprobs(hidden, weight, labels, temperature=TEMPERATURE)
    advantages = tokens.pop("advantages").unsqueeze(-1).expand(b, t).reshape(-1)
    loss, _, _ = reference.policy_loss(
        spec,
        logprobs.reshape(-1),
        advantages=advantages,
        mask=mask.reshape(-1),
        lengths=torch.full((b,), t, device=device),
        entropy=entropy.reshape(-1),
        positive=advantages > 0,
        constant=spec.constant if spec.constant is not None else t,
        **{name: x.reshape(-1) for name, x in tokens.items()},
    )
    loss.backward()
    return {"loss": loss.detach()} | {f"d{name}": _gradient(leaf) for name, leaf in leaves.items()}


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def check_policy_loss(setting: Setting) -> Named:
    """Yield the checks of the whole loss, from logits and from hidden states, for several presets."""

    def look(spec: PolicyLoss, name: str, from_logits: bool, dtype: torch.dtype) -> Verdict:
        generator = setting.generator(name)
        batches = [policy_batch(generator, from_logits, dtype) for _ in range(BATCHES)]

        def joined(evaluate: Callable[[PolicyBatch], dict[str, Tensor]]) -> dict[str, Tensor]:
            found = [evaluate(batch) for batch in batches]
            return {part: torch.stack([each[part] for each in found]) for part in found[0]}

        return judged(
            joined(lambda batch: fused_loss(spec, batch, setting)),
            joined(lambda batch: plain_loss(spec, batch, torch.device("cpu"), torch.float64)),
            joined(lambda batch: plain_loss(spec, batch, setting.device, torch.float32)),
        )

    chosen = list(POLICIES)[: QUICK_POLICIES if setting.quick or setting.interpreted else None]
    for source in ("logits", "hidden"):
        for name in chosen:
            dtypes = (torch.float32, torch.bfloat16) if name == "grpo" else (torch.float32,)
            for dtype in dtypes:
                title = f"{name}, {source}{'' if dtype == torch.float32 else f', {_short(dtype)}'}"
                yield (
                    title,
                    lambda name=name, title=title, source=source, dtype=dtype: look(
                        POLICIES[name], title, source == "logits", dtype
                    ),
                )


def plain_advantages(rewards: Tensor, groups: Tensor, scale: str, baseline: str, eps: float) -> Tensor:
    """Return the advantages by plain code, group by group."""
    found = torch.zeros_like(rewards)
    for group in groups.unique():
        place = groups == group
        own = rewards[place]
        centred = own - own.mean()
        if baseline == "leave_one_out":
            centred = own - (own.sum() - own) / (own.numel() - 1)
        deviation = {"group": own, "batch": rewards}.get(scale)
        found[place] = centred if deviation is None else centred / (deviation.std() + eps)
    return found


def check_group_advantages(setting: Setting) -> Named:
    """Yield the checks of the advantages, on their own backends."""
    if setting.backend not in ADVANTAGE_BACKENDS:
        return

    def compute(rewards: Tensor, groups: Tensor, **options: Any) -> dict[str, Tensor]:
        rewards, groups = rewards.to(setting.device), groups.to(setting.device)
        found = group_advantages(rewards, group_ids=groups, backend=setting.backend, **options)
        assert isinstance(found, Tensor)
        return {"advantages": found}

    def accuracy(scale: str, baseline: str) -> Verdict:
        generator = setting.generator(scale + baseline)
        groups = torch.arange(40).remainder(9)[torch.randperm(40, generator=generator)]
        rewards = torch.randn(40, generator=generator) + groups
        exact = plain_advantages(rewards.double(), groups, scale, baseline, 1e-4)
        eager = plain_advantages(rewards, groups, scale, baseline, 1e-4)
        result = compute(rewards, groups, scale=scale, baseline=baseline, eps=1e-4)
        return judged(result, {"advantages": exact}, {"advantages": eager})

    def zeros() -> Verdict:
        # A group of one, a group of equal rewards, and a missing reward beside two others.
        rewards = torch.tensor([0.3, 0.1, 0.1, 0.1, math.nan, 1.0, 2.0])
        groups = torch.tensor([0, 1, 1, 1, 2, 2, 2])
        found = compute(rewards, groups)["advantages"][:5]
        return same_bits({"advantages": found}, {"advantages": torch.zeros_like(found)})

    for scale in ("group", "batch", "none"):
        yield f"scale {scale}", lambda scale=scale: accuracy(scale, "group_mean")
    yield "leave one out", lambda: accuracy("none", "leave_one_out")
    yield "bits: groups of one, equal and missing rewards", zeros


OPERATIONS: dict[str, Callable[[Setting], Named]] = {
    "token_logprobs": check_token_logprobs,
    "linear_token_logprobs": check_linear_token_logprobs,
    "policy_loss": check_policy_loss,
    "group_advantages": check_group_advantages,
}
