# SPDX-License-Identifier: Apache-2.0

"""Emoji scenes: what a caption asks for (`Spec`), where the objects stand (`Layout`), and the pixels (`Renderer`)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image


FOLDER = Path(__file__).parent
CANVAS = 64
# Noun -> Unicode code point of its emoji; chosen to look different from one another at 20 pixels.
CODE_POINTS = {
    "apple": "1f34e",
    "banana": "1f34c",
    "cat": "1f431",
    "dog": "1f436",
    "frog": "1f438",
    "penguin": "1f427",
    "fish": "1f420",
    "octopus": "1f419",
    "car": "1f697",
    "rocket": "1f680",
    "house": "1f3e0",
    "tree": "1f332",
    "sunflower": "1f33b",
    "mushroom": "1f344",
    "cake": "1f370",
    "balloon": "1f388",
}
NOUNS = tuple(CODE_POINTS)
STYLES = ("noto", "twemoji")  # what captions name
ALL_STYLES = (*STYLES, "fluent", "emojione")  # what sprites there are
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "blue": (150, 195, 245),
    "green": (170, 225, 175),
    "pink": (250, 180, 205),
    "purple": (175, 140, 220),
}
NUMBERS = {"two": 2, "three": 3, "four": 4}
RELATIONS = ("left of", "right of", "above", "below")
OPENINGS = ("", "a picture of ", "an image of ", "a drawing of ")
CATEGORIES = ("single", "count", "two_objects", "relation", "background", "background_count")

MAX_OBJECTS = 5
# Side lengths in pixels, smallest and largest, by the number of objects on the canvas.
SIDES = {1: (30, 44), 2: (24, 30), 3: (20, 25), 4: (17, 22), 5: (16, 18)}
SMALLEST, LARGEST = 16, 44
# A drawn relation is unambiguous: its axis exceeds the other by this factor.
DOMINANCE = 1.3


@dataclass(frozen=True)
class Spec:
    """
    What a caption asks for.

    Args:
        objects (`tuple[tuple[str, int], ...]`): nouns with how many of each.
        relation (`str`, *optional*): where the first object stands from the second, one of `RELATIONS`.
        background (`str`, *optional*): one of `BACKGROUNDS`; any when `None`.
        style (`str`, *optional*): one of `ALL_STYLES`, though captions name those of `STYLES` only; any when `None`.
    """

    objects: tuple[tuple[str, int], ...]
    relation: str | None = None
    background: str | None = None
    style: str | None = None

    @property
    def category(self) -> str:
        """The caption's category, one of `CATEGORIES`."""
        if self.relation:
            return "relation"
        if len(self.objects) > 1:
            return "two_objects"
        counted = "count" if self.objects[0][1] > 1 else ""
        return "_".join(filter(None, ("background" if self.background else "", counted))) or "single"

    @property
    def nouns(self) -> list[str]:
        """One noun per object, in caption order."""
        return [noun for noun, count in self.objects for _ in range(count)]


# Captions ------------------------------------------------------------------------------------------------------------


def plural(noun: str) -> str:
    """The plural of a noun in `NOUNS`."""
    return {"fish": "fish", "octopus": "octopuses"}.get(noun, noun + "s")


_SINGULAR = {f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}": (noun, 1) for noun in NOUNS}
_PLURAL = {f"{word} {plural(noun)}": (noun, count) for noun in NOUNS for word, count in NUMBERS.items()}
_PHRASES = _SINGULAR | _PLURAL
_WRITTEN = {objects: phrase for phrase, objects in _PHRASES.items()}
_CAPTION = re.compile(
    rf"(?:{'|'.join(filter(None, OPENINGS))})?"
    rf"(?P<first>{'|'.join(_PHRASES)})"
    rf"(?: (?P<link>and|{'|'.join(RELATIONS)}) (?P<second>{'|'.join(_PHRASES)}))?"
    rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
    rf"(?: in (?P<style>{'|'.join(STYLES)}) style)?"
)


def caption(spec: Spec, opening: str = "") -> str:
    """Write a `Spec` as text, e.g. `"a picture of a cat left of a dog in noto style"`."""
    text = opening + f" {spec.relation or 'and'} ".join(_WRITTEN[item] for item in spec.objects)
    text += f" on a {spec.background} background" if spec.background else ""
    return text + (f" in {spec.style} style" if spec.style else "")


