# SPDX-License-Identifier: Apache-2.0

"""Samples with their images, states and rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .prompts import Sample, columns_of


@dataclass
class Drawn:
    """
    What was drawn for some samples, in their order.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`, uint8):
            Final images; of a video pipeline `(N, F, 3, H, W)`.
        x_i (`torch.Tensor` of shape `(N, ...)`, float32):
            Recorded states, as the denoiser sees them.
        denoiser_calls (`int`):
            Denoiser evaluations, counted per image and branch.
    """

    images: torch.Tensor
    x_i: torch.Tensor
    denoiser_calls: int


@dataclass(frozen=True)
class Batch:
    """
    Some samples with what was drawn for them and their rewards.

    Args:
        samples (`Sequence[Sample]`):
            `B` samples.
        drawn ([`Drawn`]):
            Their images and states.
        values (`torch.Tensor` of shape `(B, F)`):
            Value of each reward, NaN where left out.
        infos (`list`):
            What each reward said beside its values; empty for a batch that was scored before an interruption.
    """

    samples: Sequence[Sample]
    drawn: Drawn
    values: torch.Tensor
    infos: list[Any]

    @property
    def prompts(self) -> list[str]:
        """The samples' prompts."""
        return [sample.group.prompt for sample in self.samples]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Further columns of the samples' prompts, as lists."""
        return columns_of(self.samples)


def collate(samples: Sequence[Sample], batches: Sequence[Batch]) -> tuple[Drawn, torch.Tensor]:
    """What was drawn in the order of `samples`, and the values of shape `(N, F)`."""
    place = {sample.seed: row for row, sample in enumerate(s for batch in batches for s in batch.samples)}
    order = torch.tensor([place[sample.seed] for sample in samples])
    images, states = (torch.cat([getattr(b.drawn, name) for b in batches])[order] for name in ("images", "x_i"))
    drawn = Drawn(images, states, sum(batch.drawn.denoiser_calls for batch in batches))
    return drawn, torch.cat([batch.values for batch in batches])[order]
