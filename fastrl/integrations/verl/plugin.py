"""The entry point `verl.plugins`: importing this module registers every name, as verl's loader expects."""

from fastrl.integrations.verl._registry import register

register()
