# SPDX-License-Identifier: Apache-2.0

"""What a fit must learn at a candidate t_I: the reference's losses, and the mean gradients that a fit would follow."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..adapters.lora import AdapterSwitch, adapter_parameters, add_adapter, remove_adapter
from ..core.seeding import seed_of
from ..pipelines.conditioning import record_conditioning
from ..training.graft_loss import GraftLoss, graft_loss
from .pilot import Pilot, PilotSource


PILOT_ADAPTER = "pgraft_pilot"
TIMESTEPS_PER_STATE = 4
# Independent parts of the pilot, for squared gradients without bias and their errors.
LEAST_PARTS, MOST_PARTS = 3, 16


@contextmanager
def pilot_adapter(trainer: PilotSource) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of a fresh adapter, in which gradients are taken; it computes nothing and is removed again."""
    denoiser, was_training = trainer.denoiser, trainer.denoiser.training
    # A new adapter becomes the only one that is trainable.
    trainable = [p for p in denoiser.parameters() if p.requires_grad]
    peft_config = copy.deepcopy(trainer.policy.peft_config)
    add_adapter(denoiser, peft_config, PILOT_ADAPTER, seed_of(trainer.config.seed, "pilot"))
    try:
        denoiser.train()
        yield [p for p in adapter_parameters(denoiser, PILOT_ADAPTER) if p.requires_grad]
    finally:
        denoiser.train(was_training)
        # Deleting an adapter that is on would turn another one on in its place.
        AdapterSwitch(denoiser, PILOT_ADAPTER).turn(False)
        remove_adapter(denoiser, PILOT_ADAPTER)
        for parameter in trainable:
            parameter.requires_grad_(True)


def pilot_loss(trainer: PilotSource, pilot: Pilot) -> GraftLoss:
    """The trainer's loss on the pilot's prompts, without dropped captions."""
    policy, prompts = trainer.policy, [group.prompt for group in pilot.groups]
    inputs = [policy.inputs_of(group.columns) for group in pilot.groups]
    conditioning = record_conditioning(trainer.pipeline, policy.call, prompts, policy.arguments, inputs)
    return replace(graft_loss(trainer.policy, PILOT_ADAPTER, conditioning), caption_dropout=0.0)


def to_learn(
    trainer: PilotSource, loss: GraftLoss, pilot: Pilot, parameters: list[torch.nn.Parameter]
) -> dict[str, Any]:
    """Losses and squared mean gradients of the reference on accepted and on all states."""
    everything, selected, losses = [], [], []
    for rows in torch.arange(len(pilot.samples)).split(_part_size(pilot)):
        rows = rows[~pilot.reward[rows].isnan()]
        accepted = pilot.accepted[rows]
        if accepted.all() or not accepted.any():
            continue
        share = accepted.double().mean().item()
        parts = [_gradient(trainer, loss, pilot, parameters, rows[mask]) for mask in (accepted, ~accepted)]
        of_all, loss_of_all = (share * one + (1 - share) * other for one, other in zip(*parts, strict=True))
        everything.append(of_all)
        selected.append(parts[0][0] - of_all)
        losses.append(torch.stack([parts[0][1], loss_of_all]))
    if len(losses) < LEAST_PARTS:
        raise ValueError(
            f"choose_intermediate_step: samples were accepted and rejected in {len(losses)} parts of the pilot, of "
            f"{LEAST_PARTS} that a standard error needs. Draw more prompts, or change acceptance_kwargs."
        )
    steps, by_level = loss.levels.position, torch.stack(losses).mean(0)
    refit, selection = (squared_mean(torch.stack(gradients)) for gradients in (everything, selected))
    return {
        "difficulty": by_level[0].mean().item(),
        "difficulty_all": by_level[1].mean().item(),
        "difficulty_levels": by_level[0].tolist(),
        **{name: steps * value for name, value in zip(("refit", "refit_error"), refit, strict=True)},
        **{name: steps * value for name, value in zip(("selection", "selection_error"), selection, strict=True)},
    }


def _part_size(pilot: Pilot) -> int:
    """Samples of whole groups that make one of at most `MOST_PARTS` independent parts."""
    return pilot.groups[0].size * math.ceil(len(pilot.groups) / MOST_PARTS)


def _gradient(
    trainer: PilotSource, loss: GraftLoss, pilot: Pilot, parameters: list[torch.nn.Parameter], rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean gradient of the loss on some samples, and the mean loss in equal parts of the tuned range."""
    gradient, losses = 0.0, []
    for chunk in rows.split(max(1, trainer.config.train_batch_size // TIMESTEPS_PER_STATE)):
        with trainer.accelerator.autocast():
            values = _losses(trainer, loss, pilot, chunk)
        found = torch.autograd.grad(values.sum() / values.shape[1], parameters, allow_unused=True)
        gradient = gradient + torch.cat([g.flatten().double().cpu() for g in found if g is not None])
        losses.append(values.detach().double().cpu())
    return gradient / len(rows), torch.cat(losses).mean(0)


def _losses(trainer: PilotSource, loss: GraftLoss, pilot: Pilot, rows: torch.Tensor) -> torch.Tensor:
    """Loss of each sample at stratified timesteps, from the cleanest; of shape `(rows, TIMESTEPS_PER_STATE)`."""
    states = pilot.states[loss.levels.position][rows]
    timesteps, noise = [], []
    for row in rows.tolist():
        # The same noise at every candidate, so that the curves differ by the candidate alone.
        generator = torch.Generator().manual_seed(seed_of(pilot.samples[row].seed, "difficulty"))
        noise.append(torch.randn(TIMESTEPS_PER_STATE, *states.shape[1:], generator=generator))
        timesteps.append(loss.levels.sample(TIMESTEPS_PER_STATE, generator).sort().values)
    prompts = torch.tensor([pilot.samples[row].group.index for row in rows.tolist()])
    x_i = states.to(trainer.accelerator.device).repeat_interleave(TIMESTEPS_PER_STATE, 0)
    values = loss(
        trainer.denoiser,
        x_i,
        torch.cat(noise).to(x_i),
        torch.cat(timesteps),
        prompts.repeat_interleave(TIMESTEPS_PER_STATE),
        torch.zeros(len(x_i), dtype=torch.bool),
    )
    return values.reshape(len(rows), TIMESTEPS_PER_STATE)


def squared_mean(vectors: torch.Tensor) -> tuple[float, float]:
    """
    Squared length of the mean of independent vectors, without bias, and its jackknife standard error.

    Products of different vectors only are averaged: a vector's product with itself would count its noise.

    Args:
        vectors (`torch.Tensor` of shape `(m, D)`):
            At least 3.
    """
    m, products = len(vectors), vectors @ vectors.T
    of_each = products.sum(1) - products.diagonal()
    total = of_each.sum()
    without_each = (total - 2 * of_each) / ((m - 1) * (m - 2))
    error = ((m - 1) * without_each.var(unbiased=False)).sqrt()
    return (total / (m * (m - 1))).item(), error.item()
