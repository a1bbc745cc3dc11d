# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""Reward functions: registered by name, called in TRL's or DDPO's convention, and never quietly zero."""

from .functions import (
    Reward,
    choose_rewards,
    ddpo_reward,
    get_reward,
    list_rewards,
    register_reward,
    to_pil,
    trl_reward,
)
from .jpeg import jpeg_compressibility
from .scoring import Patience, RewardError, Scorer, score


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
