# SPDX-License-Identifier: Apache-2.0

"""The weighted denoising loss on re-noised states, with guidance as configured."""

from dataclasses import dataclass

import torch
from diffusers import ModelMixin

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
    r"""
    The weighted denoising loss on re-noised states, with guidance as configured (see [`renoise`]).

    Args:
        denoiser (`diffusers.ModelMixin`):
            What the pipeline calls, not wrapped by accelerate, for the reference's prediction.
        call ([`DenoiserCall`]):
            How the pipeline calls it.
        conditioning ([`Conditioning`]):
            Recorded conditioning of the prompts.
        levels ([`TunedLevels`]):
            Noise level of the states, and the noise schedule.
        prediction_type (`str`):
            What the denoiser predicts, one of `PREDICTION_TYPES`.
        guidance_loss (`str`):
            What is compared with the target: `"conditional"`, the conditional prediction; `"corrected"`, the same with
            a target corrected by the reference's unconditional prediction; `"combined"`, the guided prediction.
        guidance_scale (`float`):
            Guidance scale at which the tuned steps of the states were sampled; 1.0 is no guidance.
        caption_dropout (`float`):
            Share of rows that get the unconditional input (conditional loss).
        adapters (`list[str]`):
            Adapters in which policy and reference differ.
    """

    denoiser: ModelMixin
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
        model: torch.nn.Module,
        x_i: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        r"""
        Loss of each row.

        Args:
            model (`torch.nn.Module`):
                The denoiser as accelerate prepared it.
            x_i, noise (`torch.Tensor` of shape `(B, ...)`):
                Accepted states, and standard normal noise.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Training timesteps to which the states are noised.
            prompts (`torch.Tensor` of shape `(B,)`, int64):
                Row of the conditioning that each belongs to.
            dropped (`torch.Tensor` of shape `(B,)`, bool):
                Rows that get the unconditional input, with the conditional loss of a guided pipeline.

        Returns:
            `torch.Tensor` of shape `(B,)`.
        """
        level_t = self.levels.schedule(timesteps)
        x_t, target, weight = renoise(x_i, noise, self.levels.level_i, level_t, self.prediction_type)
        x_t = x_t.to(self.denoiser.dtype)
        kind = self.guidance_loss if self.call.is_guided and self.guidance_scale != 1.0 else None
        if kind == "combined":
            u, c = (self._predict(model, x_t, timesteps, prompts, unconditional) for unconditional in (True, False))
            return weighted_mse(guided(u, c, self.guidance_scale), target, weight)
        if kind == "corrected":
            with torch.no_grad(), without_adapters(self.denoiser, self.adapters):
                u = self._predict(self.denoiser, x_t, timesteps, prompts, unconditional=True)
            target = corrected_target(target, u.to(target.dtype), self.guidance_scale)
        if kind == "conditional" and dropped.any():
            prediction = self._predict_dropped(model, x_t, timesteps, prompts, dropped)
        else:
            prediction = self._predict(model, x_t, timesteps, prompts)
        return weighted_mse(prediction, target, weight)

    def fields(
        self, model: torch.nn.Module, x_t: torch.Tensor, timesteps: torch.Tensor, prompts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The conditional and the guided prediction of `model`, the same tensor without guidance; see the call."""
        c = self._predict(model, x_t, timesteps, prompts)
        if not self.call.is_guided or self.guidance_scale == 1.0:
            return c, c
        return c, guided(self._predict(model, x_t, timesteps, prompts, unconditional=True), c, self.guidance_scale)

    def _predict(
        self,
        model: torch.nn.Module,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: torch.Tensor,
        unconditional: bool = False,
    ) -> torch.Tensor:
        """Prediction of one branch, with the conditioning of the rows' prompts."""
        return replay(model, self.call, x_t, timesteps, self.conditioning.rows(prompts, x_t.device, unconditional))

    def _predict_dropped(
        self,
        model: torch.nn.Module,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """Prediction with the unconditional input in the dropped rows and the conditional one in the others."""
        branches = [self.conditioning.rows(prompts, x_t.device, unconditional) for unconditional in (False, True)]
        if same_shapes(*branches):
            mixed = choose_rows(dropped, branches[1], branches[0], self.conditioning.batch_axes)
            return replay(model, self.call, x_t, timesteps, mixed)
        # Prompts and negative prompts of different lengths make no common batch.
        parts = [(mask.nonzero().flatten(), is_dropped) for mask, is_dropped in ((~dropped, False), (dropped, True))]
        predictions = [
            self._predict(model, x_t[rows.to(x_t.device)], timesteps[rows], prompts[rows], is_dropped)
            for rows, is_dropped in parts
            if len(rows)
        ]
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return torch.cat(predictions)[order.to(x_t.device)]


def graft_loss(policy: Policy, name: str, conditioning: Conditioning) -> GraftLoss:
    r"""
    The loss by which an adapter of a policy is fine-tuned.

    Args:
        policy ([`Policy`]):
            Pipeline and adapter; its configuration has the kind of the loss.
        name (`str`):
            Name of the adapter in the denoiser.
        conditioning ([`Conditioning`]):
            Recorded conditioning of the prompts.
    """
    return GraftLoss(
        denoiser_of(policy.pipeline),
        policy.call,
        conditioning,
        policy.levels,
        policy.prediction_type,
        policy.config.guidance_loss,
        policy.tuned_guidance_scale,
        policy.config.caption_dropout,
        [n for n in dict.fromkeys([ADAPTER_NAME, name]) if n in policy.denoiser.peft_config],
    )
