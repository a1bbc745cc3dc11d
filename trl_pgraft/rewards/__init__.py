# SPDX-License-Identifier: Apache-2.0

"""Reward functions: registered by name, called in TRL's or DDPO's convention, and never quietly zero."""

from .conventions import Reward, choose_rewards, ddpo_reward, trl_reward
from .jpeg import jpeg_compressibility
from .registry import get_reward, list_rewards, register_reward
from .scorer import Patience, RewardError, Scorer, score


__all__ = [
    "Patience",
    "Reward",
    "RewardError",
    "Scorer",
    "choose_rewards",
    "ddpo_reward",
    "get_reward",
    "jpeg_compressibility",
    "list_rewards",
    "register_reward",
    "score",
    "trl_reward",
]
