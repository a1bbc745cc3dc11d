# SPDX-License-Identifier: Apache-2.0

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from mixtures import Mixture

from trl_pgraft.core.noise_schedules import CLEAN, NoiseSchedule, expand
from trl_pgraft.core.parameterizations import PREDICTION_TYPES, combine, predicted_original, renoise
from trl_pgraft.pipelines.schedulers import prediction_type_of


SCHEDULES = {
    "vp": NoiseSchedule.from_scheduler(DDIMScheduler(beta_schedule="scaled_linear")),
    "vp_zero_snr": NoiseSchedule.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True)),
    "flow": NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler()),
}

parametrize_types = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
parametrize_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def timesteps(count, low, high, seed=0):
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_prediction_type_of_reads_the_config(name):
    assert prediction_type_of(DPMSolverMultistepScheduler(prediction_type=name, use_flow_sigmas=True)) == name


def test_prediction_type_of_flow_matching_and_of_strangers():
    assert prediction_type_of(FlowMatchEulerDiscreteScheduler()) == "flow_prediction"
    for config in (SimpleNamespace(prediction_type="score"), SimpleNamespace()):
        with pytest.raises(ValueError, match="SimpleNamespace.*epsilon, sample"):
            prediction_type_of(SimpleNamespace(config=config))


def test_combine_by_definition():
    x_0, noise, alpha, sigma = random(2, 3), random(2, 3, seed=1), 0.6, 0.8
    assert combine("epsilon", x_0, noise, alpha, sigma) is noise
    assert combine("sample", x_0, noise, alpha, sigma) is x_0
    torch.testing.assert_close(combine("v_prediction", x_0, noise, alpha, sigma), alpha * noise - sigma * x_0)
    torch.testing.assert_close(combine("flow_prediction", x_0, noise, alpha, sigma), noise - x_0)
    with pytest.raises(ValueError, match="'score'"):
        combine("score", x_0, noise, alpha, sigma)


def test_v_is_the_velocity_of_diffusers():
    scheduler, t = DDIMScheduler(), torch.tensor([0, 10, 300, 700, 999])
    x_0, noise = random(5, 3), random(5, 3, seed=1)
    alpha, sigma = NoiseSchedule.from_scheduler(scheduler)(t)
    ours = combine("v_prediction", x_0, noise, alpha, sigma)
    torch.testing.assert_close(ours, scheduler.get_velocity(x_0, noise, t), atol=1e-5, rtol=1e-5)


