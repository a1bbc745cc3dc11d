# SPDX-License-Identifier: Apache-2.0

"""Record how a pipeline calls its denoiser, and replay that call with other latents and timesteps.

No denoising loop is copied. A forward pre-hook on the denoiser sees the keyword arguments of the pipeline's own call,
so the latents are as the denoiser gets them (every scheduler's private scaling is already undone), and the
conditioning is what the pipeline made of its prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .controls import Control
from .denoiser_format import DenoiserFormat
from .tree import take_rows


@dataclass(frozen=True)
class DenoiserCall:
    """
    How one pipeline calls its denoiser, as [`introspect`] found it.

    Args:
        format ([`DenoiserFormat`]):
            Where latents, timestep and prediction are.
        timestep_dtype (`torch.dtype`):
            Precision the pipeline's own timesteps come in.
        clock (`tuple[float, float]`):
            `(scale, offset)`: the denoiser is given `scale * t + offset` at the scheduler's training timestep `t`.
        sign (`int`):
            +1 or -1: the scheduler is given `sign * output`.
        calls_per_step (`int`):
            Denoiser calls of one guided step: 1, or 2 where the branches are called one after the other.
        branches (`int`):
            Parts of a guided step: 1 without classifier-free guidance, 2 with it.
        conditional_branch (`int`):
            Which part belongs to the prompt.
        batch_axes (`dict`):
            Per conditioning argument, the axis that grows with the number of prompts, or `None`; nested like the
            arguments themselves.
        guidance_scale (`float` or `None`, *optional*, defaults to `1.0`):
            w of the pipeline's guidance `u + w (c - u)` as measured, which need not be its argument; `None` where it
            combines the branches otherwise.
        controls (`tuple[Control, ...]`, *optional*):
            Modules, such as a ControlNet, whose outputs for latents and timestep are arguments of the denoiser.
    """

    format: DenoiserFormat
    timestep_dtype: torch.dtype
    clock: tuple[float, float]
    sign: int
    calls_per_step: int
    branches: int
    conditional_branch: int
    batch_axes: dict[str, Any]
    guidance_scale: float | None = 1.0
    controls: tuple[Control, ...] = ()

    @property
    def is_guided(self) -> bool:
        """Whether the pipeline combines a conditional and an unconditional prediction."""
        return self.branches == 2

    @property
    def control_modules(self) -> list[torch.nn.Module]:
        """Modules that a replay calls before the denoiser."""
        return [control.module for control in self.controls]

    def training_timestep(self, denoiser_timestep: float) -> float:
        """Scheduler's training timestep of a timestep that the denoiser was given."""
        scale, offset = self.clock
        return (denoiser_timestep - offset) / scale


def denoiser_name_of(pipeline: DiffusionPipeline) -> str:
    """Attribute under which `pipeline` keeps its denoiser: `"transformer"` or `"unet"`."""
    for name in ("transformer", "unet"):
        if isinstance(getattr(pipeline, name, None), torch.nn.Module):
            return name
    raise ValueError(
        f"sd_pipeline: {type(pipeline).__name__} has neither a `transformer` nor a `unet` module. Pass a diffusers "
        "pipeline whose denoiser is kept under one of these names."
    )


def denoiser_of(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """What `pipeline` calls to predict noise, data or velocity: a module, or what `torch.compile` made of it."""
    return getattr(pipeline, denoiser_name_of(pipeline))


def replay(
    denoiser: Callable[..., Any],
    call: DenoiserCall,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: dict[str, Any],
) -> torch.Tensor:
    """
    Call the denoiser as the pipeline does, with other latents and timesteps.

    Args:
        denoiser (`torch.nn.Module`):
            The module, or what accelerate made of it.
        x_t (`torch.Tensor` of shape `(B, ...)`):
            Noisy latents in the denoiser's own layout.
        timesteps (`torch.Tensor` of shape `(B,)`):
            Training timesteps of the scheduler.
        conditioning (`dict`):
            From [`Conditioning.rows`], `B` rows.

    Returns:
        `torch.Tensor` of the shape of `x_t`: the prediction in the scheduler's parameterization and sign.
    """
    scale, offset = call.clock
    clock = scale * timesteps.double() + offset
    # A clock that the pipeline keeps in integers is still real-valued between its own steps.
    dtype = call.timestep_dtype if call.timestep_dtype.is_floating_point else torch.float32
    clock = clock.to(x_t.device, dtype)
    for control in call.controls:
        conditioning = control.fill(x_t, clock, timesteps, conditioning)
    arguments = call.format.arguments(x_t, clock, conditioning)
    return call.sign * prediction_of(call.format, denoiser(**arguments), x_t)


def branches_of(
    calls: list[dict[str, Any]], format: DenoiserFormat, batch_axes: dict[str, Any], prompts: int
) -> list[dict[str, Any]]:
    """Conditioning of each branch of one step, with `prompts` rows each, whether called together or in turn."""
    parts = []
    for arguments in calls:
        conditioning = format.conditioning(arguments)
        for start in range(0, len(format.latents(arguments)), prompts):
            parts.append(take_rows(conditioning, batch_axes, range(start, start + prompts)))
    return parts


def prediction_of(format: DenoiserFormat, output: Any, x_t: torch.Tensor) -> torch.Tensor:
    """The denoiser's prediction; of a learned variance only the prediction's channels."""
    prediction = format.prediction(output)
    return prediction[:, : x_t.shape[1]] if prediction.shape[1] > x_t.shape[1] else prediction
