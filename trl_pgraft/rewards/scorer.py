# SPDX-License-Identifier: Apache-2.0

"""Score images with reward functions and check the rewards, in threads beside the sampling if requested."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from .conventions import Reward


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
            returned, info = _within(patience.timeout, lambda: reward.function(images, prompts, columns))
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


class Scorer:
    r"""
    Scores batches as they come, in threads if there are any, and returns the results in the order of the batches.

    Args:
        rewards (`Sequence[Reward]`):
            F reward functions.
        patience ([`Patience`]):
            How often each is called, and how long it may take.
        workers (`int`, *optional*, defaults to `0`):
            Number of threads; with 0, [`~Scorer.add`] returns when the batch is scored.
    """

    def __init__(self, rewards: Sequence[Reward], patience: Patience, workers: int = 0) -> None:
        self.rewards = rewards
        self.patience = patience
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._results: list[Future | tuple[torch.Tensor, list[Any]]] = []

    def add(
        self,
        images: torch.Tensor,
        prompts: list[str],
        columns: dict[str, list],
        then: Callable[[torch.Tensor], None] = lambda rewards: None,
    ) -> None:
        r"""
        Score a batch, now or in a thread.

        Args:
            images (`torch.Tensor`):
                uint8, images (B, 3, H, W) or videos (B, F, 3, H, W).
            prompts (`list[str]`):
                B prompts.
            columns (`dict[str, list]`):
                Further columns of the data set by name, B values each.
            then (`Callable`, *optional*):
                Called with the batch's rewards (B, F) as soon as they are there, in the scoring thread.

        Raises:
            [`RewardError`]: a reward function failed; with threads, [`~Scorer.results`] raises it.
        """
        batch = (images, prompts, columns, then)
        self._results.append(self._pool.submit(self._score, *batch) if self._pool else self._score(*batch))

    def results(self) -> list[tuple[torch.Tensor, list[Any]]]:
        r"""
        Wait for all batches, and stop the threads.

        Returns:
            `list[tuple[torch.Tensor, list]]`: for each batch the rewards (B, F), float64, NaN where a function left a
                sample out, and the F functions' infos.

        Raises:
            [`RewardError`]: a reward function failed.
        """
        try:
            return [result.result() if isinstance(result, Future) else result for result in self._results]
        finally:
            if self._pool:
                self._pool.shutdown(cancel_futures=True)

    def _score(
        self, images: torch.Tensor, prompts: list[str], columns: dict[str, list], then: Callable[[torch.Tensor], None]
    ) -> tuple[torch.Tensor, list[Any]]:
        scored = [score(reward, images, prompts, columns, self.patience) for reward in self.rewards]
        rewards = [[math.nan if value is None else value for value in values] for values, _ in scored]
        table = torch.tensor(rewards, dtype=torch.float64).reshape(len(scored), len(prompts)).T
        then(table)
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
