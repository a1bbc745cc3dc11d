# SPDX-License-Identifier: Apache-2.0

"""Score images with reward functions, check what they answer, and overlap scoring with sampling where asked."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from .registry import Reward


class RewardError(RuntimeError):
    """A reward function failed; the message names it and the prompts it was given."""


@dataclass(frozen=True)
class Patience:
    """
    How long a reward function is waited for.

    Args:
        retries (`int`, *optional*, defaults to `2`):
            Further attempts after an exception or a time-out.
        wait (`float`, *optional*, defaults to `0.0`):
            Seconds before the first further attempt; doubled before each next one.
        timeout (`float`, *optional*):
            Seconds that one call may take; as long as it likes where not given.
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
    """
    Values of one reward on a batch, checked.

    Args:
        reward ([`Reward`]):
            What to call.
        images (`torch.Tensor` of shape `(B, 3, H, W)`, uint8):
            Images.
        prompts (`list[str]`):
            `B` prompts.
        columns (`dict[str, list]`):
            Further columns, `B` values each.
        patience ([`Patience`], *optional*):
            Attempts, waits between them, and the time that each may take.

    Returns:
        `tuple[list[float | None], Any]`: `B` values, `None` where the function leaves a sample out, and its info.

    Raises:
        [`RewardError`]: it kept raising or did not answer in time, or returned the wrong number of values, or a value
            that is not finite.
    """
    where = f"Reward {reward.name!r} on prompts {_shortened(prompts)}"
    for attempt in range(patience.retries + 1):
        try:
            values, info = _within(patience.timeout, lambda: reward.function(images, prompts, columns))
            values = [None if value is None else float(value) for value in values]
            break
        except Exception as error:
            if attempt == patience.retries:
                raise RewardError(f"{where} raised {error!r} in {attempt + 1} attempts.") from error
            time.sleep(patience.wait * 2**attempt)
    if len(values) != len(prompts):
        raise RewardError(f"{where} returned {len(values)} values for {len(prompts)} images; one each is expected.")
    for prompt, value in zip(prompts, values, strict=True):
        if value is not None and not math.isfinite(value):
            raise RewardError(f"{where} returned {value} for {prompt!r}. Return None to leave a sample out.")
    return values, info


class Scorer:
    """
    Scores batches as they come, in threads where asked, and returns the results in the order of the batches.

    Args:
        rewards (`Sequence[Reward]`):
            `F` reward functions.
        patience ([`Patience`]):
            How long they are waited for.
        workers (`int`, *optional*, defaults to `0`):
            Threads; 0 scores at once.
    """

    def __init__(self, rewards: Sequence[Reward], patience: Patience, workers: int = 0):
        self.rewards = rewards
        self.patience = patience
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._results: list[Future | tuple[torch.Tensor, list[Any]]] = []

    def add(
        self,
        images: torch.Tensor,
        prompts: list[str],
        columns: dict[str, list],
        then: Callable[[torch.Tensor], None] = lambda values: None,
    ) -> None:
        """Score a batch of uint8 images of shape `(B, 3, H, W)`, and call `then` with its values `(B, F)`."""
        work = (images, prompts, columns, then)
        self._results.append(self._pool.submit(self._score, *work) if self._pool else self._score(*work))

    def results(self) -> list[tuple[torch.Tensor, list[Any]]]:
        """Of each batch the values, shape `(B, F)` with NaN where left out, and each function's info."""
        try:
            return [result.result() if isinstance(result, Future) else result for result in self._results]
        finally:
            if self._pool:
                self._pool.shutdown(cancel_futures=True)

    def _score(
        self, images: torch.Tensor, prompts: list[str], columns: dict[str, list], then: Callable[[torch.Tensor], None]
    ) -> tuple[torch.Tensor, list]:
        answers = [score(reward, images, prompts, columns, self.patience) for reward in self.rewards]
        values = [[math.nan if value is None else value for value in values] for values, _ in answers]
        table = torch.tensor(values, dtype=torch.float64).reshape(len(answers), len(prompts)).T
        then(table)
        return table, [info for _, info in answers]


def _within(seconds: float | None, function: Callable[[], Any]) -> Any:
    """
    The function's result, or `TimeoutError`.

    What does not answer cannot be stopped: its thread is left behind, as a daemon, so that it does not keep the
    program from ending.
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
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _shortened(prompts: list[str], most: int = 4) -> str:
    rest = f" and {len(prompts) - most} more" if len(prompts) > most else ""
    return f"{[prompt[:80] for prompt in prompts[:most]]}{rest}"
