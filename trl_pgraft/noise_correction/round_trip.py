# SPDX-License-Identifier: Apache-2.0

"""Sample from known noise and invert: whether the inversion finds the noise, which a small residual does not prove."""

import math
import warnings
from typing import Any

import torch

from ..core.seeding import noise_of
from .config import NoiseCorrectionConfig
from .flow_sampler import FlowSampler
from .inversion import invert


@torch.no_grad()
def round_trip(
    sampler: FlowSampler, steps: int, batch: dict[str, list[Any]], config: NoiseCorrectionConfig
) -> dict[str, float]:
    """
    Run the first steps of a sampler from known noise, invert them, and compare.

    Args:
        sampler ([`FlowSampler`]):
            The sampler that is inverted.
        steps (`int`):
            Number of its steps that are inverted.
        batch (`dict`):
            Rows of the data set, as many as there are to be samples, whose prompts are taken.
        config ([`NoiseCorrectionConfig`]):
            Tolerance, bound and seed of the inversion.

    Returns:
        `dict[str, float]`: the number of `samples`; of these `left_out`, which did not converge; and of the others
            `relative_error`, the norm of what the noise found differs by over that of the noise, `largest_error`, that
            of the worst sample, and `largest_residual`, as of the data.
    """
    count = len(next(iter(batch.values())))
    prompts = list(batch.get("prompt", [""] * count))
    noise = torch.stack([noise_of(sampler.like.shape[1:], config.seed, "round trip", row) for row in range(count)])
    velocity, rows = sampler.velocity(sampler.record(prompts)), torch.arange(len(noise))
    x = noise.to(sampler.like.device)
    for step, size in enumerate(sampler.steps[:steps]):
        x = x + size * velocity(x, step, rows)
    found, rows = invert(
        velocity, sampler.steps[:steps], x, config.tolerance, config.max_iterations, leave_out=lambda error: None
    )
    report: dict[str, float] = {"samples": len(noise), "left_out": len(noise) - len(rows)}
    if not len(rows):
        return report
    off = (found.noise.cpu() - noise[rows]).flatten(1).norm(dim=1).double()
    norms = noise[rows].flatten(1).norm(dim=1).double()
    return report | {
        "relative_error": (off.norm() / norms.norm()).item(),
        "largest_error": (off / norms).max().item(),
        "largest_residual": found.residuals.sum(0).max().item(),
    }


def said_of(found: dict[str, float], tolerance: float) -> str:
    """
    A round trip in words, with a warning where the inversion did not find the known noise.

    Args:
        found (`dict[str, float]`):
            What [`round_trip`] returned.
        tolerance (`float`):
            The inversion's; an error of ten times as much is warned of.
    """
    error, residual = found.get("relative_error", math.inf), found.get("largest_residual", math.inf)
    said = (
        f"Round trip: of {found['samples']} samples of known noise {found['left_out']} could not be inverted; the "
        f"noise of the others was found to a relative error of {error:.2g}, with residuals of at most {residual:.2g}."
    )
    if found["left_out"] or error > 10 * tolerance:
        warnings.warn(
            f"{said} The inverse is not unique or not stable here, so the noise of the data may be another than what "
            "is found. Use more sampling steps, a higher lowest_sigma or a smaller tolerance.",
            stacklevel=4,
        )
    return said
