# SPDX-License-Identifier: Apache-2.0

"""The noise levels that a configuration tunes: where x_I is recorded, where the adapter switches, what is trained."""

from dataclasses import dataclass

import torch

from ..config import GraftConfig
from ..core.noise_schedules import CLEAN, Level, NoiseSchedule
from ..core.switch_level import SwitchLevel
from .schedulers import Sampler


@dataclass(frozen=True)
class TunedLevels:
    """
    Noise levels that are fine-tuned, and how training timesteps are sampled from them.

    Args:
        schedule ([`NoiseSchedule`]):
            alpha and sigma of a training timestep.
        level_i (`tuple[float, float]`):
            Level of the states x_I.
        switch_timestep (`float` or `None`):
            Timesteps above it are tuned; `None`: all.
        step_index (`int`):
            Denoiser calls of a trajectory that come before x_I: the number of tuned steps where a step is one call.
        grid (`list[float]` or `None`):
            Timesteps to sample from; `None`: all of the tuned range.
        first (`float` or `None`):
            Noisiest tuned timestep, where the sampler starts from an image; `None`: pure noise.
    """

    schedule: NoiseSchedule
    level_i: Level
    switch_timestep: float | None
    step_index: int
    grid: list[float] | None = None
    first: float | None = None

    @property
    def lowest(self) -> float:
        """Lower end of the tuned range, itself not tuned; below 0 where a discrete schedule is tuned throughout."""
        if self.switch_timestep is not None:
            return self.switch_timestep
        return 0.0 if self.schedule.is_flow else -1.0

    @property
    def highest(self) -> float:
        """Upper end of the tuned range."""
        if self.first is not None:
            return self.first
        return self.schedule.num_train_timesteps - (0 if self.schedule.is_flow else 1)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` training timesteps, stratified over the tuned levels in random order; shape `(count,)`, float64."""
        # In float64, where index + u stays below index + 1: the lower end is never sampled.
        index = torch.randperm(count, generator=generator).double()
        strata = (index + torch.rand(count, generator=generator)) / count
        if self.grid is not None:
            index = (strata * len(self.grid)).long().clamp(max=len(self.grid) - 1)
            return torch.tensor(self.grid, dtype=torch.float64)[index]
        timesteps = self.lowest + (1 - strata) * (self.highest - self.lowest)
        return timesteps if self.schedule.is_flow else timesteps.ceil()

    def bin_of(self, timesteps: torch.Tensor, bins: int) -> torch.Tensor:
        """Which of `bins` equal parts of the tuned range each timestep lies in; 0 is the cleanest."""
        share = (timesteps - self.lowest) / (self.highest - self.lowest)
        return (share * bins).long().clamp(0, bins - 1)


def tuned_levels(
    config: GraftConfig, sampler: Sampler, clock: tuple[float, float] = (1.0, 0.0)
) -> tuple[TunedLevels, SwitchLevel]:
    """
    Tuned noise levels of a sampler, and the switch that is stored with the adapter.

    `tuned_fraction` is a share of the sampler's steps; a step may make several denoiser calls. The switch lies midway
    between the last tuned and the first reference timestep, because pipelines round timesteps. That the sampler's
    states are at these levels is for [`check_sampler`] to verify.

    Args:
        config ([`GraftConfig`]):
            `tuned_fraction`, `timestep_sampling` and `tuned_guidance_scale` count.
        sampler ([`Sampler`]):
            The pipeline's scheduler and timesteps.
        clock (`tuple[float, float]`, *optional*, defaults to `(1.0, 0.0)`):
            `(scale, offset)` of the denoiser's own clock, see [`DenoiserCall`].
    """
    schedule = NoiseSchedule.from_scheduler(sampler.scheduler)
    timesteps, starts = sampler.timesteps, sampler.step_starts()
    tuned_steps = max(1, round(config.tuned_fraction * len(starts)))
    step_index = [*starts, len(timesteps)][tuned_steps]
    state = timesteps[step_index] if tuned_steps < len(starts) else None
    tuned = sorted({t for t in timesteps[:step_index] if state is None or t > state}, reverse=True)
    starts_late = len(timesteps) < len(sampler.scheduler.timesteps)
    grid = tuned if config.timestep_sampling == "sampler" else None
    first = timesteps[0] if starts_late else None
    if state is None:
        return TunedLevels(schedule, CLEAN, None, step_index, grid, first), SwitchLevel(None, None, None, clock)
    switch = (tuned[-1] + state) / 2
    alpha, sigma = schedule(state)
    levels = TunedLevels(schedule, (alpha.item(), sigma.item()), switch, step_index, grid, first)
    log_snr = schedule.log_snr(switch).item()
    return levels, SwitchLevel(switch, log_snr, state, clock, config.tuned_guidance_scale)
