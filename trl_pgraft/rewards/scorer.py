# SPDX-License-Identifier: Apache-2.0

"""Score images with reward functions, and check the rewards."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch

from .conventions import call_reward
from .registry import Reward


class RewardError(RuntimeError):
    """A reward function failed; the message names it and the prompts that it got."""


@dataclass(frozen=True)
class Patience:
    r"""
    How often a reward function is called, and how long it may take.

    Args:
        retries (`int`, *optional*, defaults to `2`):
            Number of further calls after an exception or a time-out.
        wait (`float`, *optional*, defaults to `0.0`):
            Seconds before the first further call; doubled before each next one.
        timeout (`float`, *optional*):
            Seconds that one call may take; no limit where not given.
    """

    retries: int = 2
    wait: float = 0.0
    timeout: float | None = None


def score(
    reward: Reward,
    images: torch.Tensor,
    prompts: list[str],
    columns: dict[str, list],
    patience: Patience = Patience(),  # noqa: B008
) -> tuple[list[float | None], Any]:
    r"""
    Score one batch with one reward function. A failed score is an error and never zero.

    Args:
        reward ([`Reward`]):
            The reward function.
        images (`torch.Tensor`):
            uint8, images (B, 3, H, W) or videos (B, F, 3, H, W).
        prompts (`list[str]`):
            B prompts.
        columns (`dict[str, list]`):
            Further columns of the data set by name, B values each.
        patience ([`Patience`], *optional*, defaults to `Patience()`):
            Number of calls, waits between them, and the time that each may take.

    Returns:
        `tuple[list[float | None], Any]`: B rewards, `None` where the function leaves a sample out, and its info.

    Raises:
        [`RewardError`]: it kept raising or took too long, or returned the wrong number of rewards, or one
            that is not finite.
    """
    where = f"Reward {reward.name!r} on prompts {_shortened(prompts)}"
    for attempt in range(patience.retries + 1):
        try:
            returned, info = _within(patience.timeout, lambda: call_reward(reward, images, prompts, columns))
            rewards = [None if value is None else float(value) for value in returned]
            break
        except Exception as error:
            if attempt == patience.retries:
                raise RewardError(f"{where} raised {error!r} in {attempt + 1} attempts.") from error
            time.sleep(patience.wait * 2**attempt)
    if len(rewards) != len(prompts):
        raise RewardError(f"{where} returned {len(rewards)} values for {len(prompts)} images; one each is expected.")
    for prompt, value in zip(prompts, rewards, strict=True):
        if value is not None and not math.isfinite(value):
            raise RewardError(f"{where} returned {value} for {prompt!r}. Return None to leave a sample out.")
    return rewards, info


def score_all(
    rewards: Sequence[Reward], images: torch.Tensor, prompts: list[str], columns: dict[str, list], patience: Patience
) -> tuple[torch.Tensor, list[Any]]:
    r"""
    Score one batch with all reward functions.

    Args:
        rewards (`Sequence[Reward]`):
            F reward functions.
        images (`torch.Tensor`):
            uint8, images (B, 3, H, W) or videos (B, F, 3, H, W).
        prompts (`list[str]`):
            B prompts.
        columns (`dict[str, list]`):
            Further columns of the data set by name, B values each.
        patience ([`Patience`]):
            How often each function is called, and how long it may take.

    Returns:
        `tuple[torch.Tensor, list]`: the rewards (B, F), float64, NaN where a function left a sample out; and the F
            functions' infos.

    Raises:
        [`RewardError`]: a reward function failed.
    """
    scored = [score(reward, images, prompts, columns, patience) for reward in rewards]
    values = [[math.nan if value is None else value for value in of_one] for of_one, _ in scored]
    table = torch.tensor(values, dtype=torch.float64).reshape(len(scored), len(prompts)).T
    return table, [info for _, info in scored]


def _within(seconds: float | None, function: Callable[[], Any]) -> Any:
    """
    The function's result, or `TimeoutError`.

    A call that hangs cannot be stopped. Its thread is left behind as a daemon, so that the program can end.
    """
    if seconds is None:
        return function()
    outcome: Future = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise TimeoutError(f"no result within {seconds:g} s")
    return outcome.result()


def _shortened(prompts: list[str], most: int = 4) -> str:
    rest = f" and {len(prompts) - most} more" if len(prompts) > most else ""
    return f"{[prompt[:80] for prompt in prompts[:most]]}{rest}"
