# SPDX-License-Identifier: Apache-2.0

"""Grids of images: samples with their captions, and pairs from before and after fine-tuning."""

import textwrap
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from ..pipelines.pixels import to_pil


GAP = 4


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
    grid, corners = _make_grid(
        [_stills(before), _stills(after)], labels, columns, size, margin=56, text=42, bottom=GAP
    )
    draw = ImageDraw.Draw(grid)
    for _, y in corners[::columns]:
        for line, title in enumerate(titles):
            middle = y + line * (size + GAP) + size // 2 - 6
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
    shown = images[: min(most, len(captions))]
    grid, _ = _make_grid([_stills(shown)], captions[: len(shown)], columns, size, margin=GAP, text=56, bottom=0)
    return grid


def _make_grid(
    lines: Sequence[list[Image.Image]],
    captions: Sequence[str],
    columns: int,
    size: int,
    margin: int,
    text: int,
    bottom: int,
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Stacks of images, one of each of `lines`, row by row with captions below; and the stacks' upper left corners."""
    height = len(lines) * (size + GAP) + text
    columns = min(columns, len(captions))
    corners = [(margin + i % columns * (size + GAP), GAP + i // columns * height) for i in range(len(captions))]
    extent = (margin + columns * (size + GAP), -(-len(captions) // columns) * height + bottom)
    grid = Image.new("RGB", extent, "white")
    draw = ImageDraw.Draw(grid)
    for (x, y), stack, caption in zip(corners, zip(*lines, strict=True), captions, strict=True):
        for line, image in enumerate(stack):
            grid.paste(image.resize((size, size), Image.Resampling.LANCZOS), (x, y + line * (size + GAP)))
        # The caption is shown, not interpreted: control characters become spaces, and the end is cut.
        printable = textwrap.fill("".join(c if c.isprintable() else " " for c in caption)[:120], 24)
        below = (x, y + len(lines) * (size + GAP) - GAP + 2)
        draw.multiline_text(below, printable, fill="black", font=ImageFont.load_default(10))
    return grid, corners


def _stills(images: torch.Tensor) -> list[Image.Image]:
    return to_pil(images[:, images.shape[1] // 2] if images.ndim == 5 else images)
