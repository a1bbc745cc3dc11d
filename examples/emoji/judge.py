# SPDX-License-Identifier: Apache-2.0

"""
A second judge of emoji scenes, which no method trains on: a vision transformer that learned more styles of emoji from
another seed. Where the verifier's score rises and the judge's does not, the verifier was fooled.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from examples.emoji.scenes import ALL_STYLES, BACKGROUNDS, CANVAS, FOLDER, NOUNS, Spec
from examples.emoji.verifier import Detection, image_tensor, is_right, read_specs


PATCH = 4  # pixels per side of a token's cell
GRID = CANVAS // PATCH
NONE = len(NOUNS)  # the class of a cell that holds no object's centre
OTHER = len(BACKGROUNDS)  # the class of a background of no named colour
THRESHOLD = 0.5  # confidence from which a cell holds an object
SAME = 6.0  # pixels, along each axis, within which two centres of one noun are one object seen from two cells


class View(NamedTuple):
    """
    What the judge sees in B images, as logits unless said otherwise.

    Args:
        nouns (`torch.Tensor`): (B, 16, 16, nouns + 1) the noun with its centre in each cell, `NONE` last.
        offsets (`torch.Tensor`): (B, 16, 16, 2) that centre's (x, y) from the cell's middle, in cells.
        background (`torch.Tensor`): (B, backgrounds + 1), `OTHER` last.
        contents (`torch.Tensor`): (B, nouns + styles) whether each noun and each style is there. It serves training
            alone: the image features must then hold what the image shows.
    """

    nouns: torch.Tensor
    offsets: torch.Tensor
    background: torch.Tensor
    contents: torch.Tensor


def _positions(width: int) -> torch.Tensor:
    """Sines and cosines of each cell's row and column, (cells, width): where learning starts."""
    frequency = 100 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(GRID)[:, None] * frequency
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat_interleave(GRID, 0), waves.repeat(GRID, 1)], dim=1)


class Judge(nn.Module):
    """
    Tells whether an image shows what its prompt asks for, as [`Verifier`] does, by other means: a vision transformer
    (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021) of 1.2 M parameters. Load a trained one with
    [`Judge.load`].

    Args:
        width (`int`, *optional*, defaults to `128`): channels of a token, and of the image features.
        depth (`int`, *optional*, defaults to `6`): transformer layers.
        heads (`int`, *optional*, defaults to `4`): attention heads in each.
    """

    def __init__(self, width: int = 128, depth: int = 6, heads: int = 4):
        super().__init__()
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(width, heads, 4 * width, **options) for _ in range(depth)]
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.5 * _positions(width))
        self.encoder = nn.Sequential(*layers, nn.LayerNorm(width))
        self.cells = nn.Linear(width, NONE + 1 + 2)
        nn.init.constant_(self.cells.bias[NONE], 5.0)
        self.whole = nn.Linear(width, OTHER + 1 + len(NOUNS) + len(ALL_STYLES))

    @classmethod
    def load(cls, folder: str | Path = FOLDER / "judge") -> "Judge":
        """Read a trained judge from a folder with `judge.safetensors`."""
        path = Path(folder) / "judge.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: train it with `python -m examples.emoji.train_judge --work {folder}`.")
        judge, weights = cls(), load_file(path)
        judge.load_state_dict({name: value.float() for name, value in weights.items()})
        return judge.eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write `judge.safetensors`, in half precision."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: value.half().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, Path(folder) / "judge.safetensors")

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, 64, 64) in [0, 1] -> tokens (B, 256, width), row by row."""
        patches = self.patches(4 * (images - 0.5)).flatten(2).mT
        return self.encoder(patches + self.positions)

    def forward(self, images: torch.Tensor) -> View:
        """What is seen in images (B, 3, 64, 64) in [0, 1]."""
        tokens = self.tokens(images)
        nouns, offsets = self.cells(tokens).unflatten(1, (GRID, GRID)).split([NONE + 1, 2], dim=-1)
        background, contents = self.whole(tokens.mean(1)).tensor_split([OTHER + 1], dim=1)
        return View(nouns, offsets, background, contents)

    @torch.no_grad()
    def features(self, images) -> torch.Tensor:
        """Image features (B, width), float32, e.g. for a Fréchet distance. `images` as in `score`."""
        return self.tokens(self._tensor(images)).mean(1).float()

    @torch.no_grad()
    def see(self, images) -> list[tuple[list[Detection], str | None]]:
        """The objects in each image, surest first, and its background's name, if it has one."""
        view = self(self._tensor(images))
        colors = [*BACKGROUNDS, None]
        backgrounds = [colors[index] for index in view.background.argmax(1).tolist()]
        return list(zip(map(distinct, find_objects(view)), backgrounds, strict=True))

    def score(self, images, prompts: list[str | Spec]) -> list[float]:
        """
        1.0 where an image shows exactly what is asked for (no object more or less), else 0.0.

        Args:
            images (`list[PIL.Image.Image]` or `torch.Tensor`): images, or (B, 3, 64, 64) in [0, 1].
            prompts (`list[str | Spec]`): one caption, or its `Spec`, per image.
        """
        specs = read_specs(images, prompts)
        return [float(is_right(*seen, spec)) for seen, spec in zip(self.see(images), specs, strict=True)]

    def _tensor(self, images) -> torch.Tensor:
        return image_tensor(images).to(self.positions.device)


def find_objects(view: View) -> list[list[Detection]]:
    """The objects of each image, one for each cell that claims a centre."""
    confidence, noun = view.nouns.float().softmax(-1)[..., :NONE].max(-1)
    rows, ys, xs = torch.nonzero(confidence >= THRESHOLD, as_tuple=True)
    centres = (torch.stack([xs, ys], 1) + 0.5 + view.offsets.float()[rows, ys, xs]) * PATCH
    found: list[list[Detection]] = [[] for _ in confidence]
    values = (rows, noun[rows, ys, xs], confidence[rows, ys, xs], centres)
    for row, index, sure, centre in zip(*(value.tolist() for value in values), strict=True):
        found[row].append(Detection(NOUNS[index], sure, *centre))
    return found


def distinct(detections: list[Detection]) -> list[Detection]:
    """Surest first; of those of one noun less than `SAME` pixels apart, which neighbouring cells claim, the surest."""
    kept: list[Detection] = []
    for new in sorted(detections, key=lambda d: -d.confidence):
        if all(new.noun != old.noun or max(abs(new.x - old.x), abs(new.y - old.y)) >= SAME for old in kept):
            kept.append(new)
    return kept


@functools.cache
def _judge() -> Judge:
    return Judge.load()


def emoji_judge_score(*, prompts: list[str], images: list, **columns) -> list[float]:
    """[`Judge.score`] of the committed judge, called as a reward is: to watch, not to train on."""
    return _judge().score(images, prompts)
