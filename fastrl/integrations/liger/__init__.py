"""Liger-Kernel's loss classes, with its names, arguments and return values, on fastrl's losses.

    # from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from fastrl.integrations.liger import LigerFusedLinearGRPOLoss

The signatures are taken from Liger-Kernel 0.8.5, which need not be installed. `compiled` and `chunk_size` have no
effect: they choose Liger's way of computing. An option that is not supported raises an error when the object is built.
docs/liger.md lists these options, and the numbers that differ from Liger's on purpose.

policy.py      GRPO and its relatives       preference.py  DPO, CPO, SimPO, ORPO, KTO
supervised.py  cross-entropy, distillation (JSD)
"""

from fastrl.integrations.liger.policy import LigerFusedLinearGRPOLoss as LigerFusedLinearGRPOLoss
from fastrl.integrations.liger.preference import LigerFusedLinearCPOLoss as LigerFusedLinearCPOLoss
from fastrl.integrations.liger.preference import LigerFusedLinearDPOLoss as LigerFusedLinearDPOLoss
from fastrl.integrations.liger.preference import LigerFusedLinearKTOLoss as LigerFusedLinearKTOLoss
from fastrl.integrations.liger.preference import LigerFusedLinearORPOLoss as LigerFusedLinearORPOLoss
from fastrl.integrations.liger.preference import LigerFusedLinearSimPOLoss as LigerFusedLinearSimPOLoss
from fastrl.integrations.liger.supervised import CrossEntropyOutput as CrossEntropyOutput
from fastrl.integrations.liger.supervised import LigerCrossEntropyLoss as LigerCrossEntropyLoss
from fastrl.integrations.liger.supervised import LigerFusedLinearCrossEntropyLoss as LigerFusedLinearCrossEntropyLoss
from fastrl.integrations.liger.supervised import LigerFusedLinearJSDLoss as LigerFusedLinearJSDLoss

__all__ = [
    "CrossEntropyOutput",
    "LigerCrossEntropyLoss",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearJSDLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
