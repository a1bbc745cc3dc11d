# SPDX-License-Identifier: Apache-2.0

"""
Train a small classifier of a domain, whose features a Frechet distance is taken of.

    python -m examples.noise_correction.train_classifier --domain fashion_mnist --output outputs/fm/classifier
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from examples.noise_correction.data import DOMAINS, Images, centred, load_images


class DomainClassifier(ModelMixin, ConfigMixin):
    """
    Convolutions, the mean over the image, and two linear layers.

    Args:
        channels (`int`): channels of an image.
        classes (`int`): number of classes.
        width (`int`, *optional*, defaults to `32`): channels of the first layers.
        features (`int`, *optional*, defaults to `128`): width of the layer before the last.
    """

    @register_to_config
    def __init__(self, channels: int, classes: int, width: int = 32, features: int = 128):
        super().__init__()
        sizes = [(channels, width), (width, 2 * width), (2 * width, 4 * width)]
        self.body = nn.Sequential(*(layer for size in sizes for layer in self._stage(*size)))
        self.hidden = nn.Linear(4 * width, features)
        self.head = nn.Linear(features, classes)

    @staticmethod
    def _stage(channels: int, width: int) -> list[nn.Module]:
        layers = []
        for first, stride in ((channels, 1), (width, 2)):
            layers += [nn.Conv2d(first, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        return layers

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to the features `(B, features)` that the last layer sees."""
        return F.gelu(self.hidden(self.body(images).mean((2, 3))))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(B, classes)`."""
        return self.head(self.features(images))


@torch.no_grad()
def accuracy(model: DomainClassifier, images: Images, batch: int = 1000) -> float:
    """Share of images that the model puts into their class."""
    model.eval()
    parts = zip(images.pixels.split(batch), images.labels.split(batch), strict=True)
    right = sum(int((model(centred(x).to(model.device)).argmax(1).cpu() == y).sum()) for x, y in parts)
    return right / len(images)


def train(args: argparse.Namespace) -> float:
    """Train, save into `args.output`, and return the accuracy on the test split."""
    accelerator = Accelerator()
    set_seed(args.seed)
    data = load_images(args.domain, "train", args.data, args.limit)
    test = load_images(args.domain, "test", args.data, args.limit)
    model = DomainClassifier(data.pixels.shape[1], len(data.classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    trained, optimizer = accelerator.prepare(model.train(), optimizer)
    data = Images(data.pixels.to(accelerator.device), data.labels.to(accelerator.device), data.classes)
    steps = args.epochs * max(len(data) // (args.batch * accelerator.num_processes), 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer.optimizer, args.lr, total_steps=steps)
    generator = torch.Generator().manual_seed(args.seed + accelerator.process_index)
    for step in range(steps):
        batch = data[torch.randint(len(data), (args.batch,), generator=generator).to(accelerator.device)]
        loss = F.cross_entropy(trained(centred(batch.pixels)), batch.labels, label_smoothing=0.05)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            accelerator.print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    found = accuracy(model, test)
    accelerator.print(f"accuracy on {len(test)} test images: {found:.4f}")
    if accelerator.is_main_process:
        model.save_pretrained(args.output)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, default="fashion_mnist")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--limit", type=int, help="the first images of each split only")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128, help="images a process and step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
