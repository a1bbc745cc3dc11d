# SPDX-License-Identifier: Apache-2.0

"""The corrector: exact laws where they are known, identity where nothing was learned."""

import math

import pytest
import torch
from tiny_flow import tiny_flow
from tiny_transformers import tiny_sd3

from trl_pgraft.adapters.lora import active_adapters, default_lora_config
from trl_pgraft.noise_correction.correctors import LoraCorrector, NetworkCorrector
from trl_pgraft.noise_correction.correctors.lora import CORRECTION_ADAPTER
from trl_pgraft.noise_correction.correctors.network import make_network
from trl_pgraft.noise_correction.correctors.transport import perturb, transport
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.denoiser_call import replay
from trl_pgraft.pipelines.introspection import introspect


class ExactCorrector:
    """What a perfect corrector predicts for inverted noise of law N(mean, std^2)."""

    def __init__(self, mean, std):
        self.mean, self.std, self.parameters, self.module = mean, std, [], None

    def active(self):
        return torch.no_grad()

    def __call__(self, x, signal, call, conditioning, model=None):
        c = float(signal[0])
        s = math.sqrt(1 - c**2)
        variance = c**2 * self.std**2 + s**2
        return s * self.mean + s * c * (self.std**2 - 1) / variance * (x - c * self.mean)


def moments_after(steps, mean, std):
    x = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean()) / x.std()
    y = transport(ExactCorrector(mean, std), x, None, {}, steps)
    return y.mean().item(), y.std().item()


def euler_on_the_straight_path(steps, mean, std):
    """Mean and standard deviation after Euler steps of the flow `(1 - s) y + s eps` between independent y and eps."""
    found_mean, found_std = 0.0, 1.0
    for step in range(steps):
        s = 1 - step / steps
        variance = (1 - s) ** 2 * std**2 + s**2
        slope = (s - (1 - s) * std**2) / variance  # E[eps - y | x] = slope (x - E x) - mean
        found_mean += (-slope * (found_mean - (1 - s) * mean) + mean) / steps
        found_std *= 1 - slope / steps
    return found_mean, abs(found_std)


@pytest.mark.parametrize(("steps", "error"), [(1, 0.02), (4, 0.006), (16, 0.002)])
def test_one_step_is_right_to_first_order(steps, error):
    mean, std = moments_after(steps, 0.1, 0.9)
    assert (mean, std) == (pytest.approx(0.1, abs=error), pytest.approx(0.9, abs=error))


def test_the_straight_path_needs_many_steps_for_as_little():
    """Why the path is the variance-preserving one: here 32 steps are not as near as one step there."""
    assert euler_on_the_straight_path(1, 0.1, 0.9) == (pytest.approx(0.1), pytest.approx(0.0))
    ours = abs(moments_after(1, 0.1, 0.9)[1] - 0.9)
    assert abs(euler_on_the_straight_path(32, 0.1, 0.9)[1] - 0.9) > ours
    assert euler_on_the_straight_path(2000, 0.1, 0.9) == (pytest.approx(0.1, abs=1e-3), pytest.approx(0.9, abs=1e-3))


def test_the_target_is_what_the_corrector_predicts():
    """The conditional mean of u is the regression of u on x_c, which for Gaussian data is linear."""
    generator = torch.Generator().manual_seed(1)
    y = 0.3 + 0.7 * torch.randn(400_000, 1, generator=generator)
    noise, signal = torch.randn(y.shape, generator=generator), torch.full((len(y),), 0.6, dtype=torch.float64)
    x, u = perturb(y, noise, signal)
    slope = ((x - x.mean()) * u).mean() / x.var()
    probe = torch.tensor([[-1.0], [2.0]])
    regressed = u.mean() + slope * (probe - x.mean())
    exact = ExactCorrector(0.3, 0.7)(probe, signal[:2], None, {})
    torch.testing.assert_close(regressed, exact, rtol=0, atol=0.01)


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 14, 14), (3, 9, 5), (2, 6, 12)])
def test_a_new_network_corrects_nothing(shape):
    network = make_network(shape, 12)
    noise = torch.randn(3, *shape)
    assert torch.equal(NetworkCorrector(network).correct(noise, None, {}, 2), noise)
    torch.nn.init.ones_(network.conv_out.bias)
    assert not torch.equal(NetworkCorrector(network).correct(noise, None, {}, 2), noise)


def test_latents_without_height_and_width_need_a_network_of_the_users():
    with pytest.raises(ValueError, match="shape \\(16, 16\\) are no images .* Pass a `network`"):
        make_network((16, 16), 8)


@pytest.mark.parametrize(("make", "shape"), [(tiny_flow, (1, 8, 8)), (tiny_sd3, (4, 8, 8))])
def test_a_new_lora_corrects_nothing_and_a_trained_one_is_seen_by_no_one_else(make, shape):
    pipeline = make()
    kwargs = {} if make is tiny_flow else {"height": 16, "width": 16, "guidance_scale": 1.0}
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    call = introspect(pipeline, kwargs).call
    conditioning = record_conditioning(pipeline, call, ["a cat", "two"], kwargs).rows([0, 1], "cpu")
    noise = torch.randn(2, *shape)
    before = replay(denoiser, call, noise, torch.tensor([500, 200]), conditioning)
    corrector = LoraCorrector.new(denoiser, default_lora_config(denoiser, 4), seed=0)
    assert torch.equal(corrector.correct(noise, call, conditioning, 2), noise)
    for parameter in corrector.parameters:
        parameter.data.add_(0.1)
    assert not torch.equal(corrector.correct(noise, call, conditioning, 2), noise)
    assert CORRECTION_ADAPTER not in active_adapters(denoiser)
    after = replay(denoiser, call, noise, torch.tensor([500, 200]), conditioning)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-5)  # layers that PEFT wraps round otherwise


def test_no_steps_leave_the_noise_alone():
    noise = torch.randn(2, 3)
    assert torch.equal(transport(ExactCorrector(1.0, 2.0), noise, None, {}, 0), noise)
