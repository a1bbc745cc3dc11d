# SPDX-License-Identifier: Apache-2.0

"""Reward functions by name, and one way to call them whatever their convention."""

import asyncio
import importlib
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image


_REGISTRY: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Reward:
    """
    A named reward function behind one calling convention.

    Args:
        name (`str`):
            Name under which its values are logged and stored.
        function (`Callable`):
            `function(images, prompts, columns)` with uint8 images of shape `(B, 3, H, W)`, `B` prompts and, per extra
            dataset column, a list of `B` values; returns `(values, info)`.
        weight (`float`, *optional*, defaults to `1.0`):
            Its weight in the sum that samples are accepted by.
    """

    name: str
    function: Callable[[torch.Tensor, list[str], dict[str, list]], tuple[Sequence[float | None], Any]]
    weight: float = 1.0


def register_reward(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """
    Decorator that makes a reward function known by `name`, so that configurations and the command line can say it.

    The function follows TRL's convention: `f(*, prompts, images, **columns) -> list[float | None]`, sync or async,
    where `images` are PIL images and `None` leaves a sample out.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _REGISTRY[name] = function
        return function

    return register


def list_rewards() -> list[str]:
    """Names of all registered rewards."""
    return sorted(_REGISTRY)


def get_reward(name: str) -> Callable[..., Any]:
    """
    The reward function registered as `name`, or the one that `"package.module:function"` points to.

    Raises:
        `ValueError`: nothing is known by that name; the message lists what is.
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


def trl_reward(spec: str | Callable[..., Any], weight: float = 1.0) -> Reward:
    """
    Reward of a function in TRL's convention, given as the function, a registered name or `"package.module:function"`.

    Args:
        spec (`str` or `Callable`):
            See [`register_reward`] for the convention.
        weight (`float`, *optional*, defaults to `1.0`):
            Weight in the sum of rewards.
    """
    function = get_reward(spec) if isinstance(spec, str) else spec

    def call(images: torch.Tensor, prompts: list[str], columns: dict[str, list]) -> tuple[Sequence[float | None], Any]:
        values = function(prompts=prompts, images=to_pil(images), **columns)
        return (_waited_for(values) if inspect.isawaitable(values) else values), {}

    name = getattr(function, "__name__", type(function).__name__)
    return Reward(spec.rpartition(":")[2] if isinstance(spec, str) else name, call, weight)


def ddpo_reward(function: Callable[..., Any]) -> Reward:
    """
    Reward of a function in DDPO's convention: `f(images, prompts, metadata) -> (rewards, info)`, with images a float
    tensor of shape `(B, 3, H, W)` in [0, 1], and prompts and metadata tuples of length `B`.
    """

    def call(images: torch.Tensor, prompts: list[str], columns: dict[str, list]) -> tuple[Sequence[float], Any]:
        metadata = columns.get("metadata", [{}] * len(prompts))
        answer = function(images.float() / 255, tuple(prompts), tuple(metadata))
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise TypeError(f"it returned {type(answer).__name__}; a tuple (rewards, info) is expected")
        values, info = answer
        if isinstance(values, list | tuple) and any(value is None for value in values):
            return list(values), info
        return torch.as_tensor(values, dtype=torch.float64).flatten().tolist(), info

    return Reward(getattr(function, "__name__", type(function).__name__), call)


def choose_rewards(
    reward_function: Callable[..., Any] | None,
    reward_funcs: Any,
    reward_weights: Sequence[float] | None,
    required: bool = True,
) -> list[Reward]:
    """
    The rewards that were given in one of the two conventions, as [`Reward`]s.

    Args:
        reward_function (`Callable` or `None`):
            In DDPO's convention, see [`ddpo_reward`].
        reward_funcs (`str`, `Callable` or list of them, or `None`):
            In TRL's convention, see [`trl_reward`].
        reward_weights (`Sequence[float]` or `None`):
            Weights of `reward_funcs`; 1 each where not given.
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
    if reward_funcs is None:
        if not required:
            return []
        raise ValueError("No reward: give reward_function (DDPO's convention) or reward_funcs (TRL's).")
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    weights = list(reward_weights) if reward_weights is not None else [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} values for {len(functions)} reward_funcs.")
    rewards = [trl_reward(function, weight) for function, weight in zip(functions, weights, strict=True)]
    names = [reward.name for reward in rewards]
    if len(set(names)) < len(names):
        raise ValueError(
            f"reward_funcs are named {', '.join(names)}, and values are stored by name. Give each its own `__name__`."
        )
    return rewards


def to_pil(images: torch.Tensor) -> list[Any]:
    """PIL images of a uint8 tensor of shape `(B, 3, H, W)`; of videos `(B, F, 3, H, W)` a list of frames each."""
    if images.ndim == 5:
        return [to_pil(video) for video in images]
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def _waited_for(values: Awaitable[Any]) -> Any:
    """The awaited result, from a thread of its own, because a notebook's thread runs an event loop already."""

    async def wait() -> Any:
        return await values

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, wait()).result()
