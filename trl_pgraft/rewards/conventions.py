# SPDX-License-Identifier: Apache-2.0

"""How a reward function is called, in TRL's or DDPO's convention."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection, Sequence
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


def check_columns(rewards: Sequence[Reward], columns: Collection[str], owner: str) -> None:
    r"""
    Check, before anything is sampled, that reward functions in TRL's convention can be called with these columns.

    Args:
        rewards (`Sequence[Reward]`):
            The reward functions; those in DDPO's convention are called alike whatever columns there are.
        columns (`Collection[str]`):
            Names of the further columns of the prompts.
        owner (`str`):
            What has these columns, for the error's message.

    Raises:
        `ValueError`: a function needs another column or does not take one, or a column has the name of what all
            functions are given.
    """
    for reward in (reward for reward in rewards if reward.convention == "trl"):
        try:
            # Of the function itself: what a decorator's wrapper takes may be more than what is wrapped.
            inspect.signature(reward.function, follow_wrapped=False).bind(
                **{"prompts": None, "images": None}, **dict.fromkeys(columns)
            )
        except TypeError as error:
            raise ValueError(
                f"reward_funcs: {reward.name!r} is called with `prompts`, `images` and the further columns of {owner} "
                f"({', '.join(columns) or 'none'}), and that does not fit: {str(error).rpartition('() ')[2]}. Add a "
                "column that is missing or give its parameter a default, rename a column `prompts` or `images`, whose "
                "names are taken by the samples, or let the function take other columns as `**columns`."
            ) from error
        except ValueError:
            continue  # such as a compiled function, which shows no signature


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
