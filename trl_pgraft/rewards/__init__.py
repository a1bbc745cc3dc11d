# SPDX-License-Identifier: Apache-2.0

"""Reward functions: registered by name, called in TRL's or DDPO's convention, and never quietly zero."""

from .jpeg import jpeg_compressibility
from .registry import (
    Reward,
    choose_rewards,
    ddpo_reward,
    get_reward,
    list_rewards,
    register_reward,
    to_pil,
    trl_reward,
)
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
    "to_pil",
    "trl_reward",
]
