# SPDX-License-Identifier: Apache-2.0

"""Gaussian mixtures, whose exact denoiser is known at every noise level, and what the tests share around them."""

import math

import torch
from torch import nn

from trl_pgraft.core.acceptance import accept_top_k
from trl_pgraft.core.noise_schedules import as_coefficients, expand


class Mixture:
    """Isotropic Gaussians of one width. `log_weights` is (K,), or (C, K): one row per condition."""

    def __init__(self, means: torch.Tensor, std: float, log_weights: torch.Tensor | None = None):
        self.means = means  # (K, D)
        self.std = std
        self.log_weights = torch.zeros(len(means)) if log_weights is None else log_weights

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        component = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.std * noise

    def _log_components(self, x_t, scale, sigma, condition=None):
        """log weight + log density of each component at x_t = scale x + sigma noise, up to a constant; (B, K)."""
        log_weights = self.log_weights if condition is None else self.log_weights[condition]
        scale, variance = expand(scale, x_t), self._variance(expand(scale, x_t), expand(sigma, x_t))
        distance = (x_t[:, None] - scale[..., None] * self.means).square().sum(-1)
        return log_weights - distance / (2 * variance) - x_t.shape[1] / 2 * variance.log()

    def _variance(self, scale, sigma):
        return sigma.square() + (scale * self.std).square()

    def log_density(self, x_t, scale, sigma):
        """log p(x_t) up to a constant, where x_t = scale x + sigma noise and x follows the mixture; (B,)."""
        return self._log_components(x_t, scale, sigma).logsumexp(1)

    def posterior(self, x_t, alpha, sigma, condition=None):
        """E[x_0 | x_t] and E[noise | x_t]; `alpha` and `sigma` are () or (B,)."""
        weights = self._log_components(x_t, alpha, sigma, condition).softmax(1)
        alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
        mean = weights @ self.means  # E[component mean | x_t]
        offset = (x_t - alpha * mean) / self._variance(alpha, sigma)
        return mean + alpha * self.std**2 * offset, sigma * offset

    def velocity(self, x_t, s, condition=None):
        """The exact rectified-flow velocity E[noise - x_0 | x_t] at s in [0, 1], () or (B,)."""
        x_0, noise = self.posterior(x_t, *flow_level(s), condition)
        return noise - x_0


def flow_level(s):
    """(alpha, sigma) of rectified flow."""
    s = as_coefficients(s)
    return 1 - s, s


def ring(count: int, radius: float) -> torch.Tensor:
    """`count` points on a circle, (count, 2)."""
    angle = torch.arange(count) * 2 * math.pi / count
    return radius * torch.stack([angle.cos(), angle.sin()], 1)


class Residual(nn.Module):
    """A small MLP (x_t, s, condition) -> (B, 2), zero at the start: what is trained on top of the exact field."""

    def __init__(self, width: int, conditions: int = 0, frequencies: int = 4):
        super().__init__()
        self.conditions, self.frequencies = conditions, frequencies
        inputs = 2 + 2 * frequencies + conditions
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x_t, s, condition=None):
        s = torch.as_tensor(s, dtype=x_t.dtype).expand(len(x_t))[:, None]
        phase = s * math.pi / 2 * torch.arange(1, self.frequencies + 1)
        features = [x_t, phase.sin(), phase.cos()]
        if self.conditions:
            features.append(nn.functional.one_hot(condition, self.conditions).to(x_t.dtype))
        return self.layers(torch.cat(features, 1))


@torch.no_grad()
def euler(velocity, x, s_from: float, s_to: float, steps: int):
    """Integrate `velocity(x, s)` from noise level s_from to s_to in equal Euler steps."""
    for s, s_next in torch.linspace(s_from, s_to, steps + 1).unfold(0, 2, 1).tolist():
        x = x + (s_next - s) * velocity(x, s)
    return x


def top_k_mask(rewards: torch.Tensor, group_size: int, k: int) -> torch.Tensor:
    """Which of the samples, in groups of `group_size`, are accepted; (B,) bool."""
    return torch.cat([accept_top_k(group, k) for group in rewards.reshape(-1, group_size)]).bool()


def neighbour_kl(x: torch.Tensor, y: torch.Tensor, neighbours: int = 5) -> float:
    """KL(p_x || p_y) in nats from samples (n, D) and (m, D), by the distances to the k-th neighbour in each set."""
    x, y = x.double(), y.double()
    exact = "donot_use_mm_for_euclid_dist"
    within = torch.cdist(x, x, compute_mode=exact).kthvalue(neighbours + 1, dim=1).values
    across = torch.cdist(x, y, compute_mode=exact).kthvalue(neighbours, dim=1).values
    return x.shape[1] * (across / within).log().mean().item() + math.log(len(y) / (len(x) - 1))
