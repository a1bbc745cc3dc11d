# SPDX-License-Identifier: Apache-2.0

"""From rewards to accepted samples: the weighted sum of the rewards, and the acceptance rule group by group."""

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch

from ..core.acceptance import (
    AcceptanceRule,
    accept_best_of_n,
    accept_preference,
    accept_top_k,
    deduplicate,
    probabilities_of,
)
from ..core.divergence import estimated_kl, implied_kl
from ..core.identity import stable
from ..core.seeding import generator_of
from .prompts import PromptGroup


RANK_RULES = (accept_top_k, accept_best_of_n, accept_preference)


def total_rewards(rewards: torch.Tensor, weights: Sequence[float], groups: Sequence[PromptGroup]) -> torch.Tensor:
    r"""
    Weighted sum of each sample's rewards.

    A reward function that leaves out a whole group does not apply to its prompt and is passed over there. One that
    leaves out some samples of a group leaves them out of the sum as well, because they cannot be compared.

    Args:
        rewards (`torch.Tensor`):
            Rewards (N, F) of the groups' samples in their order, NaN where a function left a sample out.
        weights (`Sequence[float]`):
            F weights.
        groups (`Sequence[PromptGroup]`):
            The groups, of N samples together.

    Returns:
        `torch.Tensor`: (N,), NaN where a sample is left out.
    """
    parts = []
    for block in rewards.split([group.size for group in groups]):
        silent = block.isnan().all(0)
        total = torch.where(silent, 0.0, block * torch.tensor(weights, dtype=block.dtype)).sum(1)
        parts.append(torch.where(silent.all(), torch.nan, total))
    return torch.cat(parts)


def duplicate_keys(key: Callable[..., Any] | None, samples: Iterable[tuple[Any, str]]) -> list[Hashable] | None:
    r"""
    The keys by which equal samples are found; `None` without a function.

    Args:
        key (`Callable` or `None`):
            Function of (PIL image, prompt), the configuration's `deduplicate_by`. Lists, arrays, tensors and images
            that it returns are compared by their content.
        samples (`Iterable[tuple[Any, str]]`):
            PIL images with their prompts.
    """
    return None if key is None else [_as_key(key(image, prompt)) for image, prompt in samples]


def _as_key(value: Any) -> Hashable:
    """The value, or text of its content where it has no hash, or one of its address."""
    if isinstance(value, tuple):
        return tuple(map(_as_key, value))
    by_content = isinstance(value, torch.Tensor) or type(value).__hash__ in (None, object.__hash__)
    return stable(value) if by_content else value


def accept(
    total_reward: torch.Tensor,
    groups: Sequence[PromptGroup],
    rule: AcceptanceRule,
    rule_kwargs: dict[str, Any],
    seed_parts: Iterable[Any],
    keys: Sequence[Hashable] | None = None,
) -> tuple[torch.Tensor, float, int]:
    r"""
    Accept samples group by group.

    Args:
        total_reward (`torch.Tensor`):
            (N,), the groups' samples in their order; NaN leaves a sample out.
        groups (`Sequence[PromptGroup]`):
            The groups, of N samples together.
        rule (`Callable`):
            Acceptance rule, see `trl_pgraft.core.acceptance`.
        rule_kwargs (`dict[str, Any]`):
            The rule's arguments. `k` is meant for the size of the first group, and scaled down in a group that has
            fewer scored samples.
        seed_parts (`Iterable`):
            Seed of the random numbers that are compared with acceptance probabilities, as values that JSON has.
        keys (`Sequence[Hashable]`, *optional*):
            N keys; of a group's samples with equal keys at most one is accepted. `None` accepts samples whether they
            are equal or not.

    Returns:
        `tuple[torch.Tensor, float, int]`: which samples are accepted (N,), bool; the implied KL, averaged over groups,
            in nats; and the number of groups that were skipped, because fewer than two of their samples are scored.
    """
    generator = generator_of(*seed_parts)
    accepted = torch.zeros(len(total_reward), dtype=torch.bool)
    kls = []
    for members in torch.arange(len(total_reward)).split([group.size for group in groups]):
        rows = members[~total_reward[members].isnan()]
        uniform = torch.rand(len(members), generator=generator)[: len(rows)]
        if len(rows) < 2:
            continue
        values = total_reward[rows]
        probabilities = probabilities_of(rule, values, _scaled(rule_kwargs, groups[0].size, len(rows)))
        if keys is not None:
            probabilities = deduplicate(probabilities, [keys[row] for row in rows])
        accepted[rows] = uniform < probabilities
        kls.append(_group_kl(values, rule, probabilities))
    return accepted, sum(kls) / max(1, len(kls)), len(groups) - len(kls)


def accept_rounds(
    total_reward: torch.Tensor,
    groups: Sequence[PromptGroup],
    rounds: Sequence[int],
    rule: AcceptanceRule,
    rule_kwargs: dict[str, Any],
    seed: int,
    keys: Sequence[Hashable] | None = None,
) -> tuple[torch.Tensor, float, int]:
    r"""
    Accept samples of several iterations, those of each as [`accept`] does alone.

    Args:
        total_reward (`torch.Tensor`):
            (N,), the groups' samples in their order; NaN leaves a sample out.
        groups (`Sequence[PromptGroup]`):
            The groups, of N samples together, in the order of their iterations.
        rounds (`Sequence[int]`):
            N numbers of iterations, which do not decrease.
        rule (`Callable`):
            Acceptance rule, see `trl_pgraft.core.acceptance`.
        rule_kwargs (`dict[str, Any]`):
            The rule's arguments.
        seed (`int`):
            The run's seed, with which an iteration that was sampled with it is decided alike.
        keys (`Sequence[Hashable]`, *optional*):
            N keys; see [`accept`].

    Returns:
        `tuple[torch.Tensor, float, int]`: as of [`accept`], over all iterations.
    """
    first = list(itertools.accumulate((group.size for group in groups), initial=0))
    accepted, kl_sum, skipped = torch.zeros(len(total_reward), dtype=torch.bool), 0.0, 0
    for number, found in itertools.groupby(range(len(groups)), lambda index: rounds[first[index]]):
        of_round = list(found)
        rows = slice(first[of_round[0]], first[of_round[-1] + 1])
        own, own_keys = [groups[index] for index in of_round], None if keys is None else keys[rows]
        accepted[rows], kl, left = accept(
            total_reward[rows], own, rule, rule_kwargs, (seed, number, "accept"), own_keys
        )
        kl_sum, skipped = kl_sum + kl * (len(own) - left), skipped + left
    return accepted, kl_sum / max(1, len(groups) - skipped), skipped


def _scaled(kwargs: dict[str, Any], full: int, size: int) -> dict[str, Any]:
    if "k" not in kwargs or size == full:
        return kwargs
    return {**kwargs, "k": min(size - 1, max(1, round(kwargs["k"] * size / full)))}


def _group_kl(values: torch.Tensor, rule: AcceptanceRule, probabilities: torch.Tensor) -> float:
    """Implied KL of one group; with ties, the group's own shares stand for the reward's atoms."""
    if rule not in RANK_RULES:
        return estimated_kl(probabilities)
    k = int(probabilities.count_nonzero())
    if k == 0:
        return 0.0
    _, counts = values.unique(return_counts=True)
    atoms = None if len(counts) == len(values) else tuple((counts / counts.sum()).tolist())
    return implied_kl(len(values), k, atoms=atoms)
