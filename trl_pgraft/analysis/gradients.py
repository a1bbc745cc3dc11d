# SPDX-License-Identifier: Apache-2.0

"""What fine-tuning must learn at a candidate t_I: the reference's losses, and the mean gradients to start with."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ..adapters.lora import adapter_parameters, add_adapter, remove_adapter
from ..adapters.policy import Policy
from ..core.seeding import generator_of, noise_of, seed_of
from ..pipelines.conditioning import record_conditioning
from ..training.graft_loss import GraftLoss, graft_loss
from .pilot import Pilot


PILOT_ADAPTER = "pgraft_pilot"
TIMESTEPS_PER_STATE = 4
# Number of independent parts of the pilot, for squared gradients without bias and their errors.
LEAST_PARTS, MOST_PARTS = 3, 16


@contextmanager
def pilot_adapter(policy: Policy) -> Iterator[list[torch.nn.Parameter]]:
    """
    Parameters of a new adapter of `policy`, for gradients, without dropout; it computes nothing and is removed after
    the block.
    """
    denoiser = policy.denoiser
    # A new adapter becomes the only one that is trainable.
    trainable = [p for p in denoiser.parameters() if p.requires_grad]
    add_adapter(denoiser, copy.deepcopy(policy.peft_config), PILOT_ADAPTER, seed_of(policy.config.seed, "pilot"))
    try:
        denoiser.eval()
        yield [p for p in adapter_parameters(denoiser, PILOT_ADAPTER) if p.requires_grad]
    finally:
        remove_adapter(denoiser, PILOT_ADAPTER)
        for parameter in trainable:
            parameter.requires_grad_(True)


def pilot_loss(policy: Policy, pilot: Pilot) -> GraftLoss:
    """The loss by which `policy` is fine-tuned, on the prompts of `pilot`, without dropped captions."""
    conditioning = record_conditioning(
        policy.pipeline,
        policy.call,
        [group.prompt for group in pilot.groups],
        policy.arguments,
        [policy.inputs_of(group.columns) for group in pilot.groups],
    )
    return replace(graft_loss(policy, PILOT_ADAPTER, conditioning), caption_dropout=0.0)


def losses_and_gradients(
    policy: Policy, loss: GraftLoss, pilot: Pilot, parameters: list[torch.nn.Parameter]
) -> dict[str, Any]:
    r"""
    Losses and squared mean gradients of the reference on accepted and on all states.

    Args:
        policy ([`Policy`]):
            Its denoiser, with the adapter of [`pilot_adapter`].
        loss ([`GraftLoss`]):
            From [`pilot_loss`], with the noise levels of a candidate.
        pilot ([`Pilot`]):
            The states and what is accepted of them.
        parameters (`list[torch.nn.Parameter]`):
            From [`pilot_adapter`].

    Returns:
        `dict[str, Any]`: `difficulty` to `selection_error`, see [`choose_intermediate_step`].

    Raises:
        `ValueError`: samples are accepted and rejected in too few parts of the pilot for a standard error.
    """
    everything, selected, losses = [], [], []
    # Whole groups make a part.
    part_size = pilot.groups[0].size * math.ceil(len(pilot.groups) / MOST_PARTS)
    for rows in torch.arange(len(pilot.samples)).split(part_size):
        rows = rows[~pilot.total_reward[rows].isnan()]
        accepted = pilot.accepted[rows]
        if accepted.all() or not accepted.any():
            continue
        share = accepted.double().mean().item()
        parts = [_gradient(policy, loss, pilot, parameters, rows[mask]) for mask in (accepted, ~accepted)]
        of_all, loss_of_all = (share * one + (1 - share) * other for one, other in zip(*parts, strict=True))
        everything.append(of_all)
        selected.append(parts[0][0] - of_all)
        losses.append(torch.stack([parts[0][1], loss_of_all]))
    if len(losses) < LEAST_PARTS:
        raise ValueError(
            f"choose_intermediate_step: samples were accepted and rejected in {len(losses)} parts of the pilot, of "
            f"{LEAST_PARTS} that a standard error needs. Use more prompts, or change acceptance_kwargs."
        )
    steps, by_level = loss.levels.step_index, torch.stack(losses).mean(0)
    refit, selection = (squared_mean(torch.stack(gradients)) for gradients in (everything, selected))
    return {
        "difficulty": by_level[0].mean().item(),
        "difficulty_all": by_level[1].mean().item(),
        "difficulty_levels": by_level[0].tolist(),
        **{name: steps * value for name, value in zip(("refit", "refit_error"), refit, strict=True)},
        **{name: steps * value for name, value in zip(("selection", "selection_error"), selection, strict=True)},
    }


def _gradient(
    policy: Policy, loss: GraftLoss, pilot: Pilot, parameters: list[torch.nn.Parameter], rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean gradient of the loss on some samples, and the mean loss in equal parts of the tuned range."""
    gradient, losses = torch.zeros((), dtype=torch.float64), []
    for chunk in rows.split(max(1, policy.config.train_batch_size // TIMESTEPS_PER_STATE)):
        with policy.accelerator.autocast():
            values = _losses(policy, loss, pilot, chunk)
        found = torch.autograd.grad(values.sum() / values.shape[1], parameters, allow_unused=True)
        gradient = gradient + torch.cat([g.flatten().cpu().double() for g in found if g is not None])
        losses.append(values.detach().cpu().double())
    return gradient / len(rows), torch.cat(losses).mean(0)


def _losses(policy: Policy, loss: GraftLoss, pilot: Pilot, rows: torch.Tensor) -> torch.Tensor:
    """Loss of each sample at stratified timesteps, from the cleanest; of shape `(rows, TIMESTEPS_PER_STATE)`."""
    states = pilot.states[loss.levels.step_index][rows]
    timesteps, noise = [], []
    for row in rows.tolist():
        # The same noise at every candidate, so that the curves differ by the candidate alone.
        parts = (policy.config.seed, "difficulty", row)
        noise.append(noise_of((TIMESTEPS_PER_STATE, *states.shape[1:]), *parts))
        timesteps.append(loss.levels.sample(TIMESTEPS_PER_STATE, generator_of(*parts)).sort().values)
    prompts = torch.tensor([pilot.samples[row].group.index for row in rows.tolist()])
    x_i = states.to(policy.accelerator.device).repeat_interleave(TIMESTEPS_PER_STATE, 0)
    return loss(
        policy.denoiser,
        x_i,
        torch.cat(noise).to(x_i),
        torch.cat(timesteps),
        prompts.repeat_interleave(TIMESTEPS_PER_STATE),
        torch.zeros(len(x_i), dtype=torch.bool),
    ).reshape(len(rows), TIMESTEPS_PER_STATE)


def squared_mean(vectors: torch.Tensor) -> tuple[float, float]:
    r"""
    Squared length of the mean of independent vectors, without bias, and its jackknife standard error.

    Only products of different vectors are averaged, because a vector's product with itself contains its noise.

    Args:
        vectors (`torch.Tensor`):
            (m, D), m >= 3: independent vectors with the same mean.

    Returns:
        `tuple[float, float]`: the estimate, which may be negative, and its standard error.
    """
    m, products = len(vectors), vectors @ vectors.T
    of_each = products.sum(1) - products.diagonal()
    total = of_each.sum()
    without_each = (total - 2 * of_each) / ((m - 1) * (m - 2))
    error = ((m - 1) * without_each.var(unbiased=False)).sqrt()
    return (total / (m * (m - 1))).item(), error.item()
