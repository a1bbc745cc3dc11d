# SPDX-License-Identifier: Apache-2.0

import dataclasses
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from trl_pgraft.core.noise_schedules import CLEAN, NoiseSchedule, expand, transition


SCHEDULERS = {
    "vp_linear": lambda: DDIMScheduler(),
    "vp_scaled_linear": lambda: DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "vp_zero_snr": lambda: DDIMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
    "vp_cosine": lambda: DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
}


def last_timestep(schedule: NoiseSchedule) -> int:
    return schedule.num_train_timesteps - (not schedule.is_flow)


@pytest.fixture(params=SCHEDULERS)
def schedule(request):
    return NoiseSchedule.from_scheduler(SCHEDULERS[request.param]())


def test_vp_levels_are_those_of_add_noise():
    scheduler = DDIMScheduler()
    t = torch.arange(1000)
    x_0, noise = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0)).unbind()
    alpha, sigma = NoiseSchedule.from_scheduler(scheduler)(t)
    ours = expand(alpha, x_0) * x_0 + expand(sigma, noise) * noise
    torch.testing.assert_close(ours, scheduler.add_noise(x_0, noise, t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift": 0.5, "num_train_timesteps": 500}])
def test_flow_levels_are_those_of_scale_noise(options):
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(13)
    t = scheduler.timesteps
    x_0, noise = torch.randn(2, 13, 3, generator=torch.Generator().manual_seed(0)).unbind()
    alpha, sigma = NoiseSchedule.from_scheduler(scheduler)(t)
    torch.testing.assert_close(sigma.float(), scheduler.sigmas[:-1])
    ours = expand(alpha, x_0) * x_0 + expand(sigma, noise) * noise
    torch.testing.assert_close(ours, scheduler.scale_noise(x_0, t, noise), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("steps", [7, 25, 50])
def test_between_integers_the_angle_agrees_with_euler_discrete(steps):
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    assert (scheduler.timesteps != scheduler.timesteps.round()).any()
    alpha, sigma = NoiseSchedule.from_scheduler(scheduler)(scheduler.timesteps)
    # The scheduler interpolates sigma / alpha instead, linearly.
    angle = scheduler.sigmas[:-1].double().atan()
    assert (torch.atan2(sigma, alpha) - angle).abs().max() < 1e-4


def test_forward_kernel_identities(schedule):
    t = torch.linspace(0, last_timestep(schedule), 777, dtype=torch.float64)
    alpha, sigma = schedule(t)
    assert alpha.dtype == sigma.dtype == torch.float64 and alpha.shape == t.shape
    total = alpha + sigma if schedule.is_flow else alpha.square() + sigma.square()
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-12, rtol=0)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    assert (schedule.log_snr(t).diff() < 0).all()
    torch.testing.assert_close(schedule.log_snr(t[1:-1]), (alpha / sigma).square().log()[1:-1])


def test_shapes_and_python_numbers(schedule):
    assert schedule(10)[0].shape == schedule(10.5)[1].shape == ()
    assert schedule(torch.tensor([[1, 2], [3, 4]]))[0].shape == (2, 2)
    assert torch.equal(schedule(torch.tensor([10]))[0][0], schedule(10.0)[0])


def test_pure_noise_is_exactly_pure():
    zero_snr = NoiseSchedule.from_scheduler(SCHEDULERS["vp_zero_snr"]())
    assert [v.item() for v in zero_snr(999)] == [0.0, 1.0]
    assert zero_snr.log_snr(999).item() == -math.inf
    assert all(v.isfinite() for v in zero_snr(998.5))
    flow = NoiseSchedule.from_scheduler(SCHEDULERS["flow"]())
    assert [v.item() for v in flow(1000)] == [0.0, 1.0]
    assert [v.item() for v in flow(0)] == list(CLEAN)
    assert flow.log_snr(0).item() == math.inf


@pytest.mark.parametrize("t", [-1, -1e-3, 999.5, 1000, math.nan])
def test_vp_timesteps_outside_the_clock_are_refused(t):
    with pytest.raises(ValueError, match=r"\[0, 999\]"):
        NoiseSchedule.from_scheduler(DDIMScheduler())(torch.tensor([5.0, t]))


def test_flow_clock_includes_its_end():
    with pytest.raises(ValueError, match=r"\[0, 1000\]"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())(1000.5)


@pytest.mark.parametrize(
    ("scheduler", "is_flow"),
    [
        (EulerDiscreteScheduler(), False),
        (DPMSolverMultistepScheduler(), False),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), True),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), True),
        (FlowMatchHeunDiscreteScheduler(), True),
    ],
)
def test_kind_of_scheduler(scheduler, is_flow):
    schedule = NoiseSchedule.from_scheduler(scheduler)
    assert schedule.is_flow == is_flow and schedule.num_train_timesteps == 1000


