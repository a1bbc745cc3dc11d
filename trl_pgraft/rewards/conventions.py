# SPDX-License-Identifier: Apache-2.0

"""TRL's and DDPO's conventions for calling a reward function, behind one of this package's."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..pipelines.pixels import to_pil, to_unit_range
from .registry import RewardFunction, get_reward


# DDPO's convention: f(images, prompts, metadata) -> (rewards, info).
DDPORewardFunction = Callable[[torch.Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]]


@dataclass(frozen=True)
class Reward:
    r"""
    A named reward function behind one calling convention.

    Args:
        name (`str`):
            Name under which its rewards are logged and stored.
        function (`Callable`):
            `function(images, prompts, columns)` with uint8 images (B, 3, H, W), `B` prompts and, per further dataset
            column, a list of `B` values. It returns `(rewards, info)`: `B` rewards, `None` where it leaves a sample
            out, and its info: anything to log or to hand to hooks.
        weight (`float`, *optional*, defaults to `1.0`):
            Its weight in the sum of rewards by which samples are accepted.
    """

    name: str
    function: Callable[[torch.Tensor, list[str], dict[str, list]], tuple[Sequence[float | None], Any]]
    weight: float = 1.0


def trl_reward(spec: str | RewardFunction, weight: float = 1.0) -> Reward:
    r"""
    The [`Reward`] of a function in TRL's convention.

    Args:
        spec (`str` or `Callable`):
            The function, a registered name or `"package.module:function"`; see [`register_reward`] for the convention.
        weight (`float`, *optional*, defaults to `1.0`):
            Its weight in the sum of rewards.

    Raises:
        `ValueError`: the name is unknown or cannot be imported.
    """
    function = get_reward(spec) if isinstance(spec, str) else spec

    def call(images: torch.Tensor, prompts: list[str], columns: dict[str, list]) -> tuple[Sequence[float | None], Any]:
        rewards = function(prompts=prompts, images=to_pil(images), **columns)
        return (_awaited(rewards) if inspect.isawaitable(rewards) else rewards), {}

    name = getattr(function, "__name__", type(function).__name__)
    return Reward(spec.rpartition(":")[2] if isinstance(spec, str) else name, call, weight)


def ddpo_reward(function: DDPORewardFunction) -> Reward:
    r"""
    The [`Reward`] of a function in DDPO's convention.

    Args:
        function (`Callable`):
            `f(images, prompts, metadata) -> (rewards, info)`, with images a float tensor (B, 3, H, W) in [0, 1], and
            prompts and metadata tuples of length `B`. The rewards are `B` numbers in any array type, or a list with
            `None` to leave a sample out.
    """

    def call(images: torch.Tensor, prompts: list[str], columns: dict[str, list]) -> tuple[Sequence[float | None], Any]:
        metadata = columns.get("metadata", [{}] * len(prompts))
        returned = function(to_unit_range(images), tuple(prompts), tuple(metadata))
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(f"it returned {type(returned).__name__}; a tuple (rewards, info) is expected")
        rewards, info = returned
        if isinstance(rewards, list | tuple) and any(reward is None for reward in rewards):
            return list(rewards), info
        return torch.as_tensor(rewards, dtype=torch.float64).flatten().tolist(), info

    return Reward(getattr(function, "__name__", type(function).__name__), call)


def choose_rewards(
    reward_function: DDPORewardFunction | None,
    reward_funcs: str | RewardFunction | list[str | RewardFunction] | None,
    reward_weights: Sequence[float] | None,
    required: bool = True,
) -> list[Reward]:
    r"""
    The rewards that were given in one of the two conventions, as [`Reward`]s.

    Args:
        reward_function (`Callable` or `None`):
            One function in DDPO's convention, see [`ddpo_reward`].
        reward_funcs (`str`, `Callable`, a list of them, or `None`):
            Functions in TRL's convention or their names, see [`trl_reward`].
        reward_weights (`Sequence[float]` or `None`):
            One weight for each of `reward_funcs`; `None` is 1 each.
        required (`bool`, *optional*, defaults to `True`):
            Whether no reward at all is an error.

    Raises:
        `ValueError`: both conventions, none, a wrong number of weights, or two rewards of one name.
    """
    if reward_function is not None and reward_funcs is not None:
        raise ValueError("Give reward_function (DDPO's convention) or reward_funcs (TRL's), not both.")
    if reward_function is not None and reward_weights is not None:
        raise ValueError("reward_weights are those of reward_funcs; reward_function is one reward.")
    if reward_function is not None:
        return [ddpo_reward(reward_function)]
    if reward_funcs is None and required:
        raise ValueError("No reward: give reward_function (DDPO's convention) or reward_funcs (TRL's).")
    if reward_funcs is None:
        return []
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    weights = list(reward_weights) if reward_weights is not None else [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} values for {len(functions)} reward_funcs.")
    rewards = [trl_reward(function, weight) for function, weight in zip(functions, weights, strict=True)]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise ValueError(
            f"reward_funcs are named {', '.join(names)}, and rewards are stored by name. Give each its own `__name__`."
        )
    return rewards


def _awaited(rewards: Awaitable[Sequence[float | None]]) -> Sequence[float | None]:
    """The awaited result, from a thread of its own, because a notebook's thread runs an event loop already."""

    async def wait() -> Sequence[float | None]:
        return await rewards

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()
