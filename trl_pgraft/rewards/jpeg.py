# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""Rewards that JPEG gives: how small an image becomes."""

import io
from typing import Any

from PIL import Image

from .functions import register_reward


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
