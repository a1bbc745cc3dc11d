# SPDX-License-Identifier: Apache-2.0

"""
Generalized rejection sampling (GRAFT): which of a prompt's samples are accepted.

A rule is a function `rule(rewards, **kwargs)`. It takes the rewards of *one* prompt's group, a 1-D tensor (M,), and
returns probabilities of acceptance A (M,) in [0, 1], which do not decrease with the reward. For each prompt, the
accepted samples follow the optimum of a KL-regularised objective for a reshaped reward r_hat:

    p_accepted(x) ~ p_sampling(x) exp(r_hat(x) / beta),    r_hat(x) / beta = log E[A | x]

Source: generalized rejection sampling of GRAFT, arXiv 2510.02692 (https://huggingface.co/papers/2510.02692).

Rules that rank a group (top-k, best-of-n, preference, a quantile) accept nothing where all rewards are equal, because
accepting the lower indices would be training without selection. Rules that look at each reward alone (exponential, a
fixed threshold, all) keep their meaning in such a group.
"""

import reprlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from .importing import import_function


AcceptanceRule = Callable[..., torch.Tensor]


def _check(rewards: torch.Tensor) -> None:
    if not isinstance(rewards, torch.Tensor) or rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"Expected the rewards of one group, a 1-D float tensor; got {rewards!r}.")
    if not rewards.isfinite().all():
        raise ValueError(f"Rewards must be finite; got {rewards.tolist()}. Leave failed samples out of the group.")


def has_signal(rewards: torch.Tensor) -> bool:
    r"""
    Whether the rewards of a group differ; where they are all equal, a rule that ranks them cannot select.

    Args:
        rewards (`torch.Tensor`):
            (M,), float: the rewards of one group.

    Raises:
        `ValueError`: the rewards are not a finite 1-D float tensor.
    """
    _check(rewards)
    return len(rewards) > 1 and bool((rewards != rewards[0]).any())


def default_k(group_size: int) -> int:
    """Number of accepted samples of `group_size` where [`accept_top_k`] is given none: a quarter, at least one."""
    return max(1, round(group_size / 4))


def accept_top_k(rewards: torch.Tensor, k: int | None = None) -> torch.Tensor:
    r"""
    Accept the k samples of highest reward. Ties go to the lower index.

    Args:
        rewards (`torch.Tensor`):
            (M,), float: the rewards of one group.
        k (`int`, *optional*):
            Number of samples to accept, 1 <= k < M. Defaults to `max(1, round(M / 4))`.

    Returns:
        `torch.Tensor`: (M,), ones and zeros; all zeros where all rewards are equal.

    Raises:
        `ValueError`: k is not in [1, M - 1], or the rewards are not a finite 1-D float tensor.
    """
    _check(rewards)
    group_size = len(rewards)
    k = default_k(group_size) if k is None else k
    if not 1 <= k < group_size:
        raise ValueError(
            f"top_k accepts k={k} of M={group_size} samples of a prompt; that selects nothing. Need 1 <= k < M: "
            "lower k or take more samples per prompt."
        )
    probabilities = torch.zeros_like(rewards)
    if has_signal(rewards):
        probabilities[rewards.sort(descending=True, stable=True).indices[:k]] = 1
    return probabilities


def accept_best_of_n(rewards: torch.Tensor) -> torch.Tensor:
    r"""
    Accept the one sample of highest reward: [`accept_top_k`] with k = 1.

    Args:
        rewards (`torch.Tensor`):
            (M,), float: the rewards of one group, M >= 2.

    Returns:
        `torch.Tensor`: (M,), a one and zeros; all zeros where all rewards are equal.

    Raises:
        `ValueError`: the group has one sample, or the rewards are not a finite 1-D float tensor.
    """
    return accept_top_k(rewards, k=1)


def accept_exponential(rewards: torch.Tensor, beta: float, reward_max: float) -> torch.Tensor:
    r"""
    Classical rejection sampling: accept a sample of reward r with probability `exp((r - reward_max) / beta)`.

    The accepted samples follow `p_accepted ~ p_sampling exp(r / beta)` exactly.

    Args:
        rewards (`torch.Tensor`):
            (M,), float: the rewards of one group.
        beta (`float`):
            Temperature, positive, in units of the reward: the weight of the KL term.
        reward_max (`float`):
            A fixed upper bound of the reward over all prompts. The group's own maximum would bias the accepted law.

    Returns:
        `torch.Tensor`: (M,), probabilities in (0, 1].

    Raises:
        `ValueError`: beta is not positive, a reward exceeds `reward_max`, or the rewards are not a finite 1-D float
            tensor.
    """
    _check(rewards)
    if beta <= 0:
        raise ValueError(f"`beta` must be positive; got {beta}.")
    if (rewards > reward_max).any():
        raise ValueError(
            f"A reward of {rewards.max().item()} exceeds reward_max={reward_max}, which must bound every reward of "
            "every prompt. Raise reward_max."
        )
    return ((rewards - reward_max) / beta).exp()


