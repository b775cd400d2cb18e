"""fastrl inside TRL: `with fastrl.integrations.trl.patched(): trainer.train()`, or `enable()` once."""

from fastrl.integrations.trl._switch import disable as disable
from fastrl.integrations.trl._switch import enable as enable
from fastrl.integrations.trl._switch import enabled as enabled
from fastrl.integrations.trl._switch import patched as patched
