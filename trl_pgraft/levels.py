# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""The noise levels that a configuration tunes: where x_I is recorded, where the adapter switches, what is trained."""

from dataclasses import dataclass
from typing import Any

import torch

from .config import GraftConfig
from .denoiser_call import DenoiserCall
from .noise_schedules import CLEAN, Level, NoiseSchedule
from .probe import first_timestep, sampler_timesteps
from .timestep_gate import SwitchLevel


@dataclass(frozen=True)
class TunedLevels:
    """
    Noise levels that are fine-tuned, and how training timesteps are drawn from them.

    Args:
        schedule ([`NoiseSchedule`]):
            alpha and sigma of a training timestep.
        level_i (`tuple[float, float]`):
            Level of the states x_I.
        switch_timestep (`float` or `None`):
            Timesteps above it are tuned; `None`: all.
        position (`int`):
            Position of x_I among the sampler's steps; the number of tuned steps.
        grid (`list[float]` or `None`):
            Timesteps to draw from; `None`: all of the tuned range.
        first (`float` or `None`):
            Noisiest tuned timestep, where the sampler starts from an image; `None`: pure noise.
    """

    schedule: NoiseSchedule
    level_i: Level
    switch_timestep: float | None
    position: int
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

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` training timesteps, stratified over the tuned levels in random order; shape `(count,)`, float64."""
        # In float64, where index + u stays below index + 1: the lower end is never drawn.
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
    config: GraftConfig, pipeline: Any, call: DenoiserCall, arguments: dict[str, Any]
) -> tuple[TunedLevels, SwitchLevel]:
    """
    Tuned noise levels of a pipeline's sampler, and the switch that is stored with the adapter.

    The switch lies midway between the last tuned and the first reference step, because pipelines round timesteps.

    Args:
        config ([`GraftConfig`]):
            `tuned_fraction` and `timestep_sampling` count.
        pipeline (`DiffusionPipeline`):
            Asked for the timesteps of its sampler.
        call ([`DenoiserCall`]):
            The denoiser's clock.
        arguments (`dict`):
            Arguments of the sampling call.
    """
    timesteps, first = sampler_timesteps(pipeline, arguments), first_timestep(pipeline, arguments)
    # Where an image is started from, the noisiest steps of the schedule are not made, and not tuned.
    starts_late = first != timesteps[0]
    timesteps = timesteps[timesteps.index(first) :]
    position = max(1, round(config.tuned_fraction * len(timesteps)))
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    grid = timesteps[:position] if config.timestep_sampling == "sampler" else None
    further = {"grid": grid, "first": first if starts_late else None}
    if position == len(timesteps):
        return TunedLevels(schedule, CLEAN, None, position, **further), SwitchLevel(None, None, None, call.clock)
    state = timesteps[position]
    switch = (timesteps[position - 1] + state) / 2
    alpha, sigma = schedule(state)
    levels = TunedLevels(schedule, (alpha.item(), sigma.item()), switch, position, **further)
    log_snr = schedule.log_snr(switch).item()
    return levels, SwitchLevel(switch, log_snr, state, call.clock, config.tuned_guidance_scale)
