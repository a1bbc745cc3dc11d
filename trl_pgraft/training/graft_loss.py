# SPDX-License-Identifier: Apache-2.0

"""The weighted denoising loss on re-noised states, with guidance as configured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.lora import ADAPTER_NAME, without_adapters
from ..adapters.policy import Policy
from ..core.losses import corrected_target, guided, weighted_mse
from ..core.parameterizations import renoise
from ..pipelines.conditioning import Conditioning
from ..pipelines.denoiser_call import DenoiserCall, denoiser_of, replay
from ..pipelines.timesteps import TunedLevels
from ..pipelines.tree import choose_rows, same_shapes


@dataclass(frozen=True)
class GraftLoss:
    """
    The weighted denoising loss on re-noised states, with guidance as configured.

    Args:
        denoiser (`torch.nn.Module`):
            The bare module, for the reference's prediction.
        call ([`DenoiserCall`]):
            How it is called.
        conditioning ([`Conditioning`]):
            Recorded conditioning of the prompts.
        levels ([`TunedLevels`]):
            Noise levels.
        prediction_type (`str`):
            What the denoiser predicts.
        guidance_loss (`str`):
            `"conditional"`, `"corrected"` or `"combined"`.
        guidance_scale (`float`):
            Guidance of the tuned steps when the states were drawn.
        caption_dropout (`float`):
            Share of rows that get the unconditional input (conditional loss).
        adapters (`list[str]`):
            Adapters that make the difference between policy and reference.
    """

    denoiser: torch.nn.Module
    call: DenoiserCall
    conditioning: Conditioning
    levels: TunedLevels
    prediction_type: str
    guidance_loss: str
    guidance_scale: float
    caption_dropout: float
    adapters: list[str]

    def __call__(
        self,
        model: Callable[..., Any],
        x_i: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """
        Loss of each row.

        Args:
            model (`Callable`):
                The denoiser as accelerate prepared it.
            x_i, noise (`torch.Tensor` of shape `(B, ...)`):
                States and standard normal noise.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Training timesteps.
            prompts (`torch.Tensor` of shape `(B,)`):
                Rows of the conditioning.
            dropped (`torch.Tensor` of shape `(B,)`, bool):
                Rows that get the unconditional input, where there is one.

        Returns:
            `torch.Tensor` of shape `(B,)`.
        """
        return weighted_mse(*self.regression(model, x_i, noise, timesteps, prompts, dropped))

    def regression(
        self,
        model: Callable[..., Any],
        x_i: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: torch.Tensor,
        dropped: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prediction and target, both of shape `(B, ...)`, and weight of each row; arguments as those of a call."""
        x_t, target, weight = renoise(
            x_i, noise, self.levels.level_i, self.levels.schedule(timesteps), self.prediction_type
        )
        x_t = x_t.to(self.denoiser.dtype)
        conditional = self.conditioning.rows(prompts, x_i.device)
        if not self.call.is_guided or self.guidance_scale == 1.0:
            return replay(model, self.call, x_t, timesteps, conditional), target, weight
        unconditional = self.conditioning.rows(prompts, x_i.device, unconditional=True)
        if self.guidance_loss == "combined":
            u, c = (replay(model, self.call, x_t, timesteps, branch) for branch in (unconditional, conditional))
            return guided(u, c, self.guidance_scale), target, weight
        if self.guidance_loss == "corrected":
            with torch.no_grad(), without_adapters(self.denoiser, self.adapters):
                u = replay(self.denoiser, self.call, x_t, timesteps, unconditional)
            target = corrected_target(target, u.to(target.dtype), self.guidance_scale)
        elif dropped.any():
            return self._caption_dropped(model, x_t, timesteps, prompts, dropped), target, weight
        return replay(model, self.call, x_t, timesteps, conditional), target, weight

    def _caption_dropped(
        self,
        model: Callable[..., Any],
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """Prediction with the unconditional input in the dropped rows."""
        branches = [self.conditioning.rows(prompts, x_t.device, unconditional) for unconditional in (False, True)]
        if same_shapes(*branches):
            mixed = choose_rows(dropped, branches[1], branches[0], self.conditioning.batch_axes)
            return replay(model, self.call, x_t, timesteps, mixed)
        # Prompts and negative prompts of different lengths make no common batch.
        parts = [(mask.nonzero().flatten(), is_dropped) for mask, is_dropped in ((~dropped, False), (dropped, True))]
        predictions = []
        for rows, is_dropped in parts:
            if len(rows):
                own = self.conditioning.rows(prompts[rows], x_t.device, is_dropped)
                predictions.append(replay(model, self.call, x_t[rows.to(x_t.device)], timesteps[rows], own))
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return torch.cat(predictions)[order.to(x_t.device)]


def graft_loss(policy: Policy, name: str, conditioning: Conditioning) -> GraftLoss:
    """The loss by which adapter `name` of a policy is fine-tuned on prompts with this conditioning."""
    adapters = [n for n in dict.fromkeys([ADAPTER_NAME, name]) if n in policy.denoiser.peft_config]
    return GraftLoss(
        denoiser_of(policy.pipeline),
        policy.call,
        conditioning,
        policy.levels,
        policy.prediction_type,
        policy.config.guidance_loss,
        policy.tuned_guidance_scale,
        policy.config.caption_dropout,
        adapters,
    )
