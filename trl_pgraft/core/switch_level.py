# SPDX-License-Identifier: Apache-2.0

"""The noise level at which an adapter hands over to the reference model."""

import json
import math
from dataclasses import asdict, dataclass


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
        timestep_name (`str`, *optional*):
            Argument of the denoiser that takes the timestep, where that has another name than usual.
        denoiser_format (`str`, *optional*):
            Name of the class that reads the timestep, where more than the argument's name is needed.
    """

    switch_timestep: float | None
    switch_log_snr: float | None
    state_timestep: float | None
    clock: tuple[float, float] = (1.0, 0.0)
    tuned_guidance_scale: float | None = None
    timestep_name: str | None = None
    denoiser_format: str | None = None

    def to_json(self, indent: int | None = None) -> str:
        """
        A JSON object with its fields; without those that only unusual denoisers need, where they are not set.

        Args:
            indent (`int`, *optional*):
                Spaces by which entries are indented; all is in one line where not given.
        """
        unusual = ("timestep_name", "denoiser_format")
        values = {name: value for name, value in asdict(self).items() if value is not None or name not in unusual}
        return json.dumps(values, indent=indent)

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
    if switch.switch_timestep is None:
        return "tunes all noise levels"
    return f"switches at timestep {switch.switch_timestep:g} (log-SNR {switch.switch_log_snr:.2f})"
