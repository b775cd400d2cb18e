"""Measure time and memory of a host's own code and of the adapter in its place, in turns in one process.

    python scripts/host_cost.py [--rounds 5] [--threads 2] [--tokens 256] [HOST ...]
    python scripts/host_cost.py --checkout HOST=FOLDER [--sequences 64] [--length 4096] [--cpu-time] [HOST ...]

The script runs forward and backward of a loss or of log-probs in float32, with the host's own code and with fastrl.

    Liger, verl, OpenRLHF             the installed package, with a head of SmolLM2-135M's size
                                      (49,152 tokens, hidden size 576)
    slime, NeMo-RL, SkyRL, prime-rl   a clone (see host_losses.py), compiled if the project compiles it: the arithmetic
                                      on one log-prob per token, and slime's log-probs of logits
    TRL's trainers                    see trl_step_time.py

"With the proof" is a first call, which runs the host's loss too.

Other processes on the machine disturb both sides, so the best of the rounds counts. `--cpu-time` counts the time of
this process instead of the clock's, which other processes hardly change with `--threads 1`. Memory is the peak of
PyTorch's allocations beyond the inputs, with results and gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.measure import peak_bytes

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, HIDDEN, ROWS = 49152, 576, 4
SPREAD = 0.05
"""Standard deviation of the log-ratios, in nats."""
Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the batches."""

    tokens: int
    """Tokens of a batch with hidden states or logits."""
    sequences: int
    """Sequences of a batch with one log-prob per token."""
    length: int
    """Tokens of each sequence."""


def needs(path: str) -> ModuleType:
    """Return a module of a host, or raise `ImportError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(path)


def leaves(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states (ROWS, T, D), the head (V, D) and labels (ROWS, T)."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, tokens // ROWS, HIDDEN, requires_grad=True)
    weight = (0.05 * torch.randn(VOCABULARY, HIDDEN)).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (ROWS, tokens // ROWS))


def backward(loss: Tensor, *inputs: Tensor) -> None:
    """Form the gradients of a loss and drop them."""
    torch.autograd.grad(loss, inputs)


def liger_grpo(sizes: Sizes) -> Ways:
    """Liger's chunked GRPO loss."""
    theirs, ours = needs("liger_kernel.chunked_loss"), needs("fastrl.integrations.liger")
    hidden, weight, labels = leaves(sizes.tokens)
    mask, advantages = torch.ones(labels.shape), torch.tensor([1.0, -1.0, 0.5, -0.5])
    old = -11.0 * torch.ones(labels.shape)

    def way(module: Any) -> Callable[[], None]:
        return lambda: backward(
            module(hidden, weight, labels, mask, advantages, old_per_token_logps=old)[0], hidden, weight
        )

    options = {"beta": 0.0, "use_ref_model": False, "loss_type": "grpo"}
    return {
        "Liger": way(theirs.LigerFusedLinearGRPOLoss(**options, compiled=False)),
        "fastrl": way(ours.LigerFusedLinearGRPOLoss(**options)),
    }


def liger_dpo(sizes: Sizes) -> Ways:
    """Liger's chunked DPO loss without a reference."""
    theirs, ours = needs("liger_kernel.chunked_loss"), needs("fastrl.integrations.liger")
    hidden, weight, labels = leaves(sizes.tokens)

    def way(module: Any) -> Callable[[], None]:
        return lambda: backward(module(weight, hidden, labels)[0], hidden, weight)

    return {
        "Liger": way(theirs.LigerFusedLinearDPOLoss(use_ref_model=False, compiled=False)),
        "fastrl": way(ours.LigerFusedLinearDPOLoss(use_ref_model=False)),
    }


