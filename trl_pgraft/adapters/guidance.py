# SPDX-License-Identifier: Apache-2.0

"""Another guidance scale above the switch level."""

from contextlib import ExitStack
from typing import Any

import torch

from ..pipelines.denoiser_call import DenoiserCall
from ..pipelines.observe import observe_calls


class TunedGuidance:
    r"""
    Use another guidance scale at the timesteps above the switch, as a context manager around a pipeline call.

    The pipeline keeps its own scale `w`; the conditional prediction that it is handed becomes
    `u + (w_tuned / w) (c - u)`, so that its combination comes out as guidance with `w_tuned`.

    Args:
        denoiser (`torch.nn.Module`):
            Module that the pipeline calls.
        call ([`DenoiserCall`]):
            How the pipeline calls it: with classifier-free guidance, and both branches in one call.
        guidance_scale (`float`):
            The pipeline's own scale `w`.
        tuned_guidance_scale (`float`):
            Scale `w_tuned` above the switch; 1.0 is no guidance.
        switch_timestep (`float` or `None`):
            Training timestep above which the other scale holds; `None`: at all timesteps.

    Raises:
        `ValueError`: the pipeline does not call its denoiser once a step on both branches.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        call: DenoiserCall,
        guidance_scale: float,
        tuned_guidance_scale: float,
        switch_timestep: float | None,
    ):
        if not call.is_guided or call.calls_per_step != 1:
            raise ValueError(
                "tuned_guidance_scale needs a pipeline that calls its denoiser once a step on both guidance branches; "
                "this one does not. Leave it at None."
            )
        self.call = call
        self.ratio = tuned_guidance_scale / guidance_scale
        self.switch_timestep = switch_timestep
        self._denoiser = denoiser
        self._is_tuned = False

    def __enter__(self) -> "TunedGuidance":
        self._hooks = ExitStack()
        self._hooks.enter_context(observe_calls(self._denoiser, self._on_call))
        self._hooks.callback(self._denoiser.register_forward_hook(self._rescale).remove)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()

    def _on_call(self, arguments: dict[str, Any]) -> None:
        timestep = self.call.training_timestep(float(self.call.format.timestep(arguments).flatten()[0]))
        self._is_tuned = self.switch_timestep is None or timestep > self.switch_timestep

    def _rescale(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        if not self._is_tuned:
            return None
        prediction = output[0] if isinstance(output, tuple) else output.sample
        parts = list(prediction.chunk(2))
        conditional, unconditional = self.call.conditional_branch, 1 - self.call.conditional_branch
        parts[conditional] = torch.lerp(parts[unconditional], parts[conditional], self.ratio)
        rescaled = torch.cat(parts)
        return (rescaled, *output[1:]) if isinstance(output, tuple) else type(output)(sample=rescaled)
