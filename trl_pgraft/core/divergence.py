# SPDX-License-Identifier: Apache-2.0

"""How far acceptance moves the distribution of the samples: implied, estimated and accumulated KL divergence."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def implied_kl(
    group_size: int, k: int = 1, rounds: int = 1, atoms: Sequence[float] | torch.Tensor | None = None
) -> float:
    r"""
    KL divergence from the top-k accepted samples of one prompt to its samples in the first iteration.

    For a continuous reward with CDF u, the density of the accepted samples relative to all samples is

        g(u) = (M/k) sum_{j<k} C(M-1, j) (1-u)^j u^(M-1-j)

    and the KL divergence of one iteration is the integral of `g log g` over [0, 1]; best-of-M has `log M - (M-1)/M`.
    Iterations that sample from the model tuned in the one before compose: with G the CDF of g, each sets
    `d <- d g(G(u))` and `u <- G(u)`, and the result is the integral of `d log d`, which an ideally trained model
    reaches. Iterations that sample from the reference do not accumulate: use `rounds=1`.

    With ties, g is averaged over each atom of the reward, because samples of equal reward are exchangeable. Groups
    whose rewards are all equal accept nothing (see [`accept_top_k`]).

    Args:
        group_size (`int`):
            M, the samples per prompt.
        k (`int`, *optional*, defaults to `1`):
            Number of accepted samples per prompt, 1 <= k < M.
        rounds (`int`, *optional*, defaults to `1`):
            Number of iterations, each of which samples from the model that the one before has tuned.
        atoms (`Sequence[float]` or `torch.Tensor`, *optional*):
            Probabilities of the values of a discrete reward in increasing order of reward, summing to one. A binary
            reward of mean p has `[1 - p, p]`. `None` is a continuous reward.

    Returns:
        `float`: KL in nats.

    Raises:
        `ValueError`: an argument is out of range, or `atoms` are not probabilities that sum to one.

    Source: log g is, up to a constant, the reshaped reward of GRAFT (https://huggingface.co/papers/2510.02692).
    """
    if not 1 <= k < group_size or rounds < 1:
        raise ValueError(f"Need 1 <= k < group_size and rounds >= 1; got {k=}, {group_size=}, {rounds=}.")
    if atoms is None:
        return _continuous_kl(group_size, k, rounds)
    return _atomic_kl(group_size, k, rounds, torch.as_tensor(atoms, dtype=torch.float64))


def _log_binomial_terms(n: int, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """`log C(n, j) p^j q^(n - j)` for j = 0..n, with 0 log 0 = 0; shape (n + 1, *log_p.shape)."""
    j = torch.arange(n + 1, dtype=torch.float64).reshape(-1, *[1] * log_p.ndim)
    log_binomials = math.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
    return log_binomials + torch.where(j == 0, 0.0, j * log_p) + torch.where(j == n, 0.0, (n - j) * log_q)


def _log_cdf(
    log_u: torch.Tensor, log_tail: torch.Tensor, group_size: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    log G and log(1 - G) at log u and log(1 - u), each of any one shape.

    Where N ~ Bin(M, 1 - u) of the samples lie above u, min(k, N) of the k accepted ones do.
    """
    terms = _log_binomial_terms(group_size, log_tail, log_u)
    share = (torch.arange(group_size + 1, dtype=torch.float64) / k).clamp(max=1).reshape(-1, *[1] * log_u.ndim)
    log_below, log_above = (terms + (1 - share).log()).logsumexp(0), (terms + share.log()).logsumexp(0)
    # Each sum is precise where it is small; then its complement is precise too, and no iteration amplifies an error.
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
        terms = _log_binomial_terms(group_size - 1, log_tail, log_u)[:k]
        log_d += math.log(group_size / k) + terms.logsumexp(0)
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
    Plug-in estimate of the KL from one prompt's accepted samples to its samples: `log M + sum p log p`, p normalised.

    It is for rules that look at each reward alone (exponential, fixed threshold, all), where the group is an
    importance sample of the accepted samples. It is biased at small M: it cannot exceed log M, so it is too low where
    fewer than one sample in M is accepted, and slightly too high (of order 1/M) where many are.

    Args:
        probabilities (`torch.Tensor`):
            (M,), the acceptance probabilities of one group.

    Returns:
        `float`: KL in nats; 0 where nothing is accepted, because then nothing changes.
    """
    p = probabilities.double()
    if p.sum() == 0:
        return 0.0
    p = p / p.sum()
    return math.log(len(p)) + torch.xlogy(p, p).sum().item()


def accumulated_kl(
    kl: float, kl_sum: float, rounds: int, group_size: int, k: int | None, composes: bool
) -> tuple[float, bool]:
    r"""
    KL from the samples that all iterations so far have accepted to the samples in the first one.

    If every iteration accepted the top k of M samples without ties, the selections compose, see [`implied_kl`].
    Otherwise the sum of the iterations' divergences stands for it.

    Args:
        kl (`float`):
            Implied KL of the last iteration, in nats.
        kl_sum (`float`):
            Sum of the implied KL of all iterations, the last one included.
        rounds (`int`):
            Number of iterations, the last one included.
        group_size (`int`):
            M, the samples per prompt.
        k (`int` or `None`):
            Number of accepted samples per prompt: 1 for best-of-M and preference, `None` for other rules than top-k.
        composes (`bool`):
            Whether the selections of the iterations before compose; `True` for the first one.

    Returns:
        `tuple[float, bool]`: KL in nats, and whether the selections compose with that of the last iteration.
    """
    if composes and k is not None and k < group_size and abs(kl - implied_kl(group_size, k)) < 1e-9:
        return implied_kl(group_size, k, rounds), True
    return kl_sum, False
