# SPDX-License-Identifier: Apache-2.0

"""Another guidance scale above the switch level."""

from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..pipelines.denoiser_call import DenoiserCall, denoiser_of
from ..pipelines.observe import observe_calls, observe_steps


class TunedGuidance:
    r"""
    Use another guidance scale at the timesteps above the switch, as a context manager around a pipeline call.

    The pipeline keeps its own scale `w`; the conditional prediction that it is handed becomes
    `u + (w_tuned / w) (c - u)`, so that its combination comes out as guidance with `w_tuned`.

    Args:
        pipeline (`DiffusionPipeline`):
            Pipeline that is called inside the block.
        call ([`DenoiserCall`]):
            How it calls its denoiser: with classifier-free guidance, and both branches in one call.
        guidance_scale (`float`):
            The pipeline's own scale `w`.
        tuned_guidance_scale (`float`):
            Scale `w_tuned` above the switch; 1.0 is no guidance.
        switch_timestep (`float` or `None`):
            Training timestep above which the other scale holds; `None`: at all timesteps.

    Raises:
        `ValueError`: the pipeline does not call its denoiser once a step on both branches; or, at the end of its first
            step, it guides otherwise than with `guidance_scale`, such as not at all.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
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
        self.guidance_scale = guidance_scale
        self.ratio = tuned_guidance_scale / guidance_scale
        self.switch_timestep = switch_timestep
        self._pipeline = pipeline
        self._is_tuned = False
        self._branches: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> "TunedGuidance":
        self._hooks = ExitStack()
        denoiser = denoiser_of(self._pipeline)
        self._hooks.enter_context(observe_calls(denoiser, self._on_call))
        self._hooks.callback(denoiser.register_forward_hook(self._rescale).remove)
        self._hooks.enter_context(observe_steps(self._pipeline.scheduler, self._check))
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
        if len(prediction) % 2:
            raise self._unguided()
        parts = list(prediction.chunk(2))
        conditional, unconditional = self.call.conditional_branch, 1 - self.call.conditional_branch
        parts[conditional] = torch.lerp(parts[unconditional], parts[conditional], self.ratio)
        self._branches = parts[conditional], parts[unconditional]
        rescaled = torch.cat(parts)
        return (rescaled, *output[1:]) if isinstance(output, tuple) else type(output)(sample=rescaled)

    def _check(self, model_output: torch.Tensor, **_: Any) -> None:
        """What was taken for two branches must have been combined as such: two prompts without guidance are not."""
        if self._branches is None:
            return
        # A learned variance may follow the prediction, and not every pipeline hands it on.
        channels = min(model_output.shape[1], self._branches[0].shape[1])
        c, u = (part[:, :channels].float() for part in self._branches)
        given = self.call.sign * model_output[: len(c), :channels].float().reshape(c.shape)
        guided, self._branches = self.guidance_scale * (c - u), None
        rounding = torch.finfo(model_output.dtype).eps * abs(self.guidance_scale) * (c.norm() + u.norm())
        if (given - u - guided).norm() > 0.05 * guided.norm() + rounding:
            raise self._unguided()

    def _unguided(self) -> ValueError:
        return ValueError(
            f"{type(self._pipeline).__name__} was called without guidance, or with another scale than the "
            f"{self.guidance_scale:g} that TunedGuidance was made for. Call it with that scale, or leave the "
            "`with` block."
        )
