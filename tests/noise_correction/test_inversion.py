# SPDX-License-Identifier: Apache-2.0

"""Exact inversion of Euler samplers: closed forms, round trips of tiny pipelines, guidance, and failures."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny_flow import tiny_flow
from tiny_pipelines import tiny_flux, tiny_sd
from tiny_transformers import tiny_sana, tiny_sd3

from trl_pgraft import invert_flow
from trl_pgraft.noise_correction.flow_sampler import FlowSampler, euler_steps
from trl_pgraft.noise_correction.inversion import InversionError
from trl_pgraft.pipelines.introspection import introspect


# diffusers' flow scheduler steps in float32, so a pipeline's round trip cannot be closer than its rounding.
ROUND_TRIP = 2e-5


def sample(pipeline, noise, prompts, **kwargs):
    inputs = {"prompt": prompts} if prompts else {}
    return pipeline(latents=noise, output_type="latent", **inputs, **kwargs).images


SIZE = {"height": 16, "width": 16}
CASES = {
    "sd3": (tiny_sd3, (3, 4, 8, 8), ["a cat", "two", ""], {**SIZE, "guidance_scale": 1.0}),
    "flux": (tiny_flux, (3, 16, 16), ["a cat", "two", ""], SIZE),
    "unconditional": (tiny_flow, (3, 1, 8, 8), None, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_of_a_pipeline(name):
    make, shape, prompts, kwargs = CASES[name]
    pipeline, kwargs = make(), {**kwargs, "num_inference_steps": 6}
    data = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = invert_flow(pipeline, data, prompts=prompts, pipeline_kwargs=kwargs, tolerance=1e-5)
    again = sample(pipeline, found.noise, prompts, **kwargs)
    assert (found.noise - data).abs().max() > 0.1
    assert (again - data).abs().max() < ROUND_TRIP
    assert found.residuals.shape == found.iterations.shape == (6, 3)
    assert found.residuals.sum(0).max() <= 1e-5


def test_guidance_is_off_by_default():
    pipeline, prompts = tiny_sd3(), ["a cat", "two"]
    kwargs = {**SIZE, "num_inference_steps": 4, "guidance_scale": 3.0}
    data = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = invert_flow(pipeline, data, prompts=prompts, pipeline_kwargs=kwargs).noise
    guided = invert_flow(pipeline, data, prompts=prompts, pipeline_kwargs=kwargs, guided=True).noise
    assert (sample(pipeline, guided, prompts, **kwargs) - data).abs().max() < 1e-4
    assert (sample(pipeline, plain, prompts, **{**kwargs, "guidance_scale": 1.0}) - data).abs().max() < 1e-4
    assert (sample(pipeline, plain, prompts, **kwargs) - data).abs().max() > 1e-3


def test_guidance_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="guided=True: FluxPipeline"):
        invert_flow(tiny_flux(), torch.randn(1, 16, 16), pipeline_kwargs=SIZE, guided=True)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"latents": torch.zeros(1, 16, 16)}, "`latents` cannot be given here"),
        ({"num_images_per_prompt": 2}, "`num_images_per_prompt` cannot be given here"),
        ({"heigth": 16}, "FluxPipeline takes no argument 'heigth'; did you mean 'height'"),
        ([16, 16], "pipeline_kwargs is a list; give a dict"),
    ],
)
def test_arguments_of_the_call_are_those_that_can_be_given(given, message):
    with pytest.raises(ValueError, match=message):
        invert_flow(tiny_flux(), torch.randn(1, 16, 16), pipeline_kwargs=given)


def test_linear_flow_has_a_closed_form():
    """With v = a (x - m) each step multiplies x - m by 1 + h a, here by as little as 0.1 and with a slope of 3.6."""
    sigmas, a, m = [1.0, 0.7, 0.4, 0.0], torch.tensor([2.25, -1.0, 0.5], dtype=torch.float64), 0.3
    data = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = invert_flow(lambda x, s: a * (x - m), data, sigmas=sigmas, tolerance=3e-12, max_iterations=1000)
    factor = (1 - 0.3 * a) ** 2 * (1 - 0.4 * a)
    torch.testing.assert_close(found.noise, m + (data - m) / factor, rtol=0, atol=1e-9)


def test_acceleration_inverts_where_the_plain_iteration_diverges():
    """x - h 4 x with h = -1: the plain fixed point multiplies errors by -4."""
    found = invert_flow(lambda x, s: -4 * x, torch.ones(2, 3, dtype=torch.float64), sigmas=[1, 0], tolerance=1e-10)
    torch.testing.assert_close(found.noise, torch.full((2, 3), 0.2, dtype=torch.float64), rtol=0, atol=1e-10)
    assert found.iterations.max() < 20


def test_a_step_without_inverse_raises_with_its_index():
    """At the middle step x + h v = 0 whatever x is, so nothing leads to data of 1."""

    def velocity(x, sigma):
        return x / 0.25 if float(sigma[0]) == 0.5 else torch.zeros_like(x)

    with pytest.raises(InversionError, match="2 of 2 samples did not converge at step 1") as error:
        invert_flow(velocity, torch.ones(2, 3), sigmas=[1, 0.5, 0.25, 0])
    assert error.value.step == 1
    assert error.value.residual == pytest.approx(1)


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_the_tolerance_is_that_of_the_whole_inversion(steps):
    """v grows with x, so each step shrinks what the ones before it are off by, and the sum bounds the round trip."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64).square()
    data = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = invert_flow(lambda x, s: (x + x.tanh()) / 2, data, sigmas=sigmas.tolist(), tolerance=1e-3)
    again = found.noise
    for step in sigmas.diff():
        again = again + step * (again + again.tanh()) / 2
    assert 1e-6 < (again - data).abs().max() < 1e-3
    assert found.residuals.max() <= 1e-3 / steps


