# SPDX-License-Identifier: Apache-2.0

"""The noise level at which an adapter hands over to the reference model."""

import json
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SwitchLevel:
    r"""
    The noise level at which an adapter hands over to the reference model; stored with the adapter.

    Args:
        switch_timestep (`float` or `None`):
            Training timestep midway between the last tuned and the first reference step; `None`: never (GRAFT).
        switch_log_snr (`float` or `None`):
            `log(alpha^2 / sigma^2)` at that timestep; `None` where there is none.
        state_timestep (`float` or `None`):
            Training timestep t_I of the accepted states; `None`: final images.
        clock (`tuple[float, float]`, *optional*, defaults to `(1.0, 0.0)`):
            `(scale, offset)` of the denoiser's own clock, see [`DenoiserCall`]; the default is the training clock.
        tuned_guidance_scale (`float`, *optional*):
            Guidance scale of the tuned steps; the sampler's where not given.
    """

    switch_timestep: float | None
    switch_log_snr: float | None
    state_timestep: float | None
    clock: tuple[float, float] = (1.0, 0.0)
    tuned_guidance_scale: float | None = None

    @classmethod
    def from_json(cls, text: str) -> "SwitchLevel":
        """The switch level whose fields are in the JSON object `text`."""
        values = json.loads(text)
        return cls(**{**values, "clock": tuple(values["clock"])})


ALWAYS_ON = SwitchLevel(None, None, None)


def same_level(one: SwitchLevel, other: SwitchLevel) -> bool:
    """Whether two adapters switch at the same noise level, up to the rounding of their samplers."""
    if one.switch_timestep is None or other.switch_timestep is None:
        return one.switch_timestep is other.switch_timestep
    # The steps of a sampler are much further from each other than its arithmetic is from machine to machine.
    return math.isclose(one.switch_timestep, other.switch_timestep, rel_tol=1e-4)


def level_in_words(switch: SwitchLevel) -> str:
    """What an adapter with this switch level does, as the end of a sentence."""
    return (
        "tunes all noise levels"
        if switch.switch_timestep is None
        else f"switches at timestep {switch.switch_timestep:g} (log-SNR {switch.switch_log_snr:.2f})"
    )
