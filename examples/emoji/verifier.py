# SPDX-License-Identifier: Apache-2.0

"""
A verifier of emoji scenes in GenEval's manner: an object detector (CenterNet: one peak of a heatmap per object), and
rules on nouns, counts, relations and background colour. The prompt text alone says what is asked for.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from examples.emoji.scenes import BACKGROUNDS, CANVAS, FOLDER, NOUNS, Spec, parse_prompt


STRIDE = 4  # pixels per cell of the heatmap
THRESHOLD = 0.35  # confidence from which a peak is an object
FAINTEST = 0.03  # confidence below which a peak is not looked at
# Softness of the soft score: pixels of a relation's margin, and distance between colours (RGB in [0, 1]).
MARGIN_SCALE, COLOR_SCALE = 3.0, 0.05
COLOR_TOLERANCE = 0.12


@dataclass(frozen=True)
class Detection:
    """One object found: its noun, the confidence in [0, 1], and its centre (x, y) in pixels."""

    noun: str
    confidence: float
    x: float
    y: float


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Detector(nn.Module):
    """
    Centre-heatmap detector (Zhou et al., "Objects as Points", 2019).

    Args:
        width (`int`, *optional*, defaults to `32`): channels at half resolution; four times as many at a quarter.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        wide = 4 * width
        self.stem = nn.Sequential(_convolution(3, width, 2), _convolution(width, width))
        self.first = _convolution(width, wide, 2)
        self.body = nn.ModuleList(nn.Sequential(_convolution(wide, wide), _convolution(wide, wide)) for _ in range(3))
        self.below = nn.Sequential(_convolution(wide, wide, 2), _convolution(wide, wide), nn.Upsample(scale_factor=2))
        self.head = nn.Conv2d(wide, len(NOUNS) + 2, 1)
        nn.init.constant_(self.head.bias, -3.0)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, 64, 64) in [0, 1] -> heatmap logits (B, nouns, 16, 16), offsets in cells (B, 2, 16, 16)."""
        x = self.first(self.stem(images - 0.5))
        for index, block in enumerate(self.body):
            x = x + block(x)
            x = x + self.below(x) if index == 0 else x
        return self.head(x).split([len(NOUNS), 2], dim=1)


class Verifier(nn.Module):
    """Tells whether an image shows what its prompt asks for. Load a trained one with [`Verifier.load`]."""

    def __init__(self):
        super().__init__()
        self.detector = Detector()
        self.register_buffer("colors", torch.tensor(list(BACKGROUNDS.values())) / 255, persistent=False)

    @classmethod
    def load(cls, folder: str | Path = FOLDER / "verifier") -> "Verifier":
        """Read a trained verifier from a folder with `detector.safetensors`."""
        verifier = cls()
        weights = load_file(Path(folder) / "detector.safetensors")
        verifier.detector.load_state_dict({name: value.float() for name, value in weights.items()})
        return verifier.eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write `detector.safetensors`, in half precision."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        weights = {name: value.half().cpu().contiguous() for name, value in self.detector.state_dict().items()}
        save_file(weights, Path(folder) / "detector.safetensors")

    @torch.no_grad()
    def detect(self, images) -> list[list[Detection]]:
        """The objects in each image, surest first; of overlapping ones only the surest. `images` as in `score`."""
        logits, offsets = self.detector(self._tensor(images))
        confidence, noun = logits.float().sigmoid().max(dim=1)
        peak = nn.functional.max_pool2d(confidence, 5, stride=1, padding=2) == confidence
        found: list[list[Detection]] = [[] for _ in confidence]
        rows, ys, xs = torch.nonzero(peak & (confidence > FAINTEST), as_tuple=True)
        values = confidence[rows, ys, xs].tolist(), noun[rows, ys, xs].tolist()
        centres = (torch.stack([xs, ys]) + offsets.float()[rows, :, ys, xs].T) * STRIDE
        for row, sure, index, x, y in zip(rows.tolist(), *values, *centres.tolist(), strict=True):
            found[row].append(Detection(NOUNS[index], sure, x, y))
        return [sorted(detections, key=lambda d: -d.confidence) for detections in found]

    @torch.no_grad()
    def background_distances(self, images) -> list[dict[str, float]]:
        """Distance (RGB in [0, 1]) from each image's median border colour to each named colour."""
        images = self._tensor(images)
        rim = torch.cat([images[:, :, :2].flatten(2), images[:, :, -2:].flatten(2), images[:, :, :, :2].flatten(2),
                         images[:, :, :, -2:].flatten(2)], dim=2)  # fmt: skip
        distances = (rim.median(dim=2).values[:, None] - self.colors).norm(dim=-1)
        return [dict(zip(BACKGROUNDS, row, strict=True)) for row in distances.tolist()]

    def score(self, images, prompts: list[str | Spec]) -> list[float]:
        """
        1.0 where an image shows exactly what is asked for (no object more or less), else 0.0.

        Args:
            images (`list[PIL.Image.Image]` or `torch.Tensor`): images, or (B, 3, 64, 64) in [0, 1].
            prompts (`list[str | Spec]`): one caption, or its `Spec`, per image.
        """
        return [
            float(is_right([d for d in detections if d.confidence >= THRESHOLD], _color_name(distances), spec))
            for detections, distances, spec in self._cases(images, prompts)
        ]

    def soft_score(self, images, prompts: list[str | Spec]) -> list[float]:
        """
        How far an image shows what is asked for, in [0, 1]: the cube root of the product of the probabilities that
        each object is there, that no other is, and that relation and background hold. Takes what `score` takes.
        """
        return [_softly_right(*case) for case in self._cases(images, prompts)]

    def _cases(self, images, prompts):
        images, specs = self._tensor(images), read_specs(images, prompts)
        return zip(self.detect(images), self.background_distances(images), specs, strict=True)

    def _tensor(self, images) -> torch.Tensor:
        return image_tensor(images).to(self.colors.device)