def test_velocities_that_are_not_finite_raise():
    with pytest.raises(InversionError, match="step 0"):
        invert_flow(lambda x, s: x * float("nan"), torch.ones(1, 2), sigmas=[1, 0])


def test_steps_are_those_of_the_pipelines_sigmas():
    sampler = introspect(tiny_flux(shift=3.0), {**SIZE, "num_inference_steps": 5}).sampler
    expected = sampler.scheduler.sigmas.diff()
    torch.testing.assert_close(torch.tensor(euler_steps(sampler)), expected, rtol=0, atol=1e-7)


FIRST_ORDER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 1}


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_levels_are_those_of_the_schedulers_sigmas_also_where_it_ends_above_zero(end):
    """The first-order DPM-Solver++ of a flow steps as Euler's method does."""
    pipeline = tiny_sana()
    pipeline.scheduler = DPMSolverMultistepScheduler(**FIRST_ORDER, final_sigmas_type=end)
    sampler = FlowSampler(pipeline, {**SANA, "num_inference_steps": 4}, guided=False)
    expected = sampler.sampler.scheduler.sigmas
    assert (expected[-1] > 0) == (end == "sigma_min")
    torch.testing.assert_close(torch.tensor(sampler.levels), expected[1:], rtol=0, atol=1e-6)
    assert [sampler.steps_down_to(sigma.item()) for sigma in expected[1:]] == [1, 2, 3, 4]
    assert [sampler.steps_down_to(sigma.item() + 1e-3) for sigma in expected] == [0, 0, 1, 2, 3]


SANA = {"height": 32, "width": 32, "use_resolution_binning": False}


@pytest.mark.parametrize("make, further", [(tiny_sd, {}), (tiny_sana, SANA)])
def test_other_samplers_are_refused(make, further):
    with pytest.raises(ValueError, match="no Euler sampler of a flow"):
        euler_steps(introspect(make(), {**SIZE, "num_inference_steps": 4, **further}).sampler)


def test_arguments_are_checked_first():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="sigmas: needed for a callable"):
        invert_flow(lambda x, s: x, x)
    with pytest.raises(ValueError, match="prompts: one for each of the 2"):
        invert_flow(tiny_flow(), x, prompts=["a"])
    with pytest.raises(ValueError, match="not finite"):
        invert_flow(lambda x, s: x, x * float("nan"), sigmas=[1, 0])
    with pytest.raises(ValueError, match=r"denoises \(B, 1, 8, 8\)"):
        invert_flow(tiny_flow(), x)
