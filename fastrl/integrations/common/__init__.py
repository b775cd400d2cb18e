"""Parts that the adapters share.

host.py      a trainer's package: its version, its functions, and the switch that replaces and restores them
proof.py     the proof on first use: the same batch through the trainer's own code and through fastrl
autocast.py  the operands of a head in the dtype of autocast
metrics.py   metrics as floats, with one wait for the device
"""
