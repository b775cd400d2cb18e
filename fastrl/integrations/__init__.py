"""Adapters for other trainers: the only place that patches anything.

An adapter translates a trainer's options into a loss of fastrl. It refuses a trainer whose functions or arguments have
changed, restores all that it has replaced, and on first use compares its numbers with the trainer's own.

common/           shared parts: the host's version, replaced functions, the proof on first use, autocast, metrics
liger/            Liger-Kernel's loss classes with the same names and arguments, without patch or proof
transformers/     a model whose forward with labels returns loss, log-probs and entropy without forming the logits
trl/              TRL: its log-prob function, and five trainers that form the gradient in the forward
verl/             verl: losses and advantage estimators by name, fused log-probs
nemo_rl.py        NeMo-RL: its clipped policy-gradient loss
openrlhf.py       OpenRLHF: its policy loss, log-probs and entropies
prime_rl.py       prime-rl: losses for its hook of custom losses
skyrl.py          SkyRL: policy losses by name
slime.py          slime: its policy loss, log-probs and entropies
"""
