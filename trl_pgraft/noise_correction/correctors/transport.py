# SPDX-License-Identifier: Apache-2.0

"""The mathematics of a trained corrector: a short flow from N(0, I) to the noise that an exact inverse gives to data.

The path is the variance-preserving one, `x_c = c y + sqrt(1 - c^2) eps`, of inverted noise y at signal level c. Its
velocity `dx/dc = E[u | x_c] / sqrt(1 - c^2)`, with `u = sqrt(1 - c^2) y - c eps`, is zero where y is standard normal.
Inverted noise nearly is, so what is learned is small and an untrained corrector changes nothing. The velocity's
response to a mean or a covariance is linear in c, so one step at the midpoint c = 1/2 gives both to first order. The
straight path between independent y and eps has a large velocity for standard normal y too, and one Euler step on it
ends in the mean of y.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from ...core.noise_schedules import expand
from ...pipelines.denoiser_call import DenoiserCall


TIMESTEPS = 1000


def perturb(y: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    States and targets of the corrector's loss: `x_c = c y + sqrt(1 - c^2) eps` and `u = sqrt(1 - c^2) y - c eps`.

    Args:
        y (`torch.Tensor` of shape `(B, ...)`):
            Inverted noise.
        noise (`torch.Tensor` of shape `(B, ...)`):
            Standard normal noise eps.
        signal (`torch.Tensor` of shape `(B,)`):
            Signal levels c in [0, 1).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: x_c and u, both of the shape of `y`.
    """
    c, s = expand(signal, y), expand((1 - signal.double().square()).sqrt(), y)
    return c * y + s * noise, s * y - c * noise


def transport(
    predict: Callable[..., torch.Tensor],
    noise: torch.Tensor,
    call: DenoiserCall,
    conditioning: dict[str, Any],
    steps: int,
) -> torch.Tensor:
    """
    Carry standard normal noise to noise of the inverted kind: the `correct` method of the trained correctors.

    The steps of c are equal, and the velocity is evaluated at their midpoints.

    Args:
        predict (`Callable`):
            A trained corrector: maps `(x, signal, call, conditioning)` to `E[u | x_c]`, see
            [`~network.NetworkCorrector.__call__`].
        noise (`torch.Tensor` of shape `(B, ...)`):
            Standard normal noise, in the layout of the denoiser's latents.
        call ([`DenoiserCall`]):
            How the pipeline calls its denoiser.
        conditioning (`dict`):
            Arguments of that call for the samples' prompts, `B` rows.
        steps (`int`):
            Number of steps; 0 leaves the noise as it is.

    Returns:
        `torch.Tensor` of the shape and dtype of `noise`.
    """
    x = noise.float()
    with torch.no_grad():
        for step in range(steps):
            c = (step + 0.5) / steps
            u = predict(x, torch.full((len(x),), c, dtype=torch.float64), call, conditioning)
            x = x + u / (math.sqrt(1 - c**2) * steps)
    return x.to(noise.dtype)
