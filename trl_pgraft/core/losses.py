# SPDX-License-Identifier: Apache-2.0

"""The one loss, and what guidance does to predictions and targets."""

import torch


def weighted_mse(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    r"""
    Squared error of each sample, averaged over its elements and weighted; the caller reduces over the batch.

    Args:
        prediction, target (`torch.Tensor`):
            (B, ...), of equal shape.
        weight (`torch.Tensor`):
            (B,).

    Returns:
        `torch.Tensor`: (B,), float32.

    Raises:
        `ValueError`: the shapes disagree.
    """
    if prediction.shape != target.shape or weight.shape != prediction.shape[:1]:
        raise ValueError(
            "Expected prediction and target of one shape (B, ...) and a weight (B,); got "
            f"{tuple(prediction.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}."
        )
    error = (prediction.float() - target.float()).square()
    return weight.float() * error.reshape(len(error), -1).mean(1)


def guided(unconditional: torch.Tensor, conditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance `u + w (c - u)` of two predictions of equal shape; `guidance_scale` w = 1 is none."""
    return unconditional + guidance_scale * (conditional - unconditional)


def corrected_target(target: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    r"""
    The target for the conditional branch which makes the *guided* prediction meet `target`: `u + (target - u) / w`.

    States sampled with guidance follow a law that the guided field produces. Fitting the conditional branch to them
    and guiding it again would apply guidance twice; this solves `guided(u, c, w) = target` for c instead.

    Args:
        target (`torch.Tensor`):
            (B, ...), the target for the guided prediction.
        unconditional (`torch.Tensor`):
            (B, ...), the reference model's unconditional prediction u, without gradient.
        guidance_scale (`float`):
            The guidance w the states were sampled with; not 0.

    Returns:
        `torch.Tensor`: (B, ...).

    Raises:
        `ValueError`: `guidance_scale` is 0, where the conditional branch has no say.
    """
    if guidance_scale == 0:
        raise ValueError("guidance_scale is 0: the conditional branch has no influence, so it has no target.")
    return unconditional + (target - unconditional) / guidance_scale
