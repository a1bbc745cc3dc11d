# SPDX-License-Identifier: Apache-2.0

"""The loss, and what guidance does to predictions and targets."""

import torch


def weighted_mse(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    r"""
    Squared error of each sample, averaged over its elements and weighted; the caller reduces over the batch.

    Args:
        prediction, target (`torch.Tensor`):
            (B, ...), what the denoiser predicts and should predict.
        weight (`torch.Tensor`):
            (B,), the weight of each sample.

    Returns:
        `torch.Tensor`: (B,), float32, one loss a sample.

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
    r"""
    Classifier-free guidance: `u + w (c - u)`.

    Args:
        unconditional (`torch.Tensor`):
            (B, ...), the prediction u without the prompt.
        conditional (`torch.Tensor`):
            (B, ...), the prediction c with the prompt.
        guidance_scale (`float`):
            w; 1 is no guidance.

    Returns:
        `torch.Tensor`: (B, ...).

    Source: "Classifier-Free Diffusion Guidance" (https://huggingface.co/papers/2207.12598).
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def corrected_target(target: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    r"""
    The target for the conditional branch which makes the *guided* prediction meet `target`: `u + (target - u) / w`.

    States sampled with guidance come from the guided field. Training the conditional branch on them and guiding it
    again would apply guidance twice; this solves `guided(u, c, w) = target` for c instead.

    Args:
        target (`torch.Tensor`):
            (B, ...), the target for the guided prediction.
        unconditional (`torch.Tensor`):
            (B, ...), the reference model's unconditional prediction u, without gradient.
        guidance_scale (`float`):
            The guidance w that the states were sampled with; not 0.

    Returns:
        `torch.Tensor`: (B, ...), the target for the conditional prediction c.

    Raises:
        `ValueError`: `guidance_scale` is 0, where the conditional branch has no influence.
    """
    if guidance_scale == 0:
        raise ValueError("guidance_scale is 0: the conditional branch has no influence, so it has no target.")
    return unconditional + (target - unconditional) / guidance_scale
