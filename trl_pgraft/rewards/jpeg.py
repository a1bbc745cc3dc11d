# SPDX-License-Identifier: Apache-2.0

"""A reward of how small an image becomes as a JPEG."""

import io
from typing import Any

from PIL import Image

from .registry import register_reward


@register_reward("jpeg_compressibility")
def jpeg_compressibility(*, images: list[Image.Image], **columns: Any) -> list[float]:
    r"""
    Minus the size of each image as a JPEG of quality 95: the reward of DDPO's compressibility task.

    Args:
        images (`list[PIL.Image.Image]`):
            B images of any size and mode; they are converted to RGB.
        columns (`Any`):
            Prompts and further columns of the data set, which are not used.

    Returns:
        `list[float]`: B rewards in kilobytes (1,000 bytes), below zero; larger for simpler images.

    Source: "Training Diffusion Models with Reinforcement Learning" (https://huggingface.co/papers/2305.13301).
    """
    return [-_jpeg_kilobytes(image) for image in images]


def _jpeg_kilobytes(image: Image.Image) -> float:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.tell() / 1000
