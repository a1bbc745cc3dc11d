# SPDX-License-Identifier: Apache-2.0

"""Conversions of images between a pipeline's floats in [0, 1], bytes and PIL."""

from typing import Any

import torch
from PIL import Image


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    r"""
    Bytes of a pipeline's images, on the same device.

    Args:
        images (`torch.Tensor`):
            Of any shape, in [0, 1], rounded to the nearest of 256 levels; values outside are clamped.

    Raises:
        `ValueError`: a value is not finite.
    """
    if not images.isfinite().all():
        raise ValueError("The pipeline returned images with non-finite values; sample in a higher precision.")
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """The float32 images in [0, 1] of uint8 `images` of any shape."""
    return images.float() / 255


def to_pil(images: torch.Tensor) -> list[Any]:
    r"""
    PIL images of a tensor of pixels.

    Args:
        images (`torch.Tensor`):
            uint8, images (B, 3, H, W) or (B, 1, H, W), or videos (B, F, 3, H, W).

    Returns:
        `list[PIL.Image.Image]`: B images in RGB; for videos B lists of F frames.
    """
    if images.ndim == 5:
        return [to_pil(video) for video in images]
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    return [Image.fromarray(array) for array in images.permute(0, 2, 3, 1).contiguous().cpu().numpy()]
