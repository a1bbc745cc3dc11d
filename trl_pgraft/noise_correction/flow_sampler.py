# SPDX-License-Identifier: Apache-2.0

"""The Euler sampler that a flow pipeline runs: its steps, and its velocity as a function of state and step."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline

from ..core.losses import guided as guide
from ..core.noise_schedules import NoiseSchedule
from ..pipelines.checks import check_steps
from ..pipelines.conditioning import Conditioning, record_conditioning
from ..pipelines.denoiser_call import denoiser_of, replay
from ..pipelines.denoiser_format import DenoiserFormat
from ..pipelines.inputs import checked_arguments
from ..pipelines.introspection import introspect
from ..pipelines.placement import device_of
from ..pipelines.schedulers import Sampler


ROUNDING = 1e-5  # of noise levels, which are sums of float32 step sizes
# `(x, i, rows)` to v(x, s_i), of the shape of x: states x of the samples `rows` at step i.
Velocity = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


class FlowSampler:
    """
    The Euler sampler that a pipeline call with certain arguments runs, as [`introspect`] finds it.

    Args:
        pipeline (`DiffusionPipeline`):
            The flow pipeline.
        kwargs (`dict`):
            Arguments of the pipeline call.
        guided (`bool`):
            Whether the velocity is the guided one; otherwise it is that of the conditional branch.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`] for a denoiser that the default does not read.

    Attributes:
        call ([`DenoiserCall`]):
            How the pipeline calls its denoiser.
        sampler ([`Sampler`]):
            A copy of its scheduler, with the timesteps of the call.
        steps (`list[float]`):
            Step sizes h_i, from noise to data.
        like (`torch.Tensor` of shape `(1, ...)`):
            Latents as the denoiser gets them, for shape, dtype and device.
        guidance_scale (`float` or `None`):
            w of the velocity's guidance `u + w (c - u)`; `None` where it is that of the conditional branch.

    Raises:
        `ValueError`: an argument cannot be given, see [`checked_arguments`]; the scheduler's step is not Euler's; or
            `guided` is set and the call has no guidance.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        kwargs: dict[str, Any],
        guided: bool,
        denoiser_format: type[DenoiserFormat] | None = None,
    ):
        kwargs = checked_arguments(pipeline, kwargs)
        introspection = introspect(pipeline, kwargs, denoiser_format)
        self.pipeline, self.kwargs = pipeline, kwargs
        self.call, self.sampler = introspection.call, introspection.sampler
        self.steps = euler_steps(self.sampler)
        check_steps(introspection, len(self.steps), pipeline)
        self.guidance_scale = self.call.guidance_scale if guided else None
        if guided and not (self.call.is_guided and self.guidance_scale is not None):
            raise ValueError(
                f"guided=True: {type(pipeline).__name__} with these pipeline_kwargs does not guide by u + w (c - u). "
                "Ask for guidance in pipeline_kwargs, or leave `guided` out."
            )
        self.like = torch.empty_like(
            self.call.format.latents(introspection.first_step[0])[:1], device=device_of(pipeline)
        )

    @property
    def levels(self) -> list[float]:
        """Noise level sigma at the end of each step, in [0, 1]."""
        return [float(self.sampler.scheduler.sigmas[-1]) - sum(self.steps[i:]) for i in range(1, len(self.steps) + 1)]

    def steps_down_to(self, sigma: float) -> int:
        """Number of steps that end at the noise level `sigma` or above."""
        return sum(level >= sigma - ROUNDING for level in self.levels)

    def check_shape(self, latents: torch.Tensor) -> None:
        """Refuse latents of another shape than the denoiser gets in this call."""
        if self.like.shape[1:] != latents.shape[1:]:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, but {type(self.pipeline).__name__} with these "
                f"pipeline_kwargs denoises (B, {', '.join(map(str, self.like.shape[1:]))}). Set height and width, and "
                "pass latents as it returns them with output_type='latent'."
            )

    def record(self, prompts: Sequence[str]) -> Conditioning:
        """Record the denoiser's conditioning of `P` prompts in this call; one row for each."""
        return record_conditioning(self.pipeline, self.call, prompts, self.kwargs)

    def velocity(self, conditioning: Conditioning) -> Velocity:
        """The sampler's velocity, for [`invert`], of samples that have the rows of `conditioning`."""
        denoiser, device = denoiser_of(self.pipeline), self.like.device
        on_device = Conditioning(
            send_to_device(conditioning.conditional, device),
            send_to_device(conditioning.unconditional, device),
            conditioning.batch_axes,
        )

        def velocity(x: torch.Tensor, step: int, rows: torch.Tensor) -> torch.Tensor:
            timesteps = torch.full((len(x),), self.sampler.timesteps[step], dtype=torch.float64)
            arguments = (denoiser, self.call, x.to(self.like.dtype), timesteps)
            found = replay(*arguments, on_device.rows(rows.tolist(), x.device))
            if self.guidance_scale is not None:
                unconditional = on_device.rows(rows.tolist(), x.device, unconditional=True)
                found = guide(replay(*arguments, unconditional), found, self.guidance_scale)
            return found.to(x.dtype)

        return velocity


def euler_steps(sampler: Sampler) -> list[float]:
    """
    Measure the step sizes h_i of a scheduler whose step is `x + h_i v`, on a copy of it.

    Args:
        sampler ([`Sampler`]):
            The scheduler with its timesteps set.

    Returns:
        `list[float]`: one step size for each of its timesteps.

    Raises:
        `ValueError`: it is not a flow scheduler, or its step is another: of higher order, with memory, or with noise.
    """
    scheduler, count = copy.deepcopy(sampler.scheduler), len(sampler.timesteps)
    timesteps, generator = scheduler.timesteps[-count:], torch.Generator().manual_seed(0)
    x, v = torch.randn(2, count, 4, generator=generator)
    x[:, 0], v[:, 0] = 0, 1  # measures the step size; the other elements test that there is nothing else
    found = torch.stack(
        [
            scheduler.step(output[None], t, state[None], return_dict=False)[0][0].cpu().double()
            for t, state, output in zip(timesteps, x.to(timesteps.device), v.to(timesteps.device), strict=True)
        ]
    )
    steps, is_flow = found[:, :1], NoiseSchedule.from_scheduler(scheduler).is_flow
    if not is_flow or not torch.allclose(found, x.double() + steps * v.double(), rtol=1e-5, atol=1e-5):
        raise ValueError(
            f"invert_flow: {sampler.description} does not step as x + h v, so it is no Euler sampler of a flow. Use "
            "FlowMatchEulerDiscreteScheduler without `stochastic_sampling`."
        )
    return steps.flatten().tolist()
