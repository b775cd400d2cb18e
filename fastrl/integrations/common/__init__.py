"""What the adapters share.

host.py    a trainer's package: its version, and the switch that replaces and restores its functions
proof.py   the proof on first use: the same batch through the trainer's own code and through fastrl
"""
