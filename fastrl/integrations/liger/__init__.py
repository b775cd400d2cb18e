"""Liger-Kernel's loss classes, with its names, arguments and return values, on fastrl's losses.

    # from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from fastrl.integrations.liger import LigerFusedLinearGRPOLoss

The signatures are those of Liger-Kernel 0.8.5, which need not be installed. Every class takes `compiled` and
`chunk_size` and makes no use of them: they say how Liger computes, not what. An option that is not supported raises
when the object is built; docs/liger.md lists those, and where the numbers differ on purpose.
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
