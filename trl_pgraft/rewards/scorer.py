# SPDX-License-Identifier: Apache-2.0

"""Score images with reward functions, and check the rewards."""

import errno
import math
import reprlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch

from .conventions import call_reward
from .registry import Reward


# What a later call may overcome. Base classes by their names, because their libraries may be missing: Python's own and
# those of http.client, urllib, requests, httpx, huggingface_hub, aiohttp, openai and gRPC. And the system's errors.
_TRANSIENT = {
    *("ConnectionError", "TimeoutError", "TimeoutExpired"),
    *("gaierror", "herror", "SSLError", "URLError", "HTTPError", "HTTPException"),
    *("RequestException", "RequestError", "LocalEntryNotFoundError", "ClientError", "APIError", "RpcError"),
    *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
}


class RewardError(RuntimeError):
    """A reward function failed; the message names it and the prompts that it got."""


@dataclass(frozen=True)
class Patience:
    r"""
    How often a reward function is called, and how long it may take.

    Args:
        retries (`int`, *optional*, defaults to `2`):
            Number of further calls after an error of the network or a time-out; other errors are raised at once.
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
        [`RewardError`]: it raised an error, kept failing to reach a server or to end in time, or returned something
            else than one finite number or `None` for each image.
    """
    where = f"Reward {reward.name!r} on prompts {_shortened(prompts)}"
    for attempt in range(patience.retries + 1):
        try:
            returned, info = _within(patience.timeout, lambda: call_reward(reward, images, prompts, columns))
            break
        except Exception as error:
            if attempt == patience.retries or not _is_transient(error):
                raise RewardError(f"{where} raised {error!r} in {attempt + 1} attempts.") from error
            time.sleep(patience.wait * 2**attempt)
    return _numbers(returned, prompts, where), info


def _is_transient(error: Exception) -> bool:
    """Whether a later call may succeed: errors of the network, and time-outs."""
    # A ValueError of such a library is about what it was given: an address, a certificate, or text that is no JSON.
    return not isinstance(error, ValueError) and not _TRANSIENT.isdisjoint(
        [*(kind.__name__ for kind in type(error).__mro__), errno.errorcode.get(getattr(error, "errno", None) or 0)]
    )


def _numbers(returned: Any, prompts: list[str], where: str) -> list[float | None]:
    """The rewards that a function returned, one for each prompt; shapes (B, 1) and (1, B) are taken as (B,)."""
    if not isinstance(returned, list | tuple) and not hasattr(returned, "tolist"):
        raise RewardError(
            f"{where} returned {reprlib.repr(returned)}, a {type(returned).__name__}; a list, tuple, array or tensor "
            "of one number for each image is expected."
        )
    rows = _plain(returned)
    values = [_plain(row) for row in (rows if isinstance(rows, list | tuple) else [rows])]
    if len(values) != len(prompts):
        raise RewardError(
            f"{where} returned {len(values)} values for {len(prompts)} images, {reprlib.repr(returned)}; one each is "
            "expected."
        )
    for prompt, value in zip(prompts, values, strict=True):
        if value is not None and (
            isinstance(value, bool)
            or not hasattr(value, "__float__")
            or not abs(value) <= torch.finfo(torch.float64).max
        ):
            raise RewardError(
                f"{where} returned {reprlib.repr(value)} for {prompt!r}, a {type(value).__name__}; a finite number is "
                "expected, and in place of a bool 1.0 or 0.0. Return None to leave a sample out."
            )
    return [None if value is None else float(value) for value in values]


def _plain(value: Any) -> Any:
    """Lists and numbers in the place of an array or tensor; of one item, the item."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return _plain(plain[0]) if isinstance(plain, list | tuple) and len(plain) == 1 else plain


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
    return (
        torch.tensor(values, dtype=torch.float64).reshape(len(scored), len(prompts)).T,
        [info for _, info in scored],
    )


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
    return f"{[prompt[:80] for prompt in prompts[:most]]}" + f" and {len(prompts) - most} more" * (len(prompts) > most)
