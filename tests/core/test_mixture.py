# SPDX-License-Identifier: Apache-2.0

"""GRAFT and P-GRAFT on a two-dimensional mixture, where the base model, the exact denoiser, is known.

Six narrow modes on a ring, of which some are preferred; leaving a mode costs reward. The base model makes 8 samples a
group, the best 2 are accepted, a small residual on the exact velocity is trained on them, and the deterministic
sampler runs the tuned model above the switch and the base below it.
"""

import pytest
import torch
from mixtures import Mixture, Residual, euler, flow_level, ring, top_k_mask

from trl_pgraft.core.losses import weighted_mse
from trl_pgraft.core.parameterizations import renoise


MODES, STD, GROUPS, STEPS = 6, 0.1, 1024, 40
BASE = Mixture(ring(MODES, radius=5.0), STD)
PREFERENCE = torch.sin(2 * torch.arange(MODES) * 2 * torch.pi / MODES + 0.3)
SEEDS = (0, 1, 2)


def reward(x_0):
    distance, mode = torch.cdist(x_0, BASE.means).min(1)
    return PREFERENCE[mode] - (distance / (2 * STD)).square().clamp(max=1)


def latents(count, seed):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


def sample(x_t, s_from, s_to, velocity=BASE.velocity):
    steps = round(STEPS * (s_from - s_to))
    return euler(velocity, x_t, s_from, s_to, steps) if steps else x_t


def fine_tune(states, s_i, s_switch, seed, steps=1000, batch_size=256):
    """A residual on the base velocity above the switch, from accepted states at level s_i."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    residual = Residual(width=128)
    optimizer = torch.optim.Adam(residual.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(states), (batch_size,), generator=generator)
        s = 1 - (1 - s_switch) * torch.rand(batch_size, generator=generator, dtype=torch.float64)
        noise = torch.randn(batch_size, 2, generator=generator)
        x_t, target, weight = renoise(states[rows], noise, flow_level(s_i), flow_level(s), "flow_prediction")
        prediction = BASE.velocity(x_t, s) + residual(x_t, s)
        loss = weighted_mse(prediction, target, weight).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return residual


def tuned_reward(residual, s_switch, seed):
    def velocity(x_t, s):
        return BASE.velocity(x_t, s) + residual(x_t, s)

    x_i = sample(latents(8192, seed), 1, s_switch, velocity)
    return reward(sample(x_i, s_switch, 0)).mean().item()


def pgraft(tuned_fraction, seed, from_x_0=False):
    """Reward after one iteration; `from_x_0` re-noises the accepted x_0 instead of the accepted states x_I."""
    s_i = 1 - tuned_fraction
    x_i = sample(latents(8 * GROUPS, seed), 1, s_i)
    x_0 = sample(x_i, s_i, 0)
    accepted = top_k_mask(reward(x_0), group_size=8, k=2)
    states, level = (x_0, 0.0) if from_x_0 else (x_i, s_i)
    residual = fine_tune(states[accepted], level, s_i, seed)
    return tuned_reward(residual, s_i, seed + 1000)


def mean_over_seeds(**options):
    return sum(pgraft(seed=seed, **options) for seed in SEEDS) / len(SEEDS)


@pytest.fixture(scope="module")
def rewards():
    x_0 = sample(latents(8 * GROUPS, 0), 1, 0)
    return {
        "base": reward(x_0).mean().item(),
        "accepted": reward(x_0)[top_k_mask(reward(x_0), 8, 2)].mean().item(),
        "graft": mean_over_seeds(tuned_fraction=1.0),
        "pgraft": mean_over_seeds(tuned_fraction=0.5),
        "x_0 re-noised": mean_over_seeds(tuned_fraction=0.5, from_x_0=True),
    }


def test_the_toy_denoiser_is_exact():
    x_t = (3 * latents(200, 0)).requires_grad_()
    for s in (0.05, 0.4, 0.9):
        alpha, sigma = flow_level(s)
        (score,) = torch.autograd.grad(BASE.log_density(x_t, alpha, sigma).sum(), x_t)
        x_0, noise = BASE.posterior(x_t.detach(), alpha, sigma)
        torch.testing.assert_close(noise, -sigma.float() * score, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alpha.float() * x_0 + sigma.float() * noise, x_t.detach())


@pytest.mark.slow
def test_tuning_approaches_the_accepted_samples(rewards):
    print({name: round(value, 3) for name, value in rewards.items()})
    for name in ("graft", "pgraft", "x_0 re-noised"):
        assert rewards["base"] + 0.4 < rewards[name] < rewards["accepted"]


@pytest.mark.slow
def test_pgraft_beats_graft(rewards):
    assert rewards["pgraft"] > rewards["graft"] + 0.04


@pytest.mark.slow
def test_intermediate_states_beat_re_noised_final_samples(rewards):
    assert rewards["pgraft"] > rewards["x_0 re-noised"] + 0.04


def ancestral(x_t, s_from, s_to):
    """As `sample`, but each step samples the posterior q(x_s' | x_s, x_0) at the predicted x_0 (eta = 1)."""
    generator = torch.Generator().manual_seed(7)
    for s, s_next in torch.linspace(s_from, s_to, round(STEPS * (s_from - s_to)) + 1).unfold(0, 2, 1).tolist():
        x_0, noise = BASE.posterior(x_t, *flow_level(s))
        scale = (1 - s) / (1 - s_next)
        added = s_next * (1 - (scale * s_next / s) ** 2) ** 0.5
        kept = (s_next**2 - added**2) ** 0.5
        x_t = (1 - s_next) * x_0 + kept * noise + added * torch.randn(x_t.shape, generator=generator)
    return x_t


def test_only_the_deterministic_sampler_keeps_what_was_accepted():
    """Restarted from accepted x_I, it gives the accepted rewards at every switch; a stochastic one loses them."""
    for sampler, kept in ((sample, 1.0), (ancestral, 0.5)):
        x_i = sampler(latents(8 * GROUPS, 0), 1, 0.8)
        first = reward(sampler(x_i, 0.8, 0))
        accepted = top_k_mask(first, group_size=8, k=2)
        restarted = reward(sampler(x_i[accepted].flip(0), 0.8, 0)).mean()
        gain = (restarted - first.mean()) / (first[accepted].mean() - first.mean())
        assert gain == pytest.approx(1.0, abs=1e-3) if kept == 1.0 else gain < kept
