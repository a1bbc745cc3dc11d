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

"""
The schedulers that are tested, and what is measured of each.

    python -m examples.benchmarks.schedulers            # the tables of docs/schedulers.md
"""

from dataclasses import dataclass, field
from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SPACINGS = ("leading", "linspace", "trailing")
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@dataclass(frozen=True)
class Case:
    """
    A scheduler as it is tested.

    Args:
        kind (`type`):
            diffusers' class.
        options (`dict`):
            Its configuration, without the timestep spacing.
        spacings (`tuple`, *optional*):
            Timestep spacings that it has; `None` is its own.
        is_stochastic (`bool`, *optional*, defaults to `False`):
            Whether it adds noise.
        is_rounded (`bool`, *optional*, defaults to `False`):
            Whether its noise levels are no whole timesteps, while it tells the denoiser whole ones.
    """

    kind: type
    options: dict[str, Any] = field(default_factory=dict)
    spacings: tuple[str | None, ...] = (None,)
    is_stochastic: bool = False
    is_rounded: bool = False

    @property
    def is_flow(self) -> bool:
        return "flow" in str(self.options.get("prediction_type")) or self.kind.__name__.startswith("FlowMatch")

    def make(self, spacing: str | None = None, **options: Any) -> Any:
        """The scheduler."""
        betas = {} if self.is_flow else BETAS
        spaced = {} if spacing is None else {"timestep_spacing": spacing, "steps_offset": 1}
        return self.kind(**{**betas, **spaced, **self.options, **options})


_SDE = {"algorithm_type": "sde-dpmsolver++"}
_UNCLIPPED = {"clip_sample": False}

CASES = {
    "DDIM": Case(DDIMScheduler, _UNCLIPPED, ("leading", "trailing")),
    "DDIM, zero SNR": Case(DDIMScheduler, {**_UNCLIPPED, **ZERO_SNR}, ("trailing",)),
    "DDPM": Case(DDPMScheduler, _UNCLIPPED, SPACINGS, is_stochastic=True),
    "DPM++": Case(DPMSolverMultistepScheduler, {}, SPACINGS),
    "DPM++ to sigma_min, order kept": Case(
        DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "lower_order_final": False}, SPACINGS
    ),
    "DPM++, zero SNR": Case(DPMSolverMultistepScheduler, ZERO_SNR, ("trailing",)),
    "DPM++ Karras": Case(DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, is_rounded=True),
    "DPM++ exponential": Case(DPMSolverMultistepScheduler, {"use_exponential_sigmas": True}, is_rounded=True),
    "DPM++ beta": Case(DPMSolverMultistepScheduler, {"use_beta_sigmas": True}, is_rounded=True),
    "DPM++ SDE": Case(DPMSolverMultistepScheduler, _SDE, SPACINGS, is_stochastic=True),
    "DPM++ SDE Karras": Case(
        DPMSolverMultistepScheduler, {**_SDE, "use_karras_sigmas": True}, is_stochastic=True, is_rounded=True
    ),
    "UniPC": Case(UniPCMultistepScheduler, {}, SPACINGS),
    "UniPC Karras": Case(UniPCMultistepScheduler, {"use_karras_sigmas": True}, is_rounded=True),
    "Euler": Case(EulerDiscreteScheduler, {}, SPACINGS),
    "Euler, zero SNR": Case(EulerDiscreteScheduler, ZERO_SNR, ("trailing",)),
    "Euler Karras": Case(EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "Euler ancestral": Case(EulerAncestralDiscreteScheduler, {}, SPACINGS, is_stochastic=True),
    "Heun": Case(HeunDiscreteScheduler, {}, SPACINGS),
    "Heun Karras": Case(HeunDiscreteScheduler, {"use_karras_sigmas": True}),
    "PNDM": Case(PNDMScheduler, {"skip_prk_steps": True}, ("leading", "trailing")),
    "LCM": Case(LCMScheduler, {}, is_stochastic=True),
    "flow Euler": Case(FlowMatchEulerDiscreteScheduler),
    "flow Euler, shift 3": Case(FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "flow Euler, dynamic shift": Case(FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
    "flow Euler, stochastic": Case(
        FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "stochastic_sampling": True}, is_stochastic=True
    ),
    "flow Heun, shift 3": Case(FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    "flow DPM++": Case(DPMSolverMultistepScheduler, FLOW_SIGMAS, is_rounded=True),
    "flow UniPC": Case(UniPCMultistepScheduler, FLOW_SIGMAS, is_rounded=True),
}
