# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Generalized rejection sampling (GRAFT): which of a prompt's samples are accepted, and how far that moves their law.

A rule is a function `rule(rewards, **kwargs)` from the rewards of *one* prompt's group, a 1-D tensor (M,), to
probabilities of acceptance (M,) in [0, 1], non-decreasing in the reward. The accepted samples follow the optimum of a
KL-regularised objective for the reshaped reward `r_hat(x) / beta = log E[A | x]`:
`p_accepted ~ p_sampling exp(r_hat / beta)`, for each prompt (https://huggingface.co/papers/2510.02692).

Rules that rank a group (top-k, best-of-n, preference, a quantile) accept nothing where all its rewards are equal: to
take the lower indices there would be training without selection. Rules that look at each reward alone (exponential,
a fixed threshold, all) keep their meaning in such a group.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F


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


def _log_binomials(n: int) -> torch.Tensor:
    j = torch.arange(n + 1, dtype=torch.float64)
    return math.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)


def _times_log(count: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """`count log p`, where 0 log 0 = 0."""
    return torch.where(count == 0, 0.0, count * log_p)


def _log_binomial_terms(n: int, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`log C(n, j) p^j q^(n - j)` for j = 0..n, shape (n + 1, *log_p.shape)."""
    j = torch.arange(n + 1, dtype=torch.float64).reshape(-1, *[1] * log_p.ndim)
    return _log_binomials(n).reshape(j.shape) + _times_log(j, log_p) + _times_log(n - j, log_q)


def implied_kl(
    group_size: int, k: int = 1, rounds: int = 1, atoms: Sequence[float] | torch.Tensor | None = None
) -> float:
    r"""
    KL divergence, in nats, from the law of top-k accepted samples to the law of the first round's samples, per prompt.

    For a continuous reward with CDF u, top-k of M has the density `g(u) = (M/k) sum_{j<k} C(M-1, j) (1-u)^j u^(M-1-j)`
    relative to the sampling law. One round gives `int g log g du` (best-of-M: `log M - (M-1)/M`). Rounds that sample
    from the model tuned in the round before compose, `d <- d g(G(u)), u <- G(u)` with G the CDF of g, and the result
    is `int d log d du`: what an ideal fit would reach. Rounds that sample from the reference do not accumulate: use
    `rounds=1`.

    With ties g is averaged over each atom of the reward, for samples of equal reward are exchangeable, and groups
    whose rewards are all equal accept nothing (see [`accept_top_k`]).

    Args:
        group_size (`int`):
            M, samples per prompt.
        k (`int`, *optional*, defaults to `1`):
            How many of them are accepted, 1 <= k < M.
        rounds (`int`, *optional*, defaults to `1`):
            Rounds in which the samples came from the tuned model.
        atoms (`Sequence[float]`, *optional*):
            Probabilities of the values of a discrete reward in increasing order of reward, summing to one. A binary
            reward of mean p has `[1 - p, p]`. `None` is a continuous reward.

    Returns:
        `float`: KL in nats.

    Raises:
        `ValueError`: an argument is out of range.
    """
    if not 1 <= k < group_size or rounds < 1:
        raise ValueError(f"Need 1 <= k < group_size and rounds >= 1; got {k=}, {group_size=}, {rounds=}.")
    if atoms is None:
        return _continuous_kl(group_size, k, rounds)
    return _atomic_kl(group_size, k, rounds, torch.as_tensor(atoms, dtype=torch.float64))


def _log_density(log_u: torch.Tensor, log_tail: torch.Tensor, group_size: int, k: int) -> torch.Tensor:
    """log g at the reward's CDF u, tail = 1 - u."""
    terms = _log_binomial_terms(group_size - 1, log_tail, log_u)[:k]
    return math.log(group_size / k) + terms.logsumexp(0)


def _log_cdf(
    log_u: torch.Tensor, log_tail: torch.Tensor, group_size: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log G and log(1 - G): of k accepted, min(k, N) lie in the tail when N ~ Bin(M, tail) samples do."""
    terms = _log_binomial_terms(group_size, log_tail, log_u)
    share = (torch.arange(group_size + 1, dtype=torch.float64) / k).clamp(max=1).reshape(-1, *[1] * log_u.ndim)
    log_below, log_above = (terms + (1 - share).log()).logsumexp(0), (terms + share.log()).logsumexp(0)
    # Each sum is precise where it is small; its complement is then precise too, and rounds cannot blow up an error.
    complement = (-torch.minimum(log_below, log_above).exp()).log1p()
    below_is_small = log_below < log_above
    return torch.where(below_is_small, log_below, complement), torch.where(below_is_small, complement, log_above)


@functools.lru_cache(maxsize=256)
def _continuous_kl(group_size: int, k: int, rounds: int) -> float:
    # u = sigmoid(x): the integrand in x is smooth and decays exponentially at both ends, so the trapezoidal rule
    # converges faster than any power of the step.
    upper = 40 + rounds * math.log(group_size / k)
    x = torch.arange(-40, upper, 0.05, dtype=torch.float64)
    log_u, log_tail = F.logsigmoid(x), F.logsigmoid(-x)
    log_jacobian = log_u + log_tail
    log_d = torch.zeros_like(x)
    for _ in range(rounds):
        log_d += _log_density(log_u, log_tail, group_size, k)
        log_u, log_tail = _log_cdf(log_u, log_tail, group_size, k)
    return (0.05 * ((log_d + log_jacobian).exp() * log_d).sum()).item()


def _atomic_kl(group_size: int, k: int, rounds: int, atoms: torch.Tensor) -> float:
    if (atoms < 0).any() or abs(atoms.sum().item() - 1) > 1e-6:
        raise ValueError(f"`atoms` must be non-negative and sum to one; got {atoms.tolist()}.")
    accepted = atoms = atoms / atoms.sum()
    for _ in range(rounds):
        u = accepted.cumsum(0).clamp(max=1)
        cdf = _log_cdf(u.log(), (-u).log1p(), group_size, k)[0].exp()
        # The groups in which every reward is the same atom accept nothing.
        selected = (torch.diff(cdf, prepend=cdf.new_zeros(1)) - accepted**group_size).clamp(min=0)
        if selected.sum() < 1e-12:
            break
        accepted = selected / selected.sum()
    return (torch.xlogy(accepted, accepted) - torch.xlogy(accepted, atoms)).sum().item()


def estimated_kl(probabilities: torch.Tensor) -> float:
    r"""
    Plug-in estimate of the KL from the accepted law to the sampling law: `log M + sum p log p`, p normalised.

    For rules that look at each reward alone (exponential, fixed threshold, all), where the group is an importance
    sample of the accepted law. At small M it is biased: it cannot exceed log M, so it is too low where fewer than one
    sample in M is accepted, and slightly too high (of order 1/M) where many are.

    Args:
        probabilities (`torch.Tensor`):
            (M,), acceptance probabilities of samples of one prompt.

    Returns:
        `float`: KL in nats; 0 where nothing is accepted, because then nothing changes.
    """
    p = probabilities.double()
    if p.sum() == 0:
        return 0.0
    p = p / p.sum()
    return math.log(len(p)) + torch.xlogy(p, p).sum().item()