def test_unknown_schedulers_are_named():
    with pytest.raises(ValueError, match="EDMEulerScheduler.*alphas_cumprod"):
        NoiseSchedule.from_scheduler(EDMEulerScheduler())
    with pytest.raises(ValueError, match="invert_sigmas"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


def test_schedule_is_frozen(schedule):
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.num_train_timesteps = 1


def test_transition_is_a_semigroup(schedule):
    generator = torch.Generator().manual_seed(0)
    i, m, t = torch.rand(3, 500, generator=generator, dtype=torch.float64).sort(dim=0).values
    last = last_timestep(schedule)
    level_i, level_m, level_t = (schedule(v * last) for v in (i, m, t))
    scale_mi, sigma_mi = transition(*level_i, *level_m)
    scale_tm, sigma_tm = transition(*level_m, *level_t)
    scale_ti, sigma_ti = transition(*level_i, *level_t)
    torch.testing.assert_close(scale_mi * scale_tm, scale_ti)
    torch.testing.assert_close((scale_tm * sigma_mi).square() + sigma_tm.square(), sigma_ti.square())


def test_transition_of_the_marginal_is_the_marginal(schedule):
    """x_I of variance alpha_I^2 v + sigma_I^2 becomes x_t of variance alpha_t^2 v + sigma_t^2, for any v."""
    (alpha_i, sigma_i), (alpha_t, sigma_t) = schedule(300), schedule(torch.tensor([301, 500, last_timestep(schedule)]))
    scale, sigma_ti = transition(alpha_i, sigma_i, alpha_t, sigma_t)
    for variance in (0.0, 1.0, 7.0):
        marginal = scale.square() * (alpha_i.square() * variance + sigma_i.square()) + sigma_ti.square()
        torch.testing.assert_close(marginal, alpha_t.square() * variance + sigma_t.square())


def test_transition_from_clean_data_is_the_forward_kernel(schedule):
    alpha, sigma = schedule(torch.tensor([1, 400, 900]))
    torch.testing.assert_close(transition(*CLEAN, alpha, sigma), (alpha, sigma), rtol=1e-15, atol=0)


def test_transition_refuses_what_is_not_noisier(schedule):
    for t in ([500], [499], [600, 500]):
        with pytest.raises(ValueError, match="noisier than t_I"):
            transition(*schedule(500), *schedule(torch.tensor(t)))
    with pytest.raises(ValueError, match="pure noise"):
        transition(0.0, 1.0, *schedule(500))


def test_expand():
    like = torch.zeros(3, 3, 4, 4, dtype=torch.float16)
    values = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    wide = expand(values, like)
    assert wide.shape == (3, 1, 1, 1) and wide.dtype == torch.float32
    assert torch.equal((wide * torch.ones(3, 3, 4, 4))[:, 0, 0, 0], values.float())
    assert expand(0.1, like.double()).item() == 0.1
    with pytest.raises(ValueError, match="one value per sample"):
        expand(values, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one value per sample"):
        expand(values[:, None], like)
