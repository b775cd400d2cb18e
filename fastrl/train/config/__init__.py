"""Settings of the loops: one frozen dataclass each, and the reader of files and flags.

run.py           every loop, and the shared checks
sampling.py      the loops that answer problems of a task
preferences.py   the loops that read preference pairs
grpo.py  ppo.py  dpo.py  sft.py  rft.py  reward_model.py    one loop each
pairs.py         the two makers of preference pairs
parse.py         YAML files and command-line overrides
"""

from fastrl.train.config.dpo import DPOConfig as DPOConfig
from fastrl.train.config.dpo import OnlineDPOConfig as OnlineDPOConfig
from fastrl.train.config.grpo import GRPOConfig as GRPOConfig
from fastrl.train.config.pairs import ConstitutionalConfig as ConstitutionalConfig
from fastrl.train.config.pairs import PairsConfig as PairsConfig
from fastrl.train.config.ppo import PPOConfig as PPOConfig
from fastrl.train.config.reward_model import RewardModelConfig as RewardModelConfig
from fastrl.train.config.rft import OnlineRFTConfig as OnlineRFTConfig
from fastrl.train.config.rft import RFTConfig as RFTConfig
from fastrl.train.config.sft import SFTConfig as SFTConfig
