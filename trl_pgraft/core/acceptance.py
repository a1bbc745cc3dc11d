# SPDX-License-Identifier: Apache-2.0

"""Generalized rejection sampling (GRAFT): which of a prompt's samples are accepted, and how far that moves their law.

A rule is a function `rule(rewards, **kwargs)` from the rewards of *one* prompt's group, a 1-D tensor (M,), to
probabilities of acceptance (M,) in [0, 1], non-decreasing in the reward. The accepted samples follow the optimum of a
KL-regularised objective for the reshaped reward `r_hat(x) / beta = log E[A | x]`:
`p_accepted ~ p_sampling exp(r_hat / beta)`, for each prompt (https://huggingface.co/papers/2510.02692).

Rules that rank a group (top-k, best-of-n, preference, a quantile) accept nothing where all its rewards are equal: to
take the lower indices there would be training without selection. Rules that look at each reward alone (exponential,
a fixed threshold, all) keep their meaning in such a group.
"""

from collections.abc import Callable, Hashable, Sequence

import torch


def _check(rewards: torch.Tensor) -> None:
    if not isinstance(rewards, torch.Tensor) or rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(f"Expected the rewards of one group, a 1-D float tensor; got {rewards!r}.")
    if not rewards.isfinite().all():
        raise ValueError(f"Rewards must be finite; got {rewards.tolist()}. Leave failed samples out of the group.")


def has_signal(rewards: torch.Tensor) -> bool:
    """Whether the rewards (M,) of a group differ at all; where they do not, a rank rule has nothing to select by."""
    _check(rewards)
    return len(rewards) > 1 and bool((rewards != rewards[0]).any())


def accept_top_k(rewards: torch.Tensor, k: int | None = None) -> torch.Tensor:
    r"""
    Accept the k samples of highest reward. Ties go to the lower index.

    Args:
        rewards (`torch.Tensor`):
            (M,), the rewards of one group.
        k (`int`, *optional*):
            How many to accept, 1 <= k < M. Defaults to `max(1, round(M / 4))`.

    Returns:
        `torch.Tensor`: (M,), ones and zeros; all zeros where all rewards are equal.

    Raises:
        `ValueError`: k is not in [1, M - 1], or the rewards are not a finite 1-D float tensor.
    """
    _check(rewards)
    group_size = len(rewards)
    k = max(1, round(group_size / 4)) if k is None else k
    if not 1 <= k < group_size:
        raise ValueError(
            f"top_k accepts k={k} of M={group_size} samples of a prompt; that selects nothing. Need 1 <= k < M: "
            "lower k or draw more samples per prompt."
        )
    probabilities = torch.zeros_like(rewards)
    if has_signal(rewards):
        probabilities[rewards.sort(descending=True, stable=True).indices[:k]] = 1
    return probabilities


def accept_best_of_n(rewards: torch.Tensor) -> torch.Tensor:
    """Accept the one sample (of M) with the highest reward: [`accept_top_k`] with k = 1."""
    return accept_top_k(rewards, k=1)


def accept_exponential(rewards: torch.Tensor, beta: float, reward_max: float) -> torch.Tensor:
    r"""
    Classical rejection sampling: accept with probability `exp((r - reward_max) / beta)`.

    The accepted law is `p ~ p_sampling exp(r / beta)`, exactly.

    Args:
        rewards (`torch.Tensor`):
            (M,), the rewards of one group.
        beta (`float`):
            Temperature, positive, in units of the reward: the weight of the KL term.
        reward_max (`float`):
            A fixed upper bound of the reward. The group's own maximum would not do: it biases the accepted law.

    Returns:
        `torch.Tensor`: (M,).

    Raises:
        `ValueError`: beta is not positive, or a reward exceeds `reward_max`.
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
            (M,), the rewards of one group.
        threshold (`float`, *optional*):
            The lowest accepted reward.
        quantile (`float`, *optional*):
            In (0, 1): the group's quantile (linear interpolation) that takes the place of the threshold.

    Returns:
        `torch.Tensor`: (M,), ones and zeros; with `quantile`, all zeros where all rewards are equal.

    Raises:
        `ValueError`: not exactly one of `threshold` and `quantile` is given, or the quantile is outside (0, 1).
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
    return (rewards >= threshold).to(rewards.dtype)


def accept_preference(rewards: torch.Tensor) -> torch.Tensor:
    r"""
    Accept the winner of a pair; the rewards are a preference model's scores.

    Args:
        rewards (`torch.Tensor`):
            (2,), the scores of the two samples.

    Returns:
        `torch.Tensor`: (2,), one and zero; two zeros where the scores are equal.

    Raises:
        `ValueError`: the group is not a pair.
    """
    _check(rewards)
    if len(rewards) != 2:
        raise ValueError(f"A preference compares two samples of a prompt; got M={len(rewards)}. Draw 2 per prompt.")
    return accept_top_k(rewards, k=1)


def accept_all(rewards: torch.Tensor) -> torch.Tensor:
    """Accept everything: the control, which tells what training does apart from the reward."""
    _check(rewards)
    return torch.ones_like(rewards)


ACCEPTANCE_RULES: dict[str, Callable[..., torch.Tensor]] = {
    "top_k": accept_top_k,
    "best_of_n": accept_best_of_n,
    "exponential": accept_exponential,
    "threshold": accept_threshold,
    "preference": accept_preference,
    "all": accept_all,
}


def get_acceptance(rule: str | Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The rule of a name in `ACCEPTANCE_RULES`; a callable is returned as it is. `ValueError` for an unknown name."""
    if callable(rule):
        return rule
    if rule not in ACCEPTANCE_RULES:
        raise ValueError(f"Unknown acceptance rule {rule!r}; known are {', '.join(ACCEPTANCE_RULES)}, or a callable.")
    return ACCEPTANCE_RULES[rule]


def deduplicate(probabilities: torch.Tensor, keys: Sequence[Hashable]) -> torch.Tensor:
    r"""
    Accept at most one of equal samples: the first with a non-zero probability keeps it, the others get 0.

    With a binary reward the reshaped reward becomes `log(r E[1 / copies | x])`, which favours what is rare.

    Args:
        probabilities (`torch.Tensor`):
            (M,), what an acceptance rule returned.
        keys (`Sequence[Hashable]`):
            M keys; samples with equal keys count as the same.

    Returns:
        `torch.Tensor`: (M,).

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
