# SPDX-License-Identifier: Apache-2.0

"""What a denoiser predicts (epsilon, sample, v, flow velocity), and its targets on re-noised states."""

from typing import NamedTuple

import torch

from .noise_schedules import Level, as_coefficients, expand, transition


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def check_prediction_type(prediction_type: str | None, owner: str = "The denoiser") -> str:
    r"""
    The prediction type, if it is a known one.

    Args:
        prediction_type (`str` or `None`):
            What the denoiser predicts; one of `PREDICTION_TYPES` passes.
        owner (`str`, *optional*, defaults to `"The denoiser"`):
            Whose prediction type it is, for the error.

    Raises:
        `ValueError`: it is none of them.
    """
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
            (B, ...), clean data and noise.
        alpha, sigma (`float` or `torch.Tensor`):
            () or (B,), the noise level.

    Returns:
        `torch.Tensor`: (B, ...), the prediction.

    Raises:
        `ValueError`: the prediction type is unknown.
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
        prediction (`torch.Tensor`):
            (B, ...), the denoiser's output at x_t.
        x_t (`torch.Tensor`):
            (B, ...), the noisy state.
        alpha, sigma (`float` or `torch.Tensor`):
            () or (B,), the noise level of x_t. An epsilon prediction does not determine x_0 at alpha = 0, nor a sample
            prediction the noise at sigma = 0; the result is then not finite.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: x_0 and noise, each (B, ...).

    Raises:
        `ValueError`: the prediction type is unknown.
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
    """Training examples of the denoiser."""

    x_t: torch.Tensor  # (B, ...), the noised states
    target: torch.Tensor  # (B, ...), what the denoiser should predict at x_t
    weight: torch.Tensor  # (B,), the weight of each example in the loss


def renoise(
    x_i: torch.Tensor,
    noise: torch.Tensor,
    level_i: Level,
    level_t: Level,
    prediction_type: str,
) -> Renoised:
    r"""
    Noise intermediate states x_I to a noisier level t, with the denoiser's regression target there (P-GRAFT).

        sigma_tI^2 = sigma_t^2 - (alpha_t / alpha_I)^2 sigma_I^2
        x_t        = (alpha_t / alpha_I) x_I + sigma_tI noise
        noise*     = (sigma_t / sigma_tI) noise
        x_0*       = x_I / alpha_I - alpha_t sigma_I^2 / (alpha_I^2 sigma_tI) noise

    The target is [`combine`] of x_0* and noise*. By Tweedie's formula on x_t | x_I, its mean given x_t is the exact
    prediction for the states x_I noised to t, whatever their distribution. Its variance diverges as t approaches t_I,
    so the loss has the weight `(sigma_tI / sigma_t)^2`, times `alpha_I^2` for all prediction types but epsilon. At the
    level `CLEAN` this is the ordinary denoising loss with weight one (GRAFT). Nothing divides by alpha_t, so pure
    noise (alpha_T = 0) is allowed.

    Args:
        x_i (`torch.Tensor`):
            (B, ...), states at t_I, as the denoiser takes them.
        noise (`torch.Tensor`):
            (B, ...), standard normal.
        level_i (`tuple[float | torch.Tensor, float | torch.Tensor]`):
            The noise level (alpha_I, sigma_I) of the states, each () or (B,).
        level_t (`tuple[float | torch.Tensor, float | torch.Tensor]`):
            The noise level (alpha_t, sigma_t) of x_t, each () or (B,), noisier than `level_i`.
        prediction_type (`str`):
            What the denoiser predicts: `"epsilon"`, `"sample"`, `"v_prediction"` or `"flow_prediction"`.

    Returns:
        [`Renoised`]: `x_t` (B, ...) and `target` (B, ...) in the dtype of `x_i`, and `weight` (B,), at least float32.

    Raises:
        `ValueError`: shapes disagree, some t is not noisier than t_I, or the prediction type is unknown.

    Source: training on intermediate states, P-GRAFT, arXiv 2510.02692 (https://huggingface.co/papers/2510.02692).
    """
    if noise.shape != x_i.shape:
        raise ValueError(f"`noise` must have the shape of `x_i`, {tuple(x_i.shape)}; got {tuple(noise.shape)}.")
    scale, sigma_ti = transition(*level_i, *level_t)
    alpha_i, sigma_i, alpha_t, sigma_t = map(as_coefficients, (*level_i, *level_t))
    x_t = expand(scale, x_i) * x_i + expand(sigma_ti, noise) * noise
    # scale / alpha_I is alpha_t / alpha_I^2: all small and large factors are multiplied in float64.
    x_0 = x_i / expand(alpha_i, x_i) - expand(scale * sigma_i.square() / (alpha_i * sigma_ti), noise) * noise
    target = combine(prediction_type, x_0, expand(sigma_t / sigma_ti, noise) * noise, alpha_t, sigma_t)
    weight = (sigma_ti / sigma_t).square() * (1 if prediction_type == "epsilon" else alpha_i.square())
    weight = expand(weight, x_i).flatten().expand(len(x_i))
    return Renoised(x_t.to(x_i.dtype), target.to(x_i.dtype), weight)
