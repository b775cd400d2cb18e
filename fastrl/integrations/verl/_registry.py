"""fastrl's names in verl's registries. The entry point puts them in, in every process. `unregister` takes them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastrl.integrations.common.host import Host
from fastrl.integrations.verl._advantages import ESTIMATORS
from fastrl.integrations.verl._losses import LOSSES, policy_loss, proofs
from fastrl.losses.policy.loss import PolicyLoss

HOST = Host("verl", "verl", "0.9.1", "fastrl.integrations.verl")

_LOSS_ARGUMENTS = (
    "old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights",
)  # fmt: skip
_ours: dict[tuple[str, str], Any] = {}  # (registry, name) -> function


def _registries() -> dict[str, dict[str, Any]]:
    """Return verl's registries, or raise RuntimeError if its loss signature is not the expected one."""
    core = HOST.module("verl.trainer.ppo.core_algos")
    HOST.function(core, "compute_policy_loss_vanilla", _LOSS_ARGUMENTS)
    names = ("POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY")
    return {name: HOST.attribute(core, name) for name in names}


def register(names: Iterable[str] | None = None, *, prove: bool = True) -> tuple[str, ...]:
    """Put fastrl's losses and estimators into verl's registries, and return the names of all that are in them.

    Args:
        names: names of `LOSSES` and `ESTIMATORS`; None: all of them.
        prove: whether to compare the first call of a loss that verl has too with verl's own, on 4 sequences. It holds
            for every loss of this process. A difference raises AdapterMismatchError in the call.

    Raises:
        ValueError: an unknown name, or a name under which verl has another function.
        ImportError: verl cannot be imported.
        RuntimeError: this verl's loss signature is not the expected one.
    """
    proofs.wanted = prove
    known = {**LOSSES, **ESTIMATORS}
    wanted = list(known) if names is None else list(names)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"unknown name {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    for registry, functions in (("POLICY_LOSS_REGISTRY", LOSSES), ("ADV_ESTIMATOR_REGISTRY", ESTIMATORS)):
        _put(registry, {name: functions[name] for name in wanted if name in functions})
    return tuple(name for _, name in _ours)


def register_loss(name: str, loss: PolicyLoss) -> None:
    """Make any `PolicyLoss` available to verl as `policy_loss.loss_mode=name`.

    Raises:
        ValueError: a name under which verl has another function, or a loss that needs inputs that verl does not pass
            (see `policy_loss`).
    """
    _put("POLICY_LOSS_REGISTRY", {name: policy_loss(loss)})


def _put(registry: str, functions: Mapping[str, Any]) -> None:
    entries = _registries()[registry]
    # Check all names before the first one goes in.
    for name, function in functions.items():
        if name in entries and entries[name] is not function:
            raise ValueError(f"verl's {registry} has {name!r} already: {entries[name]!r}")
    for name, function in functions.items():
        entries[name] = function
        _ours[registry, name] = function


def unregister() -> None:
    """Remove every name that `register` and `register_loss` have put in. verl's own entries stay."""
    if not _ours:
        return
    registries = _registries()
    while _ours:
        (registry, name), function = _ours.popitem()
        if registries[registry].get(name) is function:
            del registries[registry][name]
