# SPDX-License-Identifier: Apache-2.0

"""Conversions of images between a pipeline's floats in [0, 1], bytes and PIL, and of those that users have."""

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


# Modes of PIL images that have one 8-bit image in RGB, or in RGBA.
CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")


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


def as_image(value: Any, name: str, mode: str = "RGB") -> Any:
    r"""
    The image that a pipeline is handed for what a data set has: upright, 8 bits a channel, and its pixels alone.

    Args:
        value (`Any`):
            A PIL image, an uint8 array (H, W, C) or tensor (C, H, W), an encoded image as bytes, the path of one, or
            `datasets`' dict of both; or a list of these. Anything else, such as floats or embeddings, is returned as
            it is.
        name (`str`):
            Its name, for the error's message.
        mode (`str`, *optional*, defaults to `"RGB"`):
            Mode of the result, `"L"`, `"RGB"` or `"RGBA"`. 16 bits are rounded to 8.

    Returns:
        `PIL.Image.Image`, or `value`: a copy without file name, format and metadata, which is stored without loss.

    Raises:
        `ValueError`: it cannot be read, its values have no known range, or it has transparent pixels.
    """
    if isinstance(value, list) and value and not isinstance(value[0], int | float | list):
        return [as_image(item, name, mode) for item in value]
    if (image := _opened(value, name)) is None:
        if isinstance(value, list) and np.asarray(value).dtype.kind in "iu":
            raise ValueError(
                f"{name}: a list of whole numbers is not taken for an image; make the column one of images."
            )
        return value
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image).astype(np.uint32) / 257).round().astype(np.uint8))
    if image.mode not in CONVERTIBLE:
        raise ValueError(f"{name}: an image has mode {image.mode!r}, whose range is unknown; convert it to L or RGB.")
    if mode != "RGBA" and image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError(
            f"{name}: an image of mode {image.mode!r} has transparent pixels, and what is behind them is unknown. Put "
            "it on a background, for example `Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)`."
        )
    image = ImageOps.exif_transpose(image).convert(mode)
    image.info = {}
    return image


def _opened(value: Any, name: str) -> Image.Image | None:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        value = (value.movedim(0, -1) if value.ndim == 3 else value).cpu().numpy()
    try:
        if isinstance(value, np.ndarray) and value.dtype == np.uint8:
            value = Image.fromarray(value.squeeze(-1) if value.shape[-1] == 1 else value)
        if isinstance(value, bytes | str | os.PathLike):
            value = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        if isinstance(value, Image.Image):
            value.load()
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: an image cannot be read ({error}).") from error
    return value if isinstance(value, Image.Image) else None