def verl_logprobs(sizes: Sizes) -> Ways:
    """verl's fused log-probs and entropies, backend torch."""
    theirs = needs("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    ours = needs("fastrl.integrations.verl").fused_logprobs
    hidden, weight, labels = leaves(sizes.tokens)

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return logprobs.sum() + 0.01 * entropy.sum()

    return {
        "verl": lambda: backward(loss(*theirs(hidden, weight, labels, temperature=1.0)), hidden, weight),
        "fastrl": lambda: backward(loss(*ours(hidden, weight, labels)), hidden, weight),
    }


def openrlhf_logprobs(sizes: Sizes) -> Ways:
    """OpenRLHF's log-probs from the logits that its actor forms."""
    utils, adapter = needs("openrlhf.models.utils"), needs("fastrl.integrations.openrlhf")
    torch.manual_seed(0)
    logits = (2.0 * torch.randn(ROWS, sizes.tokens // ROWS, VOCABULARY)).requires_grad_()
    labels = torch.randint(VOCABULARY, logits.shape[:2])

    def way(switched: bool) -> None:
        with adapter.patched() if switched else contextlib.nullcontext():
            backward(utils.log_probs_from_logits(logits, labels, temperature=1.0).sum(), logits)

    return {"OpenRLHF": lambda: way(False), "fastrl": lambda: way(True)}


def with_proof(adapter: Any, ours: Callable[[], Any], proofs: str = "_proofs") -> Ways:
    """Return a call of the adapter without and one with the proof."""

    def proved() -> None:
        getattr(adapter, proofs).forget()
        ours()

    return {"fastrl": ours, "fastrl, with the proof": proved}


def lived(sizes: Sizes) -> Tensor:
    """Return the mask (sequences, length) of completions that end between a quarter of the length and its end."""
    ends = torch.linspace(sizes.length / 4, sizes.length, sizes.sequences).long()
    return torch.arange(sizes.length) < ends.unsqueeze(-1)


def slime_loss(sizes: Sizes) -> Ways:
    """slime's policy loss with a KL to the reference, given log-probs and entropies."""
    cases, adapter, module = needs("hosts.slime_losses"), needs("fastrl.integrations.slime"), needs(SLIME)
    torch.manual_seed(0)
    old = -3.0 * torch.rand(sizes.sequences, sizes.length)
    columns = {
        "log_probs": list(old),
        "ref_log_probs": list(old + SPREAD * torch.randn_like(old)),
        "rollout_log_probs": list(old + SPREAD * torch.randn_like(old)),
        "advantages": list(torch.randn_like(old)),
        "loss_masks": list(lived(sizes).int()),
        "response_lengths": [sizes.length] * sizes.sequences,
        "total_lengths": [2 * sizes.length] * sizes.sequences,
        "unconcat_tokens": None,
    }
    args = cases.arguments(use_kl_loss=True, kl_loss_type="low_var_kl")
    reduction = cases.reduction_of(args, columns)
    leaf = (old + SPREAD * torch.randn_like(old)).reshape(-1).requires_grad_()
    entropy = list(torch.rand_like(old))
    vars(module)["get_log_probs_and_entropy"] = lambda logits, **batch: (
        None,
        {"log_probs": list(leaf.split(sizes.length)), "entropy": entropy},
    )

    def way(function: Any) -> Callable[[], None]:
        return lambda: backward(function(args, columns, leaf, reduction)[0], leaf)

    return {
        "slime": way(module.policy_loss_function),
        **with_proof(adapter, way(adapter.policy_loss), "_loss_proofs"),
    }


def slime_logprobs(sizes: Sizes) -> Ways:
    """slime's log-probs and entropies of logits."""
    adapter, module = needs("fastrl.integrations.slime"), needs(SLIME)
    torch.manual_seed(0)
    logits = (2.0 * torch.randn(sizes.tokens, VOCABULARY)).requires_grad_()
    labels = torch.randint(VOCABULARY, (sizes.tokens,))

    def own() -> None:
        logprobs, entropy = module.calculate_log_probs_and_entropy(logits, labels, None, with_entropy=True)
        backward(logprobs.sum() + 0.01 * entropy.sum(), logits)

    def ours(prove: bool) -> None:
        with adapter.patched(prove=prove):
            own()

    return {"slime": own, "fastrl": lambda: ours(False), "fastrl, with the proof": lambda: ours(True)}


def nemo_rl_loss(sizes: Sizes) -> Ways:
    """NeMo-RL's loss with the options that it has by default."""
    cases, adapter = needs("hosts.nemo_rl_losses"), needs("fastrl.integrations.nemo_rl")
    module = needs("nemo_rl.algorithms.loss.loss_functions")
    logprobs, columns = cases.batch(spread=SPREAD, rows=sizes.sequences, width=sizes.length + 1)
    data = {name: value.float() for name, value in columns.items()}
    data["token_mask"][:, 1:] = lived(sizes)
    leaf, counts, cfg = logprobs.float().requires_grad_(), cases.counts(data), module.ClippedPGLossConfig()

    def way(loss_fn: Any) -> Callable[[], None]:
        return lambda: backward(loss_fn(leaf, data, *counts)[0], leaf)

    return {"NeMo-RL": way(module.ClippedPGLossFn(cfg)), **with_proof(adapter, way(adapter.ClippedPGLoss(cfg)))}


def skyrl_loss(name: str, correction: dict[str, Any]) -> Callable[[Sizes], Ways]:
    """Return what builds a loss of SkyRL's."""

    def build(sizes: Sizes) -> Ways:
        cases, adapter = needs("hosts.skyrl_losses"), needs("fastrl.integrations.skyrl")
        registry = needs("skyrl.backends.skyrl_train.utils.ppo_utils").PolicyLossRegistry
        batch = cases.batch(spread=SPREAD, rows=sizes.sequences, width=sizes.length)
        logprobs, old, advantages, _, rollout = (column.float() for column in batch)
        mask = lived(sizes).float()
        leaf, config = logprobs.requires_grad_(), cases.config(name, correction, "old")

        def way(function: Any) -> Callable[[], None]:
            return lambda: backward(function(leaf, old, advantages, config, mask, rollout)[0], leaf)

        ours = way(adapter.PolicyLossFunction(name))
        return {"SkyRL": way(registry.get(name)), **with_proof(adapter, ours)}

    return build


def prime_rl_loss(sizes: Sizes) -> Ways:
    """prime-rl's default loss of one sequence."""
    cases, adapter = needs("hosts.prime_rl_losses"), needs("fastrl.integrations.prime_rl")
    module, configs = needs("prime_rl.trainer.rl.loss"), needs("prime_rl.configs.trainer")
    given = cases.sequence(spread=SPREAD, tokens=sizes.length)
    columns = {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }
    columns["trainer_logprobs"].requires_grad_()
    columns["loss_mask"] = torch.arange(sizes.length) >= sizes.length // 4
    inputs, config = module.LossInputs(**columns), configs.DefaultLossConfig()

    def way(function: Callable[[Any], Any]) -> Callable[[], None]:
        return lambda: backward(function(inputs).loss, inputs.trainer_logprobs)

    return {
        "prime-rl": way(lambda x: module.default_loss_fn(x, config)),
        **with_proof(adapter, way(adapter.default_loss)),
    }


SLIME = "slime.backends.megatron_utils.loss"
HOSTS: dict[str, dict[str, Callable[[Sizes], Ways]]] = {
    "liger": {"GRPO": liger_grpo, "DPO": liger_dpo},
    "verl": {"fused log-probs, entropy": verl_logprobs},
    "openrlhf": {"log-probs of logits": openrlhf_logprobs},
    "slime": {"loss": slime_loss, "log-probs of logits, entropy": slime_logprobs},
    "nemo_rl": {"loss": nemo_rl_loss},
    "skyrl": {
        "regular": skyrl_loss("regular", {}),
        "gspo, TIS per token": skyrl_loss("gspo", {"tis_ratio_type": "token"}),
    },
    "prime_rl": {"default, one sequence": prime_rl_loss},
}


def measured(ways: Ways, rounds: int, clock: Callable[[], float]) -> dict[str, tuple[float, int]]:
    """Return (seconds of the best round, peak bytes) of every way. After one call each, the ways take turns."""
    for action in ways.values():
        action()
    peaks = {name: peak_bytes(action, torch.device("cpu")) for name, action in ways.items()}
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, action in ways.items():
            start = clock()
            action()
            best[name] = min(best[name], clock() - start)
    return {name: (best[name], peaks[name]) for name in ways}


def clones(given: list[str]) -> dict[str, Path]:
    """Return the folder of each host from HOST=FOLDER, or raise ValueError."""
    checkouts = importlib.import_module("hosts.checkouts").CHECKOUTS
    folders = {}
    for text in given:
        host, separator, folder = text.partition("=")
        if not separator or host not in checkouts:
            raise ValueError(f"--checkout must be HOST=FOLDER with HOST among {', '.join(checkouts)}, got {text!r}")
        checkouts[host].files(Path(folder))
        folders[host] = Path(folder)
    return folders


def main() -> None:
    """Print a table."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", nargs="*", help=f"among {', '.join(HOSTS)}; default: all")
    parser.add_argument("--checkout", action="append", default=[], metavar="HOST=FOLDER", help="a clone of a host")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="tokens with a vocabulary, a multiple of 4")
    parser.add_argument("--sequences", type=int, default=64, help="sequences with one log-prob per token")
    parser.add_argument("--length", type=int, default=4096, help="tokens of each of them")
    parser.add_argument("--cpu-time", action="store_true", help="count the time of the process, not of the clock")
    given = parser.parse_intermixed_args()
    if unknown := sorted(set(given.hosts) - set(HOSTS)):
        parser.error(f"hosts must be among {', '.join(HOSTS)}, got {', '.join(unknown)}")
    if given.tokens < ROWS or given.tokens % ROWS or given.rounds < 1:
        parser.error(f"expected tokens in a multiple of {ROWS}, and rounds, got {given.tokens} and {given.rounds}")
    if given.sequences < 2 or given.length < 2:
        parser.error(f"expected 2 or more sequences of 2 or more tokens, got {given.sequences} of {given.length}")
    try:
        folders = clones(given.checkout)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    checkouts = importlib.import_module("hosts.checkouts")
    torch.set_num_threads(given.threads)
    sizes = Sizes(given.tokens, given.sequences, given.length)
    print("| what | way | ms | the host's time over this | peak memory |\n|---|---|---|---|---|")
    for host in given.hosts or HOSTS:
        with contextlib.ExitStack() as stack:
            if host in folders:
                stack.enter_context(checkouts.opened(checkouts.CHECKOUTS[host], folders[host], compiled=True))
            for what, build in HOSTS[host].items():
                try:
                    ways = build(sizes)
                except ImportError as error:
                    print(f"| {host}: {what} | not measured: {error} | | | |")
                    continue
                found = measured(ways, given.rounds, time.process_time if given.cpu_time else time.perf_counter)
                own = next(iter(found.values()))[0]
                for name, (seconds, peak) in found.items():
                    cost = f"{1e3 * seconds:,.1f} | {own / seconds:.2f} | {peak / 1e6:.1f} MB"
                    print(f"| {host}: {what} | {name} | {cost} |", flush=True)


if __name__ == "__main__":
    main()