@parametrize_types
@parametrize_schedules
def test_round_trip(schedule, prediction_type):
    x_0, noise = random(200, 3, 2), random(200, 3, 2, seed=1)
    alpha, sigma = schedule(timesteps(200, 1, 998))
    x_t = expand(alpha, x_0) * x_0 + expand(sigma, noise) * noise
    prediction = combine(prediction_type, x_0, noise, alpha, sigma)
    recovered = predicted_original(prediction_type, prediction, x_t, alpha, sigma)
    torch.testing.assert_close(recovered, (x_0, noise), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_round_trip_at_pure_noise(prediction_type):
    x_0, noise = random(4, 3), random(4, 3, seed=1)
    prediction = combine(prediction_type, x_0, noise, 0.0, 1.0)
    torch.testing.assert_close(predicted_original(prediction_type, prediction, noise, 0.0, 1.0), (x_0, noise))


@parametrize_types
@parametrize_schedules
def test_from_clean_data_it_is_the_ordinary_loss(schedule, prediction_type):
    x_0, noise = random(50, 3, 2), random(50, 3, 2, seed=1)
    alpha, sigma = schedule(timesteps(50, 1, 999))
    x_t, target, weight = renoise(x_0, noise, CLEAN, (alpha, sigma), prediction_type)
    torch.testing.assert_close(x_t, expand(alpha, x_0) * x_0 + expand(sigma, x_0) * noise)
    torch.testing.assert_close(target, combine(prediction_type, x_0, noise, alpha, sigma))
    torch.testing.assert_close(weight, torch.ones_like(weight))


@parametrize_types
@parametrize_schedules
def test_targets_of_one_pair_agree_with_x_t(schedule, prediction_type):
    """In every parameterization the target is the same pair (x_0*, noise*), and x_t = alpha x_0* + sigma noise*."""
    x_i, noise, level_t = random(50, 2), random(50, 2, seed=1), schedule(timesteps(50, 401, 990))
    x_t, target, _ = renoise(x_i, noise, schedule(400), level_t, prediction_type)
    x_0, eps = predicted_original(prediction_type, target, x_t, *level_t)
    epsilon = renoise(x_i, noise, schedule(400), level_t, "epsilon").target
    torch.testing.assert_close(eps, epsilon, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(x_0, renoise(x_i, noise, schedule(400), level_t, "sample").target, rtol=1e-8, atol=1e-8)


GAUSSIAN = Mixture(torch.tensor([[0.5, -1.0]], dtype=torch.float64), 0.3)
# Narrower than the noise in x_I: no x_0 was ever noised to this law, as is true of accepted states.
MIXTURE = Mixture(
    torch.tensor([[-1.2, 0.3], [0.4, 0.8], [1.1, -0.9]], dtype=torch.float64),
    0.15,
    torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log(),
)


def exact_prediction(law, x_t, level_i, level_t, prediction_type):
    """By Tweedie's formula from the score of x_t, with the score by autograd: shares no algebra with `renoise`."""
    (alpha_i, sigma_i), (alpha_t, sigma_t) = level_i, level_t
    scale = alpha_t / alpha_i
    sigma_ti = (sigma_t**2 - scale**2 * sigma_i**2).sqrt()
    x_t = x_t.clone().requires_grad_()
    (score,) = torch.autograd.grad(law.log_density(x_t, scale, sigma_ti).sum(), x_t)
    x_0 = (x_t.detach() + expand(sigma_t, x_t).square() * score) / expand(alpha_t, x_t)
    return combine(prediction_type, x_0, -expand(sigma_t, x_t) * score, alpha_t, sigma_t)


def binned_z(x_t, residual, bins=24):
    """z-scores of the mean residual within bins of the first coordinate of x_t; (bins, D)."""
    chunks = residual[x_t[:, 0].argsort()].chunk(bins)
    return torch.stack([c.mean(0) / (c.std(0) / math.sqrt(len(c))) for c in chunks])


@parametrize_types
@pytest.mark.parametrize("law", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
@pytest.mark.parametrize("kind", ["vp", "flow"])
@pytest.mark.parametrize("high", [420, 900])
def test_the_average_target_is_the_exact_prediction(prediction_type, law, kind, high):
    count, schedule = 100_000, SCHEDULES[kind]
    x_i, noise = law.sample(count, torch.Generator().manual_seed(0)), random(count, 2, seed=1)
    level_i, level_t = schedule(400), schedule(timesteps(count, 401, high, seed=2))
    x_t, target, weight = renoise(x_i, noise, level_i, level_t, prediction_type)
    exact = exact_prediction(law, x_t, level_i, level_t, prediction_type)
    root = expand(weight.sqrt(), target)  # even out the variance over t
    z = binned_z(x_t, root * (target - exact))
    assert z.abs().max() < 4 and 0.5 < z.square().mean() < 1.7
    # The test sees the difference that P-GRAFT's targets make: those of an ordinary loss on x_I / alpha_I fail it.
    naive = combine(prediction_type, x_i / level_i[0], noise, *level_t)
    assert binned_z(x_t, root * (naive - exact)).abs().max() > 20


@parametrize_types
@parametrize_schedules
def test_the_weight_bounds_the_variance_next_to_the_switch(schedule, prediction_type):
    x_i, noise = MIXTURE.sample(4000, torch.Generator().manual_seed(0)), random(4000, 2, seed=1)
    for t_i in (400, 900):
        raw, weighted = [], []
        for gap in (100, 1, 1e-2, 1e-4):
            _, target, weight = renoise(x_i, noise, schedule(t_i), schedule(t_i + 0.9 * gap), prediction_type)
            raw.append(target.square().mean().item())
            weighted.append((expand(weight, target) * target.square()).mean().item())
        assert raw[-1] > 1e3 * raw[0]
        assert max(weighted) < 4


@parametrize_types
def test_pure_noise_is_finite(prediction_type):
    """At alpha_T = 0 x_T is independent of x_I, so x_0* must average to E[x_I] / alpha_I."""
    schedule, count = SCHEDULES["vp_zero_snr"], 50_000
    x_i, noise = MIXTURE.sample(count, torch.Generator().manual_seed(0)), random(count, 2, seed=1)
    level_i = schedule(500)
    x_t, target, weight = renoise(x_i, noise, level_i, schedule(999), prediction_type)
    assert torch.equal(x_t, noise) and target.isfinite().all() and (weight > 0).all()
    if prediction_type == "epsilon":
        assert torch.equal(target, noise)
        return
    mean = x_i.mean(0) / level_i[0]
    expected = {"sample": mean, "v_prediction": -mean, "flow_prediction": noise - mean}[prediction_type]
    assert binned_z(x_t, target - expected).abs().max() < 4


def test_a_batch_of_timesteps_goes_with_the_batch_not_the_channels():
    schedule = SCHEDULES["vp"]
    x_i, noise = random(3, 3, 3, 3), random(3, 3, 3, 3, seed=1)
    t_i, t = torch.tensor([100, 200, 300]), torch.tensor([400, 600, 900])
    for prediction_type in PREDICTION_TYPES:
        batch = renoise(x_i, noise, schedule(t_i), schedule(t), prediction_type)
        for b in range(3):
            one = renoise(x_i[b : b + 1], noise[b : b + 1], schedule(t_i[b]), schedule(t[b]), prediction_type)
            for whole, single in zip(batch, one, strict=True):
                torch.testing.assert_close(whole[b : b + 1], single)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_states_keep_their_dtype_and_exact_coefficients(dtype):
    schedule = SCHEDULES["vp"]
    x_i, noise = random(4, 3, dtype=torch.float32).to(dtype), random(4, 3, seed=1, dtype=torch.float32).to(dtype)
    level_i, level_t = schedule(400), schedule(torch.tensor([400.01, 401, 500, 999]))
    low = renoise(x_i, noise, level_i, level_t, "v_prediction")
    exact = renoise(x_i.double(), noise.double(), level_i, level_t, "v_prediction")
    assert low.x_t.dtype == low.target.dtype == dtype and low.weight.dtype == torch.float32
    tolerance = 2 * torch.finfo(dtype).eps
    for ours, reference in zip(low, exact, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=tolerance, atol=tolerance * reference.abs().max())


def test_errors_are_in_words():
    x, schedule = random(3, 2), SCHEDULES["vp"]
    with pytest.raises(ValueError, match="shape of `x_i`"):
        renoise(x, x[:1], schedule(100), schedule(200), "epsilon")
    with pytest.raises(ValueError, match="noisier than t_I"):
        renoise(x, x, schedule(200), schedule(200), "epsilon")
    with pytest.raises(ValueError, match="one value per sample"):
        renoise(x, x, schedule(100), schedule(torch.tensor([200, 300])), "epsilon")
    with pytest.raises(ValueError, match="'score'"):
        renoise(x, x, schedule(100), schedule(200), "score")
