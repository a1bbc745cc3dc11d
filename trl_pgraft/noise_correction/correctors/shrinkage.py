# SPDX-License-Identifier: Apache-2.0

"""What the Gaussians of inverted noise share: reading noise in parts, and telling deviations from chance."""

from collections.abc import Iterator

import torch


VALUES_IN_MEMORY = 2**25  # float32, 128 MiB
# Of any direction, so that elements which are the same in all samples leave a map that has an inverse.
LEAST_VARIANCE = 1e-4


def in_parts(noise: torch.Tensor, device: torch.device) -> Iterator[torch.Tensor]:
    """Rows of noise of shape `(N, ...)` as float32 on a device, as many at a time as fit into little memory."""
    for part in noise.split(max(1, VALUES_IN_MEMORY // noise[0].numel())):
        yield part.to(device, torch.float32)


def beyond_chance(squares: torch.Tensor, chance: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """
    Share of estimated deviations that is kept: 1 minus the part of their squares that chance explains, at least 0.

    This is the positive-part estimator of James and Stein (1961), applied to each group of deviations for itself.

    Args:
        squares (`torch.Tensor` of shape `(n,)`):
            Squares of the estimated deviations from what they are shrunk to.
        chance (`torch.Tensor` of shape `(n,)`):
            Mean squares of the errors of the estimates.
        groups (`torch.Tensor` of shape `(n,)`, int64):
            Number of the group that each deviation belongs to.

    Returns:
        `torch.Tensor` of shape `(n,)`, in [0, 1].
    """
    of_squares, of_chance = summed(squares, groups), summed(chance, groups)
    return (1 - of_chance / of_squares.clamp(min=1e-300)).clamp(0, 1)[groups]


def summed(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sums of values of shape `(n, ...)` over the groups of their rows."""
    return values.new_zeros(int(groups.max()) + 1, *values.shape[1:]).index_add(0, groups, values)
