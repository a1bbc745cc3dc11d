# SPDX-License-Identifier: Apache-2.0

"""How a reward function is called, in TRL's or DDPO's convention."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..pipelines.pixels import to_pil, to_unit_range
from .registry import Reward


def call_reward(reward: Reward, images: torch.Tensor, prompts: list[str], columns: dict[str, list]) -> tuple[Any, Any]:
    r"""
    Call a reward function on one batch.

    In TRL's convention it is called as `f(prompts=prompts, images=images, **columns)`, see [`register_reward`].

    In DDPO's convention it is `f(images, prompts, metadata) -> (rewards, info)`, with images a float tensor
    (B, 3, H, W) in [0, 1], and prompts and metadata tuples of length `B`. In both, the rewards are `B` numbers in a
    list, tuple, array or tensor, with `None` to leave a sample out.

    Args:
        reward ([`Reward`]):
            The reward function with its convention.
        images (`torch.Tensor`):
            uint8, images (B, 3, H, W) or videos (B, F, 3, H, W).
        prompts (`list[str]`):
            B prompts.
        columns (`dict[str, list]`):
            Further columns of the data set by name, B values each; DDPO's convention reads `metadata`.

    Returns:
        `tuple[Any, Any]`: what the function returned, not checked: rewards; and its info, anything to log or to hand
            to hooks, which is empty in TRL's convention.

    Raises:
        `TypeError`: a function in DDPO's convention does not return a pair.
    """
    if reward.convention == "ddpo":
        return _call_ddpo(reward.function, images, prompts, columns.get("metadata", [{}] * len(prompts)))
    rewards = reward.function(prompts=prompts, images=to_pil(images), **columns)
    return (_awaited(rewards) if inspect.isawaitable(rewards) else rewards), {}


def _call_ddpo(
    function: Callable[..., Any], images: torch.Tensor, prompts: list[str], metadata: list[Any]
) -> tuple[Any, Any]:
    returned = function(to_unit_range(images), tuple(prompts), tuple(metadata))
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"it returned {type(returned).__name__}; a tuple (rewards, info) is expected")
    return returned


def _awaited(rewards: Awaitable[Sequence[float | None]]) -> Sequence[float | None]:
    """The awaited result, from a thread of its own, because a notebook's thread runs an event loop already."""

    async def wait() -> Sequence[float | None]:
        return await rewards

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()
