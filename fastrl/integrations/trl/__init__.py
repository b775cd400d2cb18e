"""fastrl inside TRL: `with fastrl.integrations.trl.patched(): trainer.train()`, or `enable()` once.

`patched` and `enable` replace the function from which TRL's trainers get their log-probs. `FastGRPOTrainer`,
`FastRLOOTrainer`, `FastDPOTrainer`, `FastKTOTrainer` and `FastSFTTrainer` also form the gradient of the loss while the
head runs. This package imports TRL when it first needs it.

_switch.py       patched, enable, disable        _seams.py        TRL's functions, and the check of their signatures
_logprobs.py     TRL's log-prob function on fastrl's rows
_translate.py    TRL's configurations as losses
_prediction.py   the gradient of a loss, predicted while the head runs: policy losses and SFT
_preferences.py  the same for DPO and KTO
_trainers.py     the five trainers
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastrl.integrations.trl._switch import disable as disable
from fastrl.integrations.trl._switch import enable as enable
from fastrl.integrations.trl._switch import enabled as enabled
from fastrl.integrations.trl._switch import patched as patched
from fastrl.integrations.trl._translate import policy_loss_from_config as policy_loss_from_config
from fastrl.integrations.trl._translate import preference_loss_from_config as preference_loss_from_config

if TYPE_CHECKING:
    from fastrl.integrations.trl._trainers import FastDPOTrainer as FastDPOTrainer
    from fastrl.integrations.trl._trainers import FastGRPOTrainer as FastGRPOTrainer
    from fastrl.integrations.trl._trainers import FastKTOTrainer as FastKTOTrainer
    from fastrl.integrations.trl._trainers import FastLossMixin as FastLossMixin
    from fastrl.integrations.trl._trainers import FastRLOOTrainer as FastRLOOTrainer
    from fastrl.integrations.trl._trainers import FastSFTTrainer as FastSFTTrainer

TRAINERS = (
    "FastDPOTrainer", "FastGRPOTrainer", "FastKTOTrainer", "FastLossMixin", "FastRLOOTrainer", "FastSFTTrainer",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastrl.integrations.trl import _seams

    _seams.utils()
    from fastrl.integrations.trl import _trainers

    return getattr(_trainers, name)
