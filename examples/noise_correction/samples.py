# SPDX-License-Identifier: Apache-2.0

"""
Picture of samples from the same noise, without and with a corrector, above real images.

    python -m examples.noise_correction.samples --flow outputs/fm/flow --compare outputs/fm/compare --few 3 --many 10 \
        --output samples.png

Rows: few steps; few steps after each corrector that `compare.py` trained for them; more steps; test images.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from examples.noise_correction.compare import ARMS, sampler_of
from examples.noise_correction.data import DOMAINS, load_images, to_bytes
from examples.noise_correction.flow_pipeline import load_flow
from trl_pgraft import NoiseCorrectedPipeline


def rows_of(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Images `(N, C, H, W)`, uint8, of each row, by what the row shows."""
    folder = args.compare / f"steps_{args.few}" / f"seed_{args.seed}"
    plain = load_flow(args.flow)
    shape = (plain.unet.config.in_channels, *[plain.unet.config.sample_size] * 2)
    noise = torch.randn(args.count, *shape, generator=torch.Generator().manual_seed(args.seed)).to(plain.device)
    samplers = {f"{args.few} steps": sampler_of(plain, args.few)}
    for arm in [arm for arm in ARMS if (folder / arm).exists()]:
        corrected = NoiseCorrectedPipeline.from_pretrained(folder / arm, load_flow(args.flow))
        samplers[f"{arm}, {args.few} steps"] = sampler_of(corrected, args.few, corrector_steps=args.corrector_steps)
    samplers[f"{args.many} steps"] = sampler_of(plain, args.many)
    rows = {name: to_bytes(plain.decode(sampler(noise)).cpu()) for name, sampler in samplers.items()}
    return {**rows, "test images": load_images(args.domain, "test", args.data, args.count).pixels}


def picture(rows: dict[str, torch.Tensor], scale: int = 2) -> Image.Image:
    """The rows below each other."""
    pixels = torch.stack(list(rows.values()))  # (rows, count, C, H, W)
    whole = pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray(whole.expand(-1, -1, 3).contiguous().numpy())
    return image.resize((scale * image.width, scale * image.height), Image.Resampling.NEAREST)


def main(args: argparse.Namespace) -> None:
    """Write the picture, and print what its rows are."""
    rows = rows_of(args)
    picture(rows).save(args.output)
    print("; ".join(rows))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, default="fashion_mnist")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--flow", type=Path, required=True, help="folder of train_flow.py")
    parser.add_argument("--compare", type=Path, required=True, help="output folder of compare.py")
    parser.add_argument("--few", type=int, default=3, help="steps that are corrected")
    parser.add_argument("--corrector-steps", type=int, default=1)
    parser.add_argument("--many", type=int, default=10, help="steps of the row to compare with")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
