# SPDX-License-Identifier: Apache-2.0

"""Rewards that JPEG gives: how small an image becomes."""

import io
from typing import Any

from PIL import Image

from .registry import register_reward


@register_reward("jpeg_compressibility")
def jpeg_compressibility(*, images: list[Image.Image], **columns: Any) -> list[float]:
    """
    Minus the size in kilobytes of each image as a JPEG of quality 95: the reward of DDPO's compressibility task.

    Args:
        images (`list[PIL.Image.Image]`):
            The images.

    Returns:
        `list[float]`: one value an image, larger for simpler images.

    Source: "Training Diffusion Models with Reinforcement Learning" (https://huggingface.co/papers/2305.13301).
    """
    return [-_jpeg_kilobytes(image) for image in images]


def _jpeg_kilobytes(image: Image.Image) -> float:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
