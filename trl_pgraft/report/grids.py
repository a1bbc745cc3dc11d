# SPDX-License-Identifier: Apache-2.0

"""Grids of images: samples with their captions, and pairs from before and after fine-tuning."""

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from ..pipelines.pixels import to_pil


def before_after_grid(
    before: torch.Tensor,
    after: torch.Tensor,
    labels: Sequence[str],
    columns: int = 8,
    size: int = 128,
    titles: tuple[str, str] = ("base", "tuned"),
) -> Image.Image:
    """
    Pairs of images, the base model's above the tuned model's, with the prompt under each pair.

    Args:
        before, after (`torch.Tensor` of shape `(N, 3, H, W)`, uint8):
            Images of the same prompts and seeds; of videos `(N, F, 3, H, W)` the middle frame is shown.
        labels (`Sequence[str]`):
            `N` prompts; of each, the first 120 characters are written.
        columns (`int`, *optional*, defaults to `8`):
            Pairs in a row.
        size (`int`, *optional*, defaults to `128`):
            Edge of each image in the grid, in pixels.
        titles (`tuple[str, str]`, *optional*, defaults to `("base", "tuned")`):
            Words to the left of the upper and of the lower images.
    """
    gap, margin, text = 4, 56, 46
    rows = -(-len(labels) // columns)
    pair = 2 * size + gap + text
    width = margin + min(columns, len(labels)) * (size + gap)
    grid = Image.new("RGB", (width, rows * pair + gap), "white")
    draw = ImageDraw.Draw(grid)
    for index, images in enumerate(zip(_stills(before), _stills(after), strict=True)):
        x, y = margin + (index % columns) * (size + gap), gap + (index // columns) * pair
        for line, image in enumerate(images):
            grid.paste(image.resize((size, size), Image.LANCZOS), (x, y + line * (size + gap)))
        _write(draw, (x, y + 2 * size + gap + 2), labels[index])
        for line, title in enumerate(titles if index % columns == 0 else ()):
            middle = y + line * (size + gap) + size // 2 - 6
            draw.text((4, middle), title, fill="black", font=ImageFont.load_default(14))
    return grid


def image_grid(
    images: torch.Tensor, captions: Sequence[str], columns: int = 8, size: int = 128, most: int = 64
) -> Image.Image:
    """
    Images row by row, with the caption under each.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`, uint8):
            Images; of videos `(N, F, 3, H, W)` the middle frame is shown.
        captions (`Sequence[str]`):
            `N` captions; of each, the first 120 characters are written.
        columns (`int`, *optional*, defaults to `8`):
            Images in a row.
        size (`int`, *optional*, defaults to `128`):
            Edge of each image in the grid, in pixels.
        most (`int`, *optional*, defaults to `64`):
            Largest number of images in the grid; the rest is left out.
    """
    gap, text = 4, 60
    shown = list(zip(_stills(images[:most]), captions, strict=False))
    columns = min(columns, len(shown))
    grid = Image.new("RGB", (columns * (size + gap) + gap, -(-len(shown) // columns) * (size + text)), "white")
    draw = ImageDraw.Draw(grid)
    for index, (image, caption) in enumerate(shown):
        x, y = gap + (index % columns) * (size + gap), gap + (index // columns) * (size + text)
        grid.paste(image.resize((size, size), Image.LANCZOS), (x, y))
        _write(draw, (x, y + size + 2), caption)
    return grid


def _stills(images: torch.Tensor) -> list[Image.Image]:
    return to_pil(images[:, images.shape[1] // 2] if images.ndim == 5 else images)


def _write(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    """Write text below an image; control characters become spaces, and the end is cut."""
    printable = "".join(c if c.isprintable() else " " for c in text)[:120]
    draw.multiline_text(corner, textwrap.fill(printable, 24), fill="black", font=ImageFont.load_default(10))
