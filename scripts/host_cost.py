"""Time and memory of what an adapter replaces, the host's own code and fastrl taking turns in one process.

    python scripts/host_cost.py [--rounds 5] [--threads 2] [--tokens 256] [HOST ...]

For hosts that are installed: forward and backward of the host's own loss or log-probs, and of the same with fastrl, on
a head of SmolLM2-135M's size (49,152 tokens, hidden size 576), float32. The best of the rounds counts: what else runs
on the machine disturbs both. Memory is the peak of what PyTorch allocates beyond the inputs, results and gradients
included. TRL's trainers have a script of their own, trl_step_time.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import time
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.measure import peak_bytes

VOCABULARY, HIDDEN, ROWS = 49152, 576, 4
Ways = dict[str, Callable[[], Any]]


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


def liger_grpo(tokens: int) -> Ways:
    """Liger's chunked GRPO loss."""
    theirs, ours = needs("liger_kernel.chunked_loss"), needs("fastrl.integrations.liger")
    hidden, weight, labels = leaves(tokens)
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


def liger_dpo(tokens: int) -> Ways:
    """Liger's chunked DPO loss, without a reference."""
    theirs, ours = needs("liger_kernel.chunked_loss"), needs("fastrl.integrations.liger")
    hidden, weight, labels = leaves(tokens)

    def way(module: Any) -> Callable[[], None]:
        return lambda: backward(module(weight, hidden, labels)[0], hidden, weight)

    return {
        "Liger": way(theirs.LigerFusedLinearDPOLoss(use_ref_model=False, compiled=False)),
        "fastrl": way(ours.LigerFusedLinearDPOLoss(use_ref_model=False)),
    }


def verl_logprobs(tokens: int) -> Ways:
    """verl's fused log-probs and entropies, backend torch."""
    theirs = needs("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    ours = needs("fastrl.integrations.verl").fused_logprobs
    hidden, weight, labels = leaves(tokens)

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return logprobs.sum() + 0.01 * entropy.sum()

    return {
        "verl": lambda: backward(loss(*theirs(hidden, weight, labels, temperature=1.0)), hidden, weight),
        "fastrl": lambda: backward(loss(*ours(hidden, weight, labels)), hidden, weight),
    }


def openrlhf_logprobs(tokens: int) -> Ways:
    """OpenRLHF's log-probs from the logits that its actor forms."""
    utils, adapter = needs("openrlhf.models.utils"), needs("fastrl.integrations.openrlhf")
    torch.manual_seed(0)
    logits = (2.0 * torch.randn(ROWS, tokens // ROWS, VOCABULARY)).requires_grad_()
    labels = torch.randint(VOCABULARY, logits.shape[:2])

    def way(switched: bool) -> None:
        with adapter.patched() if switched else contextlib.nullcontext():
            backward(utils.log_probs_from_logits(logits, labels, temperature=1.0).sum(), logits)

    return {"OpenRLHF": lambda: way(False), "fastrl": lambda: way(True)}


HOSTS: dict[str, dict[str, Callable[[int], Ways]]] = {
    "liger": {"GRPO": liger_grpo, "DPO": liger_dpo},
    "verl": {"fused log-probs, entropy": verl_logprobs},
    "openrlhf": {"log-probs of logits": openrlhf_logprobs},
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", nargs="*", help=f"among {', '.join(HOSTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of the batch, a multiple of 4; default: 256")
    given = parser.parse_intermixed_args()
    if unknown := sorted(set(given.hosts) - set(HOSTS)):
        parser.error(f"hosts must be among {', '.join(HOSTS)}, got {', '.join(unknown)}")
    if given.tokens < ROWS or given.tokens % ROWS or given.rounds < 1:
        parser.error(f"expected tokens in a multiple of {ROWS}, and rounds, got {given.tokens} and {given.rounds}")
    torch.set_num_threads(given.threads)
    print("| what | way | ms | the host's time over this | peak memory |\n|---|---|---|---|---|")
    for host in given.hosts or HOSTS:
        for what, build in HOSTS[host].items():
            try:
                ways = build(given.tokens)
            except ImportError as error:
                print(f"| {host}: {what} | not measured: {error} | | | |")
                continue
            peaks = {name: peak_bytes(action, torch.device("cpu")) for name, action in ways.items()}
            best = dict.fromkeys(ways, float("inf"))
            for _ in range(given.rounds):
                for name, action in ways.items():
                    start = time.perf_counter()
                    action()
                    best[name] = min(best[name], time.perf_counter() - start)
            own = next(iter(best.values()))
            for name, seconds in best.items():
                print(
                    f"| {host}: {what} | {name} | {1e3 * seconds:.0f} | {own / seconds:.2f} | "
                    f"{peaks[name] / 1e6:.0f} MB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
