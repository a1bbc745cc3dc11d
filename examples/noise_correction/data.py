# SPDX-License-Identifier: Apache-2.0

"""Real images of two domains: Fashion-MNIST and colour emoji, as tensors in [-1, 1]."""

import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from examples.emoji.scenes import NOUNS, STYLES, Renderer, layout, random_spec


FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"
)  # fmt: skip
EMOJI_COUNTS = {"train": 60_000, "test": 10_000}
EMOJI_SEEDS = {"train": 0, "test": 1}
DOMAINS = ("fashion_mnist", "emoji")


@dataclass(frozen=True)
class Images:
    """
    A split of a domain.

    Args:
        pixels (`torch.Tensor` of shape `(N, C, H, W)`, uint8): the images.
        labels (`torch.Tensor` of shape `(N,)`, int64): the class of each.
        classes (`tuple[str, ...]`): names of the classes.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows) -> "Images":
        return Images(self.pixels[rows], self.labels[rows], self.classes)


def load_images(domain: str, split: str, folder: Path | None = None, limit: int | None = None) -> Images:
    """
    Read or render one split.

    Args:
        domain (`str`): one of `DOMAINS`.
        split (`str`): `"train"` or `"test"`.
        folder (`Path`, *optional*): where Fashion-MNIST's files are; Debian's place for them where not given.
        limit (`int`, *optional*): only the first images.

    Raises:
        `ValueError`: no such domain or split.
        `FileNotFoundError`: Fashion-MNIST is not there; the message tells how to get it.
    """
    if domain not in DOMAINS or split not in EMOJI_COUNTS:
        raise ValueError(
            f"domain {domain!r}, split {split!r}: choose a domain of {DOMAINS} and a split of {tuple(EMOJI_COUNTS)}."
        )
    if domain == "emoji":
        return render_emoji(split, min(limit or EMOJI_COUNTS[split], EMOJI_COUNTS[split]))
    return _read_fashion_mnist(split, Path(folder or FASHION_MNIST))[:limit]


def dequantise(pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Bytes to floats in [-1, 1], each drawn uniformly from the bin of width 1/128 that its byte stands for.

    Without that noise most of Fashion-MNIST's pixels are exactly -1, and a sampler that reaches them has no inverse.
    """
    noise = torch.rand(pixels.shape, generator=generator, device=pixels.device)
    return (pixels.float() + noise) / 128 - 1


def centred(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes to floats in (-1, 1), each at the middle of its bin."""
    return (pixels.float() + 0.5) / 128 - 1


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] to the bytes in whose bins they lie."""
    return ((images.float() + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def render_emoji(split: str, count: int, batch: int = 1000) -> Images:
    """
    Single emoji of 32x32 pixels: 16 nouns in two styles, of random size and place, on six jittered backgrounds.

    The splits draw from one distribution with different seeds. The scenes of `examples/emoji` are halved in size.
    """
    rng, generator = np.random.default_rng(EMOJI_SEEDS[split]), torch.Generator().manual_seed(EMOJI_SEEDS[split])
    renderer, pixels, labels = Renderer(), [], []
    for first in range(0, count, batch):
        scenes = layout([random_spec(rng, "single") for _ in range(min(batch, count - first))], rng)
        single = replace(scenes, **{n: value[:, :1] for n, value in vars(scenes).items() if n != "background"})
        small = torch.nn.functional.avg_pool2d(renderer(single, generator), 2)
        pixels.append((small * 255).round().to(torch.uint8))
        labels.append(torch.from_numpy(scenes.noun[:, 0] * len(STYLES) + scenes.style[:, 0]))
    classes = tuple(f"{noun} ({style})" for noun in NOUNS for style in STYLES)
    return Images(torch.cat(pixels), torch.cat(labels), classes)


def _read_fashion_mnist(split: str, folder: Path) -> Images:
    prefix = "train" if split == "train" else "t10k"
    files = [folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(
            f"Fashion-MNIST: {', '.join(missing)} not found. Install Debian's package (`apt-get install "
            "dataset-fashion-mnist`), or unpack it elsewhere (`apt-get download dataset-fashion-mnist`, `dpkg -x "
            "dataset-fashion-mnist_*.deb FOLDER`) and pass FOLDER/usr/share/datasets/fashion-mnist as the folder."
        )
    pixels, labels = (gzip.decompress(file.read_bytes()) for file in files)
    count, height, width = np.frombuffer(pixels, ">i4", count=3, offset=4).tolist()
    pixels = torch.tensor(np.frombuffer(pixels, np.uint8, offset=16).reshape(count, 1, height, width))
    labels = np.frombuffer(labels, np.uint8, offset=8)
    return Images(pixels, torch.tensor(labels, dtype=torch.int64), FASHION_MNIST_CLASSES)
