"""The switch: it replaces TRL's log-prob function in all modules of TRL, and restores the same objects."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fastrl.integrations.common.host import Switch
from fastrl.integrations.trl import _seams
from fastrl.integrations.trl._logprobs import FusedLogProbFunction

_lock = threading.RLock()


@contextmanager
def patched(*, round_logits: bool | None = None) -> Iterator[None]:
    """Run TRL on fastrl's log-probs inside this context: `with patched(): trainer.train()`.

    SFT, DPO, KTO, GRPO, RLOO and AsyncGRPO then get log-probs, entropies and logged statistics from fastrl, for every
    model with a head that TRL has fused. The values equal TRL's up to rounding. Contexts nest, and the outermost one
    restores TRL's own objects. The patch is process-wide.

    Args:
        round_logits: whether to round logits as TRL does. With half-precision hidden states or autocast TRL rounds its
            logits to that precision, which moves a log-prob by some 3e-2. False, the default, keeps them in float32.
            None takes the choice of an outer context or of `enable`.

    Raises:
        ValueError: fastrl is on already with another `round_logits`.
        ImportError: TRL is not installed.
        RuntimeError: this TRL's signatures are not the tested ones.
    """
    with ExitStack() as stack:
        with _lock:
            _choose(round_logits)
            stack.enter_context(_switch.patched())
        yield


def enable(*, round_logits: bool | None = None) -> None:
    """Run TRL on fastrl's log-probs from here on, as inside `patched()`. A second call changes nothing."""
    with _lock:
        _choose(round_logits)
        _switch.enable()


def disable() -> None:
    """Undo `enable()`. Inside a `patched()` context TRL's own objects come back when the context ends."""
    _switch.disable()


def enabled() -> bool:
    """Return whether TRL runs on fastrl's log-probs now."""
    return _switch.on


def _always(device: Any) -> bool:
    """Replace TRL's `_use_triton`."""
    # TRL asks it whether to drop masked positions before the head. With fastrl it always should.
    del device
    return True


def _choose(round_logits: bool | None) -> None:
    """Set how the logits are rounded; raise ValueError if the switch is on with another choice."""
    if not isinstance(round_logits, (bool, type(None))):
        raise TypeError(f"round_logits must be True, False or None, got {round_logits!r}")
    if not _switch.on:
        FusedLogProbFunction.round_logits = bool(round_logits)
    elif round_logits not in (None, FusedLogProbFunction.round_logits):
        raise ValueError(f"round_logits={round_logits}, but fastrl is on with {FusedLogProbFunction.round_logits}")


def _find() -> list[tuple[Any, str, Any]]:
    """Return every binding of TRL's function in the loaded modules of TRL."""
    utils = _seams.utils()
    original = getattr(utils, _seams.FUNCTION)
    FusedLogProbFunction.original = original
    found = [(utils, _seams.COMPACT, _always)]
    for name, module in sorted(sys.modules.items()):
        if module is not None and name.partition(".")[0] == "trl":
            found += [(module, key, FusedLogProbFunction) for key, x in vars(module).items() if x is original]
    return found


_switch = Switch(_seams.HOST, _find)