def parse_prompt(text: str) -> Spec:
    """Read a caption back into its `Spec`: the inverse of [`caption`]. Raises `ValueError` on any other text."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(f"not a caption of an emoji scene: {text!r}. Write one with `caption(Spec(...))`.")
    parts = match.groupdict()
    objects = tuple(_PHRASES[parts[name]] for name in ("first", "second") if parts[name])
    relation = parts["link"] if parts["link"] != "and" else None
    return Spec(objects, relation, parts["background"], parts["style"])


def vocabulary() -> list[str]:
    """All words that captions use, sorted."""
    texts = [*_PHRASES, *RELATIONS, *OPENINGS, *BACKGROUNDS, *STYLES, "and on a background in style"]
    return sorted({word for text in texts for word in text.split()})


# Random specs --------------------------------------------------------------------------------------------------------


def random_spec(rng: np.random.Generator, category: str, styles: Sequence[str] = STYLES) -> Spec:
    """Draw a `Spec` of one category; the style, one of `styles`, is named in two of five."""
    nouns = [NOUNS[i] for i in rng.choice(len(NOUNS), 2, replace=False)]
    count = int(rng.integers(2, 5)) if "count" in category else 1
    pair = category in ("two_objects", "relation")
    return Spec(
        objects=tuple((noun, 1) for noun in nouns) if pair else ((nouns[0], count),),
        relation=RELATIONS[rng.integers(4)] if category == "relation" else None,
        background=list(BACKGROUNDS)[rng.integers(6)] if "background" in category else None,
        style=styles[rng.integers(len(styles))] if rng.random() < 0.4 else None,
    )


def noisy_spec(
    spec: Spec, rng: np.random.Generator, relation: float = 0.5, count: float = 0.4, second_noun: float = 0.15
) -> Spec:
    """
    What a careless caption writer would say of a scene, as the captions of the web do.

    Args:
        spec ([`Spec`]): what the scene shows.
        rng (`np.random.Generator`): source of randomness.
        relation (`float`, *optional*, defaults to `0.5`): how often the relation is a random one.
        count (`float`, *optional*, defaults to `0.4`): how often a number from two to four is a random one.
        second_noun (`float`, *optional*, defaults to `0.15`): how often the second noun is a random one.
    """
    objects, place = list(spec.objects), spec.relation
    if place and rng.random() < relation:
        place = RELATIONS[rng.integers(4)]
    if objects[0][1] > 1 and rng.random() < count:
        objects[0] = (objects[0][0], int(rng.integers(2, 5)))
    if len(objects) > 1 and rng.random() < second_noun:
        objects[1] = (NOUNS[rng.integers(len(NOUNS))], 1)
    return Spec(tuple(objects), place, spec.background, spec.style)


# Layouts and pixels --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """
    Where everything is, for B scenes of at most K = `MAX_OBJECTS` objects; lengths in pixels, the origin top left.

    Args:
        noun (`np.ndarray`): (B, K) index into `NOUNS`, -1 for no object.
        style (`np.ndarray`): (B, K) index into `ALL_STYLES`.
        side, left, top (`np.ndarray`): (B, K) side length and corner of each object's square.
        background (`np.ndarray`): (B,) index into `BACKGROUNDS`.
    """

    noun: np.ndarray
    style: np.ndarray
    side: np.ndarray
    left: np.ndarray
    top: np.ndarray
    background: np.ndarray

    def __len__(self) -> int:
        return len(self.noun)

    def __getitem__(self, rows) -> "Layout":
        return Layout(*(value[rows] for value in vars(self).values()))

    @staticmethod
    def concatenate(layouts: list["Layout"]) -> "Layout":
        """Join several batches into one."""
        columns = zip(*(vars(layout).values() for layout in layouts), strict=True)
        return Layout(*(np.concatenate(column) for column in columns))


def _axis(relation: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance along a relation's direction, and across it; (dx, dy) points from the first object to the second."""
    along = np.choose(relation, [dx, -dx, dy, -dy])
    across = np.where(relation < 2, np.abs(dy), np.abs(dx))
    return along, across


def _stands(present, relation, side, left, top) -> np.ndarray:
    """Which scenes have no two overlapping squares and their relation, if any, unambiguously."""
    x, y = left + side / 2, top + side / 2
    good = np.ones(len(side), bool)
    for i in range(MAX_OBJECTS):
        for j in range(i):
            apart = np.maximum(abs(x[:, i] - x[:, j]), abs(y[:, i] - y[:, j])) >= (side[:, i] + side[:, j]) / 2 - 1
            good &= apart | ~present[:, i] | ~present[:, j]
    along, across = _axis(np.maximum(relation, 0), x[:, 1] - x[:, 0], y[:, 1] - y[:, 0])
    return good & ((relation < 0) | (along > DOMINANCE * across))