def accept_threshold(
    rewards: torch.Tensor, threshold: float | None = None, quantile: float | None = None
) -> torch.Tensor:
    r"""
    Accept every sample whose reward is at least a threshold, or at least a quantile of its own group.

    Args:
        rewards (`torch.Tensor`):
            (M,), float: the rewards of one group.
        threshold (`float`, *optional*):
            The lowest accepted reward. Give either this or `quantile`.
        quantile (`float`, *optional*):
            In (0, 1): the lowest accepted reward is this quantile of the group's rewards (linear interpolation).

    Returns:
        `torch.Tensor`: (M,), ones and zeros; with `quantile`, all zeros where all rewards are equal.

    Raises:
        `ValueError`: not exactly one of `threshold` and `quantile` is given, the quantile is outside (0, 1), or the
            rewards are not a finite 1-D float tensor.
    """
    _check(rewards)
    if (threshold is None) == (quantile is None):
        raise ValueError(f"Give exactly one of threshold and quantile; got {threshold=}, {quantile=}.")
    if quantile is not None:
        if not 0 < quantile < 1:
            raise ValueError(f"`quantile` must lie in (0, 1); got {quantile}.")
        if not has_signal(rewards):
            return torch.zeros_like(rewards)
        threshold = rewards.quantile(quantile).item()
    return (rewards >= threshold).to(rewards.dtype)  # type: ignore[operator]


def accept_preference(rewards: torch.Tensor) -> torch.Tensor:
    r"""
    Accept the winner of a pair; the rewards are a preference model's scores.

    Args:
        rewards (`torch.Tensor`):
            (2,), float: the scores of the two samples.

    Returns:
        `torch.Tensor`: (2,), a one and a zero; two zeros where the scores are equal.

    Raises:
        `ValueError`: the group is not a pair, or the rewards are not a finite 1-D float tensor.
    """
    _check(rewards)
    if len(rewards) != 2:
        raise ValueError(f"A preference compares two samples of a prompt; got M={len(rewards)}. Take 2 per prompt.")
    return accept_top_k(rewards, k=1)


def accept_all(rewards: torch.Tensor) -> torch.Tensor:
    r"""
    Accept every sample: the control run, which shows what training does without the reward.

    Args:
        rewards (`torch.Tensor`):
            (M,), float: the rewards of one group.

    Returns:
        `torch.Tensor`: (M,), ones.

    Raises:
        `ValueError`: the rewards are not a finite 1-D float tensor.
    """
    _check(rewards)
    return torch.ones_like(rewards)


ACCEPTANCE_RULES: dict[str, AcceptanceRule] = {
    "top_k": accept_top_k,
    "best_of_n": accept_best_of_n,
    "exponential": accept_exponential,
    "threshold": accept_threshold,
    "preference": accept_preference,
    "all": accept_all,
}


def get_acceptance(rule: str | AcceptanceRule) -> AcceptanceRule:
    r"""
    The acceptance rule of a name.

    Args:
        rule (`str` or `Callable`):
            A name in `ACCEPTANCE_RULES`, `"package.module:function"` to import one, or a rule, which is returned as it
            is.

    Raises:
        `ValueError`: the name is unknown, with a message that lists the known ones, or cannot be imported.
    """
    if callable(rule):
        return rule
    if ":" in rule:
        return import_function(rule, "acceptance")
    if rule not in ACCEPTANCE_RULES:
        raise ValueError(
            f'acceptance={rule!r} is not one of {", ".join(ACCEPTANCE_RULES)}; "package.module:function" and a '
            "callable are taken too."
        )
    return ACCEPTANCE_RULES[rule]


def probabilities_of(rule: AcceptanceRule, rewards: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
    r"""
    The acceptance probabilities of one group, checked.

    Args:
        rule (`Callable`):
            Called with a copy of the rewards; may return a list or an array, of numbers or booleans.
        rewards (`torch.Tensor`):
            (M,), float: the rewards of one group.
        kwargs (`Mapping[str, Any]`):
            The rule's arguments.

    Returns:
        `torch.Tensor`: (M,), in [0, 1], of the type of the rewards.

    Raises:
        `ValueError`: the rule returned anything else than M such probabilities.
    """
    returned = rule(rewards.clone(), **kwargs)
    try:
        probabilities = torch.as_tensor(returned, dtype=rewards.dtype, device=rewards.device).detach()
    except (TypeError, ValueError, RuntimeError):
        probabilities = torch.empty(0)
    if probabilities.shape != rewards.shape or not ((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all():
        raise ValueError(
            f"the rule returned {reprlib.repr(returned)}, a {type(returned).__name__}, for {len(rewards)} rewards; a "
            "tensor of as many probabilities from 0 to 1 is expected."
        )
    return probabilities.clamp(max=1)


def deduplicate(probabilities: torch.Tensor, keys: Sequence[Hashable]) -> torch.Tensor:
    r"""
    Accept at most one of equal samples: the first with a non-zero probability keeps it, the others get 0.

    With a binary reward r the reshaped reward becomes `log(r E[1 / copies | x])`, which favours rare samples.

    Args:
        probabilities (`torch.Tensor`):
            (M,), the acceptance probabilities of one group, from an acceptance rule.
        keys (`Sequence[Hashable]`):
            M keys; samples with equal keys count as the same.

    Returns:
        `torch.Tensor`: (M,), a copy of `probabilities` with zeros for repeated samples.

    Raises:
        `ValueError`: there is not one key per sample.
    """
    if len(keys) != len(probabilities):
        raise ValueError(f"Expected one key for each of {len(probabilities)} samples; got {len(keys)}.")
    seen: set[Hashable] = set()
    kept = probabilities.clone()
    for index, key in enumerate(keys):
        if kept[index] > 0:
            kept[index] *= key not in seen
            seen.add(key)
    return kept
