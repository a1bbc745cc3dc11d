# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from diffusers import DDIMScheduler

from trl_pgraft import GraftConfig
from trl_pgraft.core.noise_schedules import CLEAN, NoiseSchedule
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.pipelines.timesteps import TunedLevels, tuned_levels


FLOW = NoiseSchedule(1000)
VP = NoiseSchedule.from_scheduler(DDIMScheduler())


def levels(schedule, switch, grid=None):
    return TunedLevels(schedule, CLEAN, switch, step_index=5, grid=grid)


def generator():
    return torch.Generator().manual_seed(0)


def levels_of(pipeline, fraction, steps=10, **options):
    arguments = {"num_inference_steps": steps, "guidance_scale": 3.0}
    config = GraftConfig(tuned_fraction=fraction, sample_num_steps=steps, **options)
    introspection = introspect(pipeline, arguments)
    return tuned_levels(config, introspection.sampler, introspection.call.clock)


@pytest.mark.parametrize("switch", [None, 0.0, 400.0, 400.5, 998.2])
def test_flow_timesteps_are_above_the_switch_and_cover_the_range(switch):
    tuned = levels(FLOW, switch)
    sampled = tuned.sample(4000, generator())
    low = switch or 0.0
    assert sampled.dtype == torch.float64 and sampled.shape == (4000,)
    assert ((sampled > low) & (sampled <= 1000)).all()
    assert sampled.min() < low + 0.002 * (1000 - low) and sampled.max() > 1000 - 0.002 * (1000 - low)


@pytest.mark.parametrize("switch", [None, 400.0, 400.5, 997.5])
def test_vp_timesteps_are_integers_above_the_switch_and_all_of_them(switch):
    sampled = levels(VP, switch).sample(100_000, generator())
    lowest = 0 if switch is None else math.floor(switch) + 1
    assert sorted(set(sampled.tolist())) == [float(t) for t in range(lowest, 1000)]
    low = -1 if switch is None else switch
    for timestep, share in ((lowest, lowest - low), (lowest + 1, 1), (999, 1)):
        frequency = (sampled == timestep).double().mean().item()
        assert frequency * (999 - low) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("schedule", [FLOW, VP])
def test_the_lower_end_is_never_drawn(schedule, monkeypatch):
    """Not even where the random number is the largest that there is."""
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2**-24))
    assert (levels(schedule, 400.0).sample(64, generator()) > 400).all()
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.zeros(n))
    assert levels(schedule, 400.0).sample(64, generator()).max() == (1000 if schedule.is_flow else 999)


def test_draws_are_stratified_in_random_order():
    sampled = levels(FLOW, 500.0).sample(50, generator())
    strata = ((1000 - sampled) / 10).long()
    assert sorted(strata.tolist()) == list(range(50)), "one in each fiftieth of the range"
    assert strata.tolist() != sorted(strata.tolist())
    assert torch.equal(sampled, levels(FLOW, 500.0).sample(50, generator()))


def test_on_the_samplers_grid_each_tuned_step_is_drawn_equally_often():
    grid = [901.0, 701.0, 501.0]
    sampled = levels(VP, 400.0, grid).sample(9, generator())
    assert sorted(sampled.tolist()) == sorted(3 * grid)


def test_bins_split_the_tuned_range():
    tuned = levels(FLOW, 600.0)
    assert tuned.bin_of(torch.tensor([600.5, 699.0, 701.0, 850.0, 1000.0]), 4).tolist() == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("fixture", ["sd", "flux"])
@pytest.mark.parametrize("fraction, step_index", [(0.5, 5), (0.3, 3), (0.01, 1), (0.96, 10), (1.0, 10)])
def test_the_switch_lies_between_the_last_tuned_and_the_first_reference_step(fixture, fraction, step_index, request):
    pipeline = request.getfixturevalue(fixture)
    tuned, switch = levels_of(pipeline, fraction)
    steps = pipeline.scheduler.timesteps.tolist()
    assert tuned.step_index == step_index and len(steps) == 10
    if step_index == 10:
        assert tuned.switch_timestep is switch.switch_timestep is switch.state_timestep is None
        assert tuned.level_i == CLEAN
    else:
        assert switch.switch_timestep == tuned.switch_timestep == (steps[step_index - 1] + steps[step_index]) / 2
        assert switch.state_timestep == steps[step_index]
        alpha, sigma = tuned.level_i
        t = steps[step_index]
        expected = (1 - t / 1000) if fixture == "flux" else pipeline.scheduler.alphas_cumprod[int(t)].item() ** 0.5
        assert alpha == pytest.approx(expected, abs=1e-6)
        assert switch.switch_log_snr < 2 * math.log(alpha / sigma), "the switch is noisier than x_I"
    assert switch.clock == ((0.001, 0.0) if fixture == "flux" else (1.0, 0.0))


def test_the_lowest_training_timestep_is_noisier_than_the_state(sd):
    tuned, switch = levels_of(sd, 0.5)
    alpha, sigma = tuned.schedule(tuned.sample(2000, generator()))
    log_snr = 2 * (alpha / sigma).log()
    assert (log_snr < 2 * math.log(tuned.level_i[0] / tuned.level_i[1])).all()


def test_sampler_timesteps_are_the_tuned_steps(sd):
    tuned, _ = levels_of(sd, 0.4, timestep_sampling="sampler")
    assert tuned.grid == sd.scheduler.timesteps[:4].tolist()
