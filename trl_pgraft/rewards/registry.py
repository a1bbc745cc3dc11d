# SPDX-License-Identifier: Apache-2.0

"""The rewards of a run: functions by name, each with its weight and the convention in which it is called."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..config import as_annotated
from ..core.importing import import_function


# TRL's convention: f(*, prompts, images, **columns), sync or async; None leaves a sample out.
RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]

# DDPO's convention: f(images, prompts, metadata) -> (rewards, info).
DDPORewardFunction = Callable[[torch.Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]]

_REGISTRY: dict[str, RewardFunction] = {}


@dataclass(frozen=True)
class Reward:
    r"""
    A named reward function with its weight.

    Args:
        name (`str`):
            Name under which its rewards are logged and stored.
        function (`Callable`):
            The function, in the convention that is named here.
        weight (`float`, *optional*, defaults to `1.0`):
            Its weight in the sum of rewards by which samples are accepted.
        convention (`str`, *optional*, defaults to `"trl"`):
            How the function is called, see [`call_reward`]: `"trl"` or `"ddpo"`.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    convention: Literal["trl", "ddpo"] = "trl"


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
    if ":" not in name:
        raise ValueError(
            f"reward_funcs: no reward is registered as {name!r}. Registered are {', '.join(list_rewards())}; "
            'any other function can be given as "package.module:function".'
        )
    return import_function(name, "reward_funcs")


def make_reward(
    spec: str | Callable[..., Any], weight: float = 1.0, convention: Literal["trl", "ddpo"] = "trl"
) -> Reward:
    r"""
    The [`Reward`] of a function, named after it.

    Args:
        spec (`str` or `Callable`):
            The function, a registered name or `"package.module:function"`.
        weight (`float`, *optional*, defaults to `1.0`):
            Its weight in the sum of rewards.
        convention (`str`, *optional*, defaults to `"trl"`):
            How the function is called, see [`call_reward`]: `"trl"` or `"ddpo"`.

    Raises:
        `ValueError`: it is neither, or the name is unknown or cannot be imported.
    """
    if not isinstance(spec, str) and not callable(spec):
        raise ValueError(f"reward_funcs: {spec!r} ({type(spec).__name__}) is neither a function nor a name.")
    name = spec.rpartition(":")[2] if isinstance(spec, str) else getattr(spec, "__name__", type(spec).__name__)
    return Reward(name, get_reward(spec) if isinstance(spec, str) else spec, weight, convention)


def choose_rewards(
    reward_function: DDPORewardFunction | None,
    reward_funcs: str | RewardFunction | list[str | RewardFunction] | None,
    reward_weights: Sequence[float] | None,
    required: bool = True,
) -> list[Reward]:
    r"""
    The rewards of a run, which were given in one of the two conventions.

    Args:
        reward_function (`Callable` or `None`):
            One function in DDPO's convention, see [`call_reward`].
        reward_funcs (`str`, `Callable`, a list of them, or `None`):
            Functions in TRL's convention or their names, see [`register_reward`].
        reward_weights (`Sequence[float]` or `None`):
            One weight for each of `reward_funcs`; `None` is 1 each.
        required (`bool`, *optional*, defaults to `True`):
            Whether no reward at all is an error.

    Raises:
        `ValueError`: both conventions, none, a wrong number of weights or one that is no finite number, or two rewards
            of one name.
    """
    if reward_function is not None:
        if reward_funcs is not None or reward_weights is not None:
            raise ValueError(
                "Give reward_function (DDPO's convention) or reward_funcs (TRL's), not both; reward_weights are those "
                "of reward_funcs."
            )
        return [make_reward(reward_function, convention="ddpo")]
    functions = (
        []
        if reward_funcs is None
        else list(reward_funcs)
        if isinstance(reward_funcs, list | tuple)
        else [reward_funcs]
    )
    if required and not functions:
        raise ValueError("No reward: give reward_function (DDPO's convention) or reward_funcs (TRL's).")
    given = [reward_weights] if isinstance(reward_weights, str | int | float) else reward_weights
    weights = [1.0] * len(functions) if given is None else [as_annotated("reward_weights", w, float) for w in given]
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} values for {len(functions)} reward_funcs.")
    rewards = [make_reward(function, weight) for function, weight in zip(functions, weights, strict=True)]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise ValueError(
            f"reward_funcs are named {', '.join(names)}, and rewards are stored by name. Give each its own `__name__`."
        )
    return rewards
