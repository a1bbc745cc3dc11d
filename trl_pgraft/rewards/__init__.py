# SPDX-License-Identifier: Apache-2.0

"""Reward functions: registered by name, called in TRL's or DDPO's convention, and never quietly zero."""

from .jpeg import jpeg_compressibility
from .registry import Reward, choose_rewards, get_reward, list_rewards, make_reward, register_reward
from .scorer import Patience, RewardError, score, score_all


__all__ = [
    "Patience",
    "Reward",
    "RewardError",
    "choose_rewards",
    "get_reward",
    "jpeg_compressibility",
    "list_rewards",
    "make_reward",
    "register_reward",
    "score",
    "score_all",
]
