# SPDX-License-Identifier: Apache-2.0

"""
Fit the Gaussians of large noise of known law: which is chosen, how near the truth it is, time and memory.

    python -m examples.noise_correction.gaussians --law spectral
"""

import argparse
import json
import math
import resource
import time

import torch

from trl_pgraft.noise_correction.correctors.gaussian import GaussianCorrector, fit_gaussian
from trl_pgraft.noise_correction.correctors.low_rank import LowRankGaussian
from trl_pgraft.noise_correction.correctors.spectral import SpectralGaussian, layout_of, root_of


def spectral_law(shape: tuple[int, ...]) -> SpectralGaussian:
    """Strong low frequencies, correlated channels, and a mean for each channel."""
    generator = torch.Generator().manual_seed(3)
    channels, *grid = layout_of(shape)
    axes = torch.meshgrid(*(torch.arange(n) / n for n in grid), indexing="ij")
    frequency = torch.stack(axes).square().sum(0).sqrt().flatten()
    mixing = torch.eye(channels) + 0.1 * torch.randn(channels, channels, generator=generator)
    root = root_of((mixing @ mixing.T).double()[None])[0].float()
    mean = 0.1 * torch.randn(channels, generator=generator)[:, None].expand(channels, len(frequency))
    variance = 0.7 + 0.8 / (1 + (frequency / 0.1) ** 2)
    mean = (mean.T if len(shape) == 2 else mean).reshape(shape).clone()
    return SpectralGaussian(mean, variance.sqrt()[:, None, None] * root)


def low_rank_law(shape: tuple[int, ...], strength: float = 1.0) -> LowRankGaussian:
    """Six patterns over elements of different deviations."""
    generator, elements = torch.Generator().manual_seed(3), math.prod(shape)
    directions, _ = torch.linalg.qr(torch.randn(elements, 6, generator=generator))
    deviations = strength * torch.tensor([10.0, 8.0, 6.0, 5.0, 4.0, 3.0]) * math.sqrt(elements / 1024)
    scale = 0.8 + 0.4 * torch.rand(elements, generator=generator)
    return LowRankGaussian(torch.zeros(shape), scale, directions.T.contiguous(), deviations)


LAWS = {"normal": None, "spectral": spectral_law, "low_rank": low_rank_law}


def measure(law: str, shape: tuple[int, ...], count: int, held_out: int) -> dict[str, float | str]:
    """Nats per element that the fitted and the true Gaussian gain over N(0, I) on held-out noise, and the cost."""
    noise = torch.randn(count + held_out, *shape, generator=torch.Generator().manual_seed(0))
    truth = LAWS[law](shape) if LAWS[law] else None
    if truth:
        for part in noise.split(25):
            part.copy_(truth.colour(part))
    gained_by_truth = GaussianCorrector(truth).nats_gained(noise[count:]).mean().item() if truth else 0.0
    started, used = time.perf_counter(), time.process_time()
    corrector, gained = fit_gaussian(noise[:count], noise[count:], "gaussian", torch.device("cpu"))
    seconds, used = time.perf_counter() - started, time.process_time() - used
    started = time.perf_counter()
    corrector.correct(noise[:1], None, {}, 1)
    return {
        "law": law,
        "chosen": getattr(corrector, "family", "none"),
        "of the truth": gained_by_truth,
        **gained,
        "seconds": seconds,
        "CPU seconds": used,
        "seconds of an image": time.perf_counter() - started,
        "GiB at most": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--law", choices=LAWS, required=True)
    parser.add_argument("--shape", type=int, nargs="+", default=(16, 128, 128))
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=25)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    args = parse()
    print(json.dumps(measure(args.law, tuple(args.shape), args.samples, args.held_out), indent=1))
