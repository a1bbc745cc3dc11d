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


"""Pictures: a grid of images before and after fine-tuning, and the curves by which t_I is chosen."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont

from .rewards.functions import to_pil


if TYPE_CHECKING:
    from .diagnostics import IntermediateStep


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
            Images of the same prompts and seeds.
        labels (`Sequence[str]`):
            `N` prompts.
        columns (`int`, *optional*, defaults to `8`):
            Pairs in a row.
        size (`int`, *optional*, defaults to `128`):
            Edge of a drawn image in pixels.
        titles (`tuple[str, str]`, *optional*, defaults to `("base", "tuned")`):
            What stands to the left of the upper and of the lower images.
    """
    gap, margin, text = 4, 56, 46
    rows = -(-len(labels) // columns)
    pair = 2 * size + gap + text
    width = margin + min(columns, len(labels)) * (size + gap)
    grid = Image.new("RGB", (width, rows * pair + gap), "white")
    draw = ImageDraw.Draw(grid)
    for index, images in enumerate(zip(to_pil(before), to_pil(after), strict=True)):
        x, y = margin + (index % columns) * (size + gap), gap + (index // columns) * pair
        for line, image in enumerate(images):
            grid.paste(image.resize((size, size), Image.LANCZOS), (x, y + line * (size + gap)))
        # Prompts are shown, not interpreted: control characters become spaces, long ones are cut.
        printable = "".join(c if c.isprintable() else " " for c in labels[index])[:120]
        below = (x, y + 2 * size + gap + 2)
        draw.multiline_text(below, textwrap.fill(printable, 24), fill="black", font=ImageFont.load_default(10))
        for line, title in enumerate(titles if index % columns == 0 else ()):
            middle = y + line * (size + gap) + size // 2 - 6
            draw.text((4, middle), title, fill="black", font=ImageFont.load_default(14))
    return grid


def draw_choice(result: "IntermediateStep", path: str | Path) -> None:
    """
    Draw the curves of a choice and the proposal to an image file.

    Args:
        result ([`IntermediateStep`]):
            From [`choose_intermediate_step`].
        path (`str` or `Path`):
            File to write; its suffix is the format.
    """
    from matplotlib.figure import Figure

    rows = result.curves
    x = [row["fraction"] for row in rows]

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(x, column("readable"), "o--", color="tab:gray", label="readable (rank correlation)")
    left.plot(x, column("information"), "o-", color="tab:blue", label="information")
    left.plot(x, column("score"), "s-", color="tab:green", label="score")
    if result.stochastic:
        left.plot(x, column("reward_variance"), "o:", color="tab:purple", label="reward variance given $x_I$, share")
    left.axhline(0, color="black", linewidth=0.5)
    left.set(title="What $x_I$ holds of the reward", xlabel="tuned fraction", ylabel="share")
    right.errorbar(x, column("refit"), column("refit_error"), fmt="o-", color="tab:red", label="refit: all states")
    selection = column("selection"), column("selection_error")
    right.errorbar(x, *selection, fmt="o-", color="tab:orange", label="selection: accepted less all")
    right.set(title="What a fit must learn", xlabel="tuned fraction", ylabel="squared mean gradient x steps")
    loss = right.twinx()
    loss.plot(x, column("difficulty"), "x--", color="tab:brown", label="loss, accepted (right)")
    loss.plot(x, column("difficulty_all"), "+:", color="tab:gray", label="loss, all (right)")
    loss.set(ylabel="weighted loss of the reference", ylim=(0, None))
    for axes in (left, right):
        axes.axvline(result.fraction, color="tab:green", alpha=0.4, label=f"proposal {result.fraction:g}")
    left.legend(fontsize="small")
    (handles, labels), further = right.get_legend_handles_labels(), loss.get_legend_handles_labels()
    right.legend(handles + further[0], labels + further[1], fontsize="small")
    figure.savefig(path, dpi=120)
