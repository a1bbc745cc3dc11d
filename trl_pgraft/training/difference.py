# SPDX-License-Identifier: Apache-2.0

"""How far the difference of two fits moves what the pipeline samples with, by their predictions on held-out states."""

from dataclasses import dataclass

import torch

from ..adapters.lora import ADAPTER_NAME
from ..adapters.merge import merge_difference
from ..adapters.policy import Policy
from ..core.parameterizations import renoise
from ..core.seeding import generator_of, noise_of
from ..pipelines.placement import evaluation_mode, on_device
from ..rollouts.collect import gathered
from .graft_loss import GraftLoss


# States on which the predictions are compared.
STATES = 32
Fields = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Probe:
    r"""
    Noised states that no fit was trained on, and the predictions for them: this process's share.

    Args:
        policy ([`Policy`]):
            Its denoiser predicts, with the adapters that are on.
        loss ([`GraftLoss`]):
            How the denoiser is called, at which noise levels, and with which guidance.
        x_t (`torch.Tensor` of shape `(B, ...)`):
            States, newly noised to stratified levels of the tuned range.
        timesteps (`torch.Tensor` of shape `(B,)`):
            Their training timesteps.
        prompts (`torch.Tensor` of shape `(B,)`, int64):
            Their rows of the conditioning.
    """

    policy: Policy
    loss: GraftLoss
    x_t: torch.Tensor
    timesteps: torch.Tensor
    prompts: torch.Tensor

    @classmethod
    def of(cls, policy: Policy, loss: GraftLoss, states: torch.Tensor, prompts: torch.Tensor, epoch: int) -> "Probe":
        r"""
        The probe of an iteration.

        Args:
            policy ([`Policy`]):
                The policy that is fine-tuned.
            loss ([`GraftLoss`]):
                The loss of its fits.
            states (`torch.Tensor` of shape `(N, ...)`):
                States x_I, on the host.
            prompts (`torch.Tensor` of shape `(N,)`, int64):
                Row of the conditioning of each.
            epoch (`int`):
                Number of the iteration, which seeds the noise.
        """
        accelerator, parts = policy.accelerator, (policy.config.seed, epoch, "probe")
        rows = (torch.arange(STATES) * max(1, len(states) // STATES)) % len(states)
        timesteps = loss.levels.sample(STATES, generator_of(*parts))
        # Every process has a state, because all of them take part in the sums.
        own = torch.arange(accelerator.process_index % STATES, STATES, accelerator.num_processes)
        noise = torch.stack([noise_of(states.shape[1:], *parts, row) for row in own.tolist()])
        levels = loss.levels.level_i, loss.levels.schedule(timesteps[own])
        x_t, _, _ = renoise(states[rows[own]], noise, *levels, loss.prediction_type)
        return cls(policy, loss, x_t, timesteps[own], prompts[rows[own]])

    @torch.no_grad()
    def predict(self) -> Fields:
        """The conditional and the guided prediction of the denoiser as it is now, on the host."""
        policy, accelerator, denoiser = self.policy, self.policy.accelerator, self.loss.denoiser
        parts = []
        with on_device(policy.pipeline, policy.modules, accelerator), evaluation_mode(policy.denoiser):
            for rows in torch.arange(len(self.x_t)).split(
                max(policy.config.train_batch_size, policy.config.sample_batch_size)
            ):
                x_t = self.x_t[rows].to(accelerator.device, denoiser.dtype)
                with accelerator.autocast():
                    fields = self.loss.fields(denoiser, x_t, self.timesteps[rows], self.prompts[rows])
                parts.append([field.cpu().double() for field in fields])
        conditional, combined = (torch.cat(fields) for fields in zip(*parts, strict=True))
        return conditional, combined

    def inner(self, one: torch.Tensor, other: torch.Tensor) -> float:
        """Inner product of two fields over all processes."""
        return gathered(self.policy.accelerator, (one * other).sum().reshape(1)).sum().item()


def merge_fits(probe: Probe, names: tuple[str, str], fits: tuple[Fields, Fields]) -> dict[str, float]:
    r"""
    Add the difference of two fits to the policy's adapter, so that the guided prediction moves by `control_scale` of
    what was fitted.

    The conditional branch is fitted, and both branches are moved. With c and g the differences of the fits'
    conditional and guided predictions, the guided prediction moves by `<g, c> / <c, c>` for each unit of c: by the
    guidance scale w if the unconditional branch stays, by 1 if a reward is the same for all prompts.

    Args:
        probe ([`Probe`]):
            The states.
        names (`tuple[str, str]`):
            Adapters of the two fits, which are off; they are removed.
        fits (`tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]`):
            Predictions of each, from [`~Probe.predict`].

    Returns:
        `dict[str, float]`: metrics. `control/movement` is the quotient above, at least 1 with guidance;
            `control/scale` the factor of the merged difference; and `control/merge_error` the error of what the merged
            adapter adds to the guided prediction, relative to the scaled difference of the fits: the merge is exact in
            the weights, and to first order in what they compute.
    """
    policy, config, w = probe.policy, probe.policy.config, probe.loss.guidance_scale
    c, g = (one - other for one, other in zip(*fits, strict=True))
    movement = w
    if (squared := probe.inner(c, c)) > 0:
        # A smaller quotient is noise, and to divide by it would amplify that.
        movement = max(probe.inner(g, c) / squared, min(1.0, w))
    # The combined loss fits the guided prediction itself; the corrected one a w-th of its change.
    factor = {"conditional": 1 / movement, "corrected": w / movement, "combined": 1.0}[config.guidance_loss]
    scale, (_, before) = config.control_scale * factor, probe.predict()
    merge_difference(policy.denoiser, ADAPTER_NAME, *names, scale, config.max_merged_rank)
    error, size = probe.predict()[1] - before - scale * g, scale * g
    relative = (probe.inner(error, error) / max(probe.inner(size, size), 1e-30)) ** 0.5
    return {"control/movement": movement, "control/scale": scale, "control/merge_error": relative}
