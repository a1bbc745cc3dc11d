# SPDX-License-Identifier: Apache-2.0

"""What a denoiser predicts (epsilon, sample, v, flow velocity), and its targets on re-noised states."""

from typing import NamedTuple

import torch

from .noise_schedules import Level, as_coefficients, expand, transition


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def check_prediction_type(prediction_type: str | None, owner: str = "The denoiser") -> str:
    if prediction_type not in PREDICTION_TYPES:
        known = ", ".join(PREDICTION_TYPES)
        raise ValueError(f"{owner} has prediction_type {prediction_type!r}; supported are {known}.")
    return prediction_type


def combine(
    prediction_type: str,
    x_0: torch.Tensor,
    noise: torch.Tensor,
    alpha: float | torch.Tensor,
    sigma: float | torch.Tensor,
) -> torch.Tensor:
    r"""
    Express a pair (x_0, noise) as what the denoiser predicts at level (alpha, sigma).

    Args:
        prediction_type (`str`):
            One of `PREDICTION_TYPES`: epsilon is `noise`, sample is `x_0`, v is `alpha noise - sigma x_0`, and the
            flow velocity is `noise - x_0`.
        x_0, noise (`torch.Tensor`):
            (B, ...).
        alpha, sigma (`float` or `torch.Tensor`):
            () or (B,).

    Returns:
        `torch.Tensor`: (B, ...).
    """
    match check_prediction_type(prediction_type):
        case "epsilon":
            return noise
        case "sample":
            return x_0
        case "v_prediction":
            return expand(alpha, noise) * noise - expand(sigma, x_0) * x_0
        case _:
            return noise - x_0


def predicted_original(
    prediction_type: str,
    prediction: torch.Tensor,
    x_t: torch.Tensor,
    alpha: float | torch.Tensor,
    sigma: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Recover (x_0, noise) from a prediction at x_t: the inverse of [`combine`] given `x_t = alpha x_0 + sigma noise`.

    Args:
        prediction_type (`str`):
            One of `PREDICTION_TYPES`.
        prediction, x_t (`torch.Tensor`):
            (B, ...).
        alpha, sigma (`float` or `torch.Tensor`):
            () or (B,). An epsilon prediction does not determine x_0 at alpha = 0, nor a sample prediction the noise at
            sigma = 0; the result is then not finite.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: x_0 and noise, each (B, ...).
    """
    alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
    match check_prediction_type(prediction_type):
        case "epsilon":
            return (x_t - sigma * prediction) / alpha, prediction
        case "sample":
            return prediction, (x_t - alpha * prediction) / sigma
        case "v_prediction":
            norm = alpha.square() + sigma.square()
            return (alpha * x_t - sigma * prediction) / norm, (sigma * x_t + alpha * prediction) / norm
        case _:
            return (x_t - sigma * prediction) / (alpha + sigma), (x_t + alpha * prediction) / (alpha + sigma)


class Renoised(NamedTuple):
    """A training example of the denoiser: `x_t` and `target` of shape (B, ...), and the loss's `weight` (B,)."""

    x_t: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor


def renoise(
    x_i: torch.Tensor,
    noise: torch.Tensor,
    level_i: Level,
    level_t: Level,
    prediction_type: str,
) -> Renoised:
    r"""
    Noise intermediate states x_I to t > t_I, and give the denoiser's regression target there (P-GRAFT).

    With `sigma_tI` of the kernel x_t | x_I (see [`transition`]),

        x_t    = (alpha_t / alpha_I) x_I + sigma_tI noise
        noise* = (sigma_t / sigma_tI) noise
        x_0*   = x_I / alpha_I - alpha_t sigma_I^2 / (alpha_I^2 sigma_tI) noise

    and the target is [`combine`] of x_0* and noise*. By Tweedie's formula on x_t | x_I its mean given x_t is the exact
    prediction for the law of x_I noised to t, whatever that law is. The target's variance diverges as t approaches
    t_I, hence the weight `(sigma_tI / sigma_t)^2`, times `alpha_I^2` for all types but epsilon. At the level `CLEAN`
    all of this is the ordinary denoising loss with weight one. Nothing divides by alpha_t, so pure noise (alpha_T = 0)
    is fine.

    Args:
        x_i (`torch.Tensor`):
            (B, ...), states at t_I, in the denoiser's space.
        noise (`torch.Tensor`):
            (B, ...), standard normal.
        level_i (`tuple[float | torch.Tensor, float | torch.Tensor]`):
            (alpha_I, sigma_I), each () or (B,).
        level_t (`tuple[float | torch.Tensor, float | torch.Tensor]`):
            (alpha_t, sigma_t), each () or (B,), noisier than `level_i`.
        prediction_type (`str`):
            One of `PREDICTION_TYPES`.

    Returns:
        [`Renoised`]: `x_t` and `target` in the dtype of `x_i`, and `weight` (B,), at least float32.

    Raises:
        `ValueError`: shapes disagree, some t is not noisier than t_I, or the prediction type is unknown.

    Source: intermediate-state re-noising of P-GRAFT (https://huggingface.co/papers/2510.02692).
    """
    if noise.shape != x_i.shape:
        raise ValueError(f"`noise` must have the shape of `x_i`, {tuple(x_i.shape)}; got {tuple(noise.shape)}.")
    scale, sigma_ti = transition(*level_i, *level_t)
    alpha_i, sigma_i, alpha_t, sigma_t = map(as_coefficients, (*level_i, *level_t))
    x_t = expand(scale, x_i) * x_i + expand(sigma_ti, noise) * noise
    # scale / alpha_I is alpha_t / alpha_I^2: everything that can be small or large meets in float64.
    x_0 = x_i / expand(alpha_i, x_i) - expand(scale * sigma_i.square() / (alpha_i * sigma_ti), noise) * noise
    target = combine(prediction_type, x_0, expand(sigma_t / sigma_ti, noise) * noise, alpha_t, sigma_t)
    weight = (sigma_ti / sigma_t).square() * (1 if prediction_type == "epsilon" else alpha_i.square())
    weight = expand(weight, x_i).flatten().expand(len(x_i))
    return Renoised(x_t.to(x_i.dtype), target.to(x_i.dtype), weight)