# Inputs --------------------------------------------------------------------------------------------------------------


def image_tensor(images) -> torch.Tensor:
    """Images, or (B, 3, 64, 64) in [0, 1], as float32 (B, 3, 64, 64). Raises `ValueError` on another size."""
    if not isinstance(images, torch.Tensor):
        arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if images.shape[1:] != (3, CANVAS, CANVAS):
        raise ValueError(f"images must be 3 x {CANVAS} x {CANVAS}, got {tuple(images.shape[1:])}")
    return images.float()


def read_specs(images, prompts: list[str | Spec]) -> list[Spec]:
    """What each prompt asks for. Raises `ValueError` unless there is one prompt per image."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images for {len(prompts)} prompts: pass one prompt per image")
    return [parse_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


# Rules ---------------------------------------------------------------------------------------------------------------


def _margin(relation: str, first: Detection, second: Detection) -> float:
    """Pixels by which a relation holds (negative: fails): distance along its axis minus distance across."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along - abs(across)


def is_right(objects: list[Detection], background: str | None, spec: Spec) -> bool:
    """
    Whether a scene is exactly what is asked for.

    Args:
        objects (`list[Detection]`): the objects that are there.
        background (`str`, *optional*): the background's colour, one of `BACKGROUNDS`; `None` for any other.
        spec ([`Spec`]): what is asked for.
    """
    if Counter(detection.noun for detection in objects) != Counter(spec.nouns):
        return False
    if spec.relation:
        first, second = (next(d for d in objects if d.noun == noun) for noun, _ in spec.objects)
        if _margin(spec.relation, first, second) <= 0:
            return False
    return spec.background in (None, background)


def _color_name(distances: dict[str, float]) -> str | None:
    closest = min(distances, key=distances.get)
    return closest if distances[closest] < COLOR_TOLERANCE else None


def _softly_right(detections: list[Detection], distances: dict[str, float], spec: Spec) -> float:
    left, wanted = list(detections), []
    for noun in spec.nouns:
        match = next((d for d in left if d.noun == noun), None)
        wanted.append(match)
        if match:
            left.remove(match)
    score = math.prod(d.confidence if d else FAINTEST for d in wanted)
    score *= math.prod(max(1 - d.confidence, FAINTEST) for d in left)
    if spec.relation:
        margin = _margin(spec.relation, *wanted) if all(wanted) else -MARGIN_SCALE
        score *= max(1 / (1 + math.exp(-margin / MARGIN_SCALE)), FAINTEST)
    if spec.background:
        odds = {name: math.exp(-((distance / COLOR_SCALE) ** 2) / 2) for name, distance in distances.items()}
        score *= max(odds[spec.background] / (sum(odds.values()) + 1e-3), FAINTEST)
    return score ** (1 / 3)


# Rewards in TRL's convention -----------------------------------------------------------------------------------------


@functools.cache
def _verifier() -> Verifier:
    return Verifier.load()


def emoji_score(*, prompts: list[str], images: list, **columns) -> list[float]:
    """Reward: [`Verifier.score`] of the committed verifier."""
    return _verifier().score(images, prompts)


def emoji_soft_score(*, prompts: list[str], images: list, **columns) -> list[float]:
    """Reward: [`Verifier.soft_score`] of the committed verifier."""
    return _verifier().soft_score(images, prompts)