def layout(
    specs: list[Spec], rng: np.random.Generator, mix_styles: bool = False, styles: Sequence[str] = STYLES
) -> Layout:
    """
    Place the objects of each spec at random, without overlap (rejection sampling).

    Args:
        specs (`list[Spec]`): what the scenes show, at most `MAX_OBJECTS` objects each.
        rng (`np.random.Generator`): source of randomness.
        mix_styles (`bool`, *optional*, defaults to `False`): whether objects of one scene may differ in style.
        styles (`Sequence[str]`, *optional*, defaults to `STYLES`): the styles, of `ALL_STYLES`, to draw from where a
            spec names none.
    """
    size, names, index = len(specs), list(BACKGROUNDS), {noun: i for i, noun in enumerate(NOUNS)}
    noun = np.full((size, MAX_OBJECTS), -1)
    for row, spec in enumerate(specs):
        nouns = spec.nouns
        noun[row, : len(nouns)] = [index[name] for name in nouns]
    drawn = rng.integers(len(styles), size=(size, MAX_OBJECTS if mix_styles else 1))
    style = np.array([ALL_STYLES.index(name) for name in styles])[drawn].repeat(1 if mix_styles else MAX_OBJECTS, 1)
    for row, spec in enumerate(specs):
        if spec.style:
            style[row] = ALL_STYLES.index(spec.style)
    background = np.array([names.index(spec.background or names[rng.integers(len(names))]) for spec in specs])
    relation = np.array([RELATIONS.index(spec.relation) if spec.relation else -1 for spec in specs])
    return Layout(noun, style, *_place(noun >= 0, relation, rng), background)


def _place(present: np.ndarray, relation: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    low, high = np.array([SIDES[count] for count in present.sum(1)]).T
    squares = [np.zeros(present.shape, int) for _ in range(3)]
    rows = np.arange(len(present))
    while len(rows):
        side = rng.integers(low[rows, None], high[rows, None] + 1, size=(len(rows), MAX_OBJECTS))
        left, top = (rng.integers(0, CANVAS - side + 1) for _ in range(2))
        for array, value in zip(squares, (side, left, top), strict=True):
            array[rows] = value
        rows = rows[~_stands(present[rows], relation[rows], side, left, top)]
    return squares


class Renderer:
    """
    Draws layouts, in batches, on any device. Sprites are resized once, with premultiplied alpha and antialiasing.

    Args:
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where images are made.
        folder (`Path`, *optional*): where `<style>/<noun>.png` are; defaults to the sprites beside this file.
    """

    def __init__(self, device: str | torch.device = "cpu", folder: Path = FOLDER / "sprites"):
        sprites = torch.stack([_read_sprite(folder / style / f"{noun}.png") for style in ALL_STYLES for noun in NOUNS])
        table = torch.zeros(LARGEST - SMALLEST + 1, len(sprites), 4, LARGEST, LARGEST)
        for side in range(SMALLEST, LARGEST + 1):
            small = torch.nn.functional.interpolate(sprites, (side, side), mode="bilinear", antialias=True)
            table[side - SMALLEST, :, :, :side, :side] = small
        self.table = table.permute(0, 1, 3, 4, 2).reshape(-1, 4).to(device)  # (side, sprite, y, x) x RGBA
        self.colors = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255

    def __call__(self, scenes: Layout, generator: torch.Generator | None = None) -> torch.Tensor:
        """Images (B, 3, 64, 64) in [0, 1]; with a `generator` (of this device), backgrounds are jittered by 2%."""
        fields = {k: torch.as_tensor(v, device=self.colors.device).long() for k, v in vars(scenes).items()}
        color = self.colors[fields.pop("background")]
        if generator is not None:
            color = color + 0.02 * torch.randn(color.shape, generator=generator, device=color.device)
        image = color[:, None, None, :].expand(-1, CANVAS, CANVAS, -1)
        for k in range(fields["noun"].shape[1]):
            rgba = self._patch(**{name: value[:, k] for name, value in fields.items()})
            image = rgba[..., :3] + (1 - rgba[..., 3:]) * image
        return image.permute(0, 3, 1, 2).clamp(0, 1)

    def _patch(self, noun, style, side, left, top) -> torch.Tensor:
        """One object per scene on an empty canvas: (B, 64, 64, 4), premultiplied."""
        grid = torch.arange(CANVAS, device=noun.device)
        y, x = grid[None, :, None] - top[:, None, None], grid[None, None, :] - left[:, None, None]
        inside = (y >= 0) & (x >= 0) & (y < LARGEST) & (x < LARGEST) & (noun >= 0)[:, None, None]
        sprite = (side.clamp(SMALLEST) - SMALLEST) * len(ALL_STYLES) * len(NOUNS) + style * len(NOUNS) + noun.clamp(0)
        flat = (sprite[:, None, None] * LARGEST + y.clamp(0, LARGEST - 1)) * LARGEST + x.clamp(0, LARGEST - 1)
        return self.table[flat] * inside[..., None]


def _read_sprite(path: Path) -> torch.Tensor:
    rgba = torch.from_numpy(np.array(Image.open(path).convert("RGBA"))).float() / 255
    return torch.cat([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], dim=-1).permute(2, 0, 1)
