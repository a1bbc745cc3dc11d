# SPDX-License-Identifier: Apache-2.0

"""Reward functions by name."""

import importlib
from collections.abc import Awaitable, Callable, Sequence


# TRL's convention: f(*, prompts, images, **columns), sync or async; None leaves a sample out.
RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]

_REGISTRY: dict[str, RewardFunction] = {}


def register_reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    r"""
    Decorator that registers a reward function, so that configurations and command lines can name it.

    The function follows TRL's convention, `f(*, prompts, images, **columns)`, sync or async. Its arguments are lists
    of `B` values: prompts, PIL images (for videos, lists of frames), and each further column of the data set. It
    returns `B` finite numbers, with `None` to leave a sample out.

    Args:
        name (`str`):
            Name of the reward. A later registration under the same name replaces the earlier one.

    Returns:
        `Callable`: the decorator, which returns the function unchanged.
    """

    def register(function: RewardFunction) -> RewardFunction:
        _REGISTRY[name] = function
        return function

    return register


def list_rewards() -> list[str]:
    """Names of all registered rewards, sorted."""
    return sorted(_REGISTRY)


def get_reward(name: str) -> RewardFunction:
    r"""
    A reward function by its name.

    Args:
        name (`str`):
            A registered name (see [`register_reward`]), or `"package.module:function"` to import a function.

    Returns:
        `Callable`: the function, in TRL's convention.

    Raises:
        `ValueError`: nothing is registered by that name, or it cannot be imported; the message lists the registered
            names.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(
            f"reward_funcs: no reward is registered as {name!r}. Registered are {', '.join(list_rewards())}; "
            'any other function can be given as "package.module:function".'
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward_funcs: {name!r} cannot be imported ({error}).") from error
