"""The measured cases: heads of real models, operations, and the inputs of a case.

Legend: B sequences, T tokens of one, N = B T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.samples import samples


@dataclass(frozen=True)
class Model:
    """The head of a model, from its published configuration."""

    name: str
    hidden: int
    vocabulary: int
    softcap: float | None = None
    tied: bool = False


MODELS = {
    model.name: model
    for model in (
        Model("SmolLM2-135M", 576, 49152, tied=True),
        Model("SmolLM2-1.7B", 2048, 49152, tied=True),
        Model("Qwen2.5-0.5B", 896, 151936, tied=True),
        Model("Qwen2.5-1.5B", 1536, 151936, tied=True),
        Model("Qwen2.5-7B", 3584, 152064),
        Model("Qwen2.5-32B", 5120, 152064),
        Model("Qwen2.5-72B", 8192, 152064),
        Model("Qwen3-0.6B", 1024, 151936, tied=True),
        Model("Qwen3-4B", 2560, 151936, tied=True),
        Model("Qwen3-8B", 4096, 151936),
        Model("Qwen3-32B", 5120, 151936),
        Model("Llama-3.2-1B", 2048, 128256, tied=True),
        Model("Llama-3-8B", 4096, 128256),
        Model("Llama-3-70B", 8192, 128256),
        Model("Gemma-2-9B", 3584, 256000, softcap=30.0, tied=True),
        Model("Gemma-3-270M", 640, 262144, tied=True),
        Model("Gemma-3-4B", 2560, 262208, tied=True),
        Model("tiny", 32, 509),
        Model("tiny-softcap", 32, 509, softcap=30.0),
    )
}

HIDDEN_OPERATIONS = {
    "logprobs_hidden": "hidden -> log-probs (forward only)",
    "loss_hidden": "hidden -> DAPO loss, all gradients",
    "loss_hidden_frozen": "hidden -> DAPO loss, frozen head",
    "loss_hidden_half": "hidden -> DAPO loss, half the tokens masked",
    "loss_hidden_peaked": "hidden -> DAPO loss, peaked rows, tail_mass=1e-4",
    "loss_hidden_sampled": "hidden -> DAPO loss, the model's samples at T = 0.5, tail_mass=1e-4",
    "sft_hidden": "hidden -> mean cross-entropy, all gradients",
}
LOGITS_OPERATIONS = {
    "logprobs_logits": "logits -> log-probs (forward only)",
    "loss_logits": "logits -> DAPO loss and gradient",
}
TAIL_OPERATIONS = ("loss_hidden_peaked", "loss_hidden_sampled")
OPERATIONS = {**HIDDEN_OPERATIONS, **LOGITS_OPERATIONS}

SAMPLED_MODEL, SAMPLING_TEMPERATURE = "SmolLM2-135M", 0.5
# Standard deviation of the logits. With 3, a row of 50,000 entries has about 6 nats and a largest probability of 1 %.
LOGIT_SCALE = 3.0
# Standard deviation of log(pi / pi_old): few tokens leave the clip interval, so nearly every row has a gradient.
OFF_POLICY = 0.05
SAMPLE_ROWS = 64


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    operation: str
    model: Model
    sequences: int
    length: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {self.operation!r}")
        if self.operation == "loss_hidden_sampled" and self.model.name != SAMPLED_MODEL:
            raise ValueError(f"loss_hidden_sampled must be of {SAMPLED_MODEL}, got {self.model.name}")

    @property
    def tokens(self) -> int:
        """N, the number of tokens."""
        return self.sequences * self.length

    @property
    def trains(self) -> bool:
        """Whether a backward belongs to the operation."""
        return not self.operation.startswith("logprobs")

    @property
    def from_logits(self) -> bool:
        """Whether the logits are given."""
        return self.operation in LOGITS_OPERATIONS

    @property
    def gemm_flop(self) -> int:
        """The floating-point operations of one pass of the tokens through the head."""
        return 2 * self.tokens * self.model.hidden * self.model.vocabulary

    def describe(self) -> dict[str, object]:
        """Return the case as JSON values."""
        return {
            "operation": self.operation,
            "model": self.model.name,
            "n": self.tokens,
            "sequences": self.sequences,
            "d": self.model.hidden,
            "v": self.model.vocabulary,
            "softcap": self.model.softcap,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Inputs:
    """The inputs of every contender of a case."""

    case: Case
    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    logits: Tensor | None  # (N, V)
    labels: Tensor  # (B, T)
    old_logprobs: Tensor  # (B, T) float32
    advantages: Tensor  # (B,) float32, one per sequence, so that Liger can take part
    mask: Tensor  # (B, T) float32, 0 or 1
    mean_entropy: float  # nats

    @property
    def token_advantages(self) -> Tensor:
        """The advantages per token, (B, T)."""
        return self.advantages.unsqueeze(-1).expand(self.mask.shape).contiguous()


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Return the inputs of a case: labels sampled from the model, old log-probs close to its own.

    Raises:
        Missing: the case needs a model that cannot be had here.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    n, d, v = case.tokens, case.model.hidden, case.model.vocabulary

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if case.operation == "loss_hidden_sampled":
        found = samples(SAMPLING_TEMPERATURE, n)
        # Divided by the temperature here, so that every contender sees the distribution that was sampled.
        hidden, weight = (found.hidden / found.temperature).to(device), found.weight.to(device, case.dtype)
    else:
        weight = (normal(v, d) / d**0.5).to(case.dtype)
        hidden = normal(n, d) * LOGIT_SCALE
    if case.operation == "loss_hidden_peaked":
        hidden = _peaked(hidden, weight, generator)
    hidden = hidden.to(case.dtype)
    labels, logprobs, entropy = _sample(hidden, weight, case.model.softcap, generator)
    logits = None
    if case.from_logits:
        logits = torch.cat([_logits(hidden[i : i + SAMPLE_ROWS], weight, case.model.softcap).to(case.dtype)
                            for i in range(0, n, SAMPLE_ROWS)])  # fmt: skip
    shape = (case.sequences, case.length)
    old = logprobs.view(shape) + OFF_POLICY * normal(*shape)
    advantages = normal(case.sequences)
    return Inputs(
        case=case,
        hidden=None if case.from_logits else hidden,
        weight=None if case.from_logits else weight,
        logits=logits,
        labels=labels.view(shape),
        old_logprobs=old,
        advantages=advantages,
        mask=_mask(case, device),
        mean_entropy=entropy,
    )


def _peaked(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return hidden states that point at a few entries each, as a policy sampled at temperature 0.5 does.

    One favourite and three runners-up up to 10 nats behind it give a mean entropy of about 0.4 nats. In eleven rows of
    twelve the rest of the vocabulary holds about 1e-5 of the probability, in the twelfth about 1e-2.
    """
    n, device = hidden.shape[0], hidden.device
    lead = torch.where(torch.arange(n, device=device) % 12 == 0, 16.0, 24.0).unsqueeze(-1)
    behind = 10.0 * torch.rand((n, 4), generator=generator, device=device)
    behind[:, 0] = 0.0
    states = hidden / LOGIT_SCALE
    for k in range(4):
        entry = torch.randint(0, weight.shape[0], (n,), generator=generator, device=device)
        towards = torch.nn.functional.normalize(weight[entry].float(), dim=-1)
        states = states + (lead - behind[:, k : k + 1]) * towards
    return states


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _sample(
    hidden: Tensor, weight: Tensor, softcap: float | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Return one sample of the softmax of each row, its log-prob, (N,) each, and the mean entropy in nats."""
    labels, logprobs, entropy = [], [], 0.0
    for start in range(0, hidden.shape[0], SAMPLE_ROWS):
        rows = _logits(hidden[start : start + SAMPLE_ROWS], weight, softcap).log_softmax(-1)
        probabilities = rows.exp()
        chosen = torch.multinomial(probabilities, 1, generator=generator)
        labels.append(chosen.squeeze(-1))
        logprobs.append(rows.gather(-1, chosen).squeeze(-1))
        entropy -= float((probabilities * rows).sum())
    return torch.cat(labels), torch.cat(logprobs), entropy / hidden.shape[0]


def _mask(case: Case, device: torch.device | str) -> Tensor:
    """Return the mask: all tokens, or completions of uneven lengths that add up to half of them."""
    mask = torch.ones(case.sequences, case.length, device=device)
    if case.operation != "loss_hidden_half":
        return mask
    quarter = case.length // 4
    for i in range(case.sequences):
        uneven = 0 if i == case.sequences - 1 and case.sequences % 2 else (quarter if i % 2 else -quarter)
        mask[i, case.length // 2 + uneven :] = 0.0
    return mask


CPU_OPERATIONS = (
    "logprobs_hidden",
    "loss_hidden",
    "loss_hidden_frozen",
    "loss_hidden_half",
    "loss_hidden_sampled",
    "sft_hidden",
    "logprobs_logits",
    "loss_logits",
)
GPU_OPERATIONS = tuple("loss_hidden_peaked" if name == "loss_hidden_sampled" else name for name in CPU_OPERATIONS)


def cpu_cases(quick: bool = False) -> list[Case]:
    """Return the cases of the CPU run: SmolLM2-135M's head in float32, 1024 tokens (256 in a quick run)."""
    length = 64 if quick else 256
    return [Case(operation, MODELS["SmolLM2-135M"], 4, length) for operation in CPU_OPERATIONS]


def gpu_cases() -> list[Case]:
    """Return the cases of the GPU run in bfloat16, the most telling first: a run that is out of time stops there."""
    main = [Case(operation, MODELS["Qwen3-8B"], 8, 1024, torch.bfloat16) for operation in GPU_OPERATIONS]
    others = [
        Case("loss_hidden", MODELS[name], 8, 1024, torch.bfloat16)
        for name in ("Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3-8B", "Gemma-3-4B", "Gemma-2-9B")
    ]
    lengths = [
        Case(operation, MODELS["Qwen3-8B"], sequences, 1024, torch.bfloat16)
        for sequences in (1, 4, 16)
        for operation in ("loss_hidden", "loss_logits")
    ]
    return main + others + lengths


def tiny_cases() -> list[Case]:
    """Return every operation at a size that a test can afford, but for the one that needs a model."""
    cases = [Case(operation, MODELS["tiny"], 4, 16) for operation in OPERATIONS if operation != "loss_hidden_sampled"]
    return [*cases, Case("loss_hidden", MODELS["tiny-softcap"], 4, 16)]
