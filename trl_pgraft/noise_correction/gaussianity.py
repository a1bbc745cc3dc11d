# SPDX-License-Identifier: Apache-2.0

"""How far a set of samples is from standard normal noise: moments, radii and a classifier two-sample test."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from ..core.seeding import generator_of


OPTIMIZER_STEPS = 20
# Of samples that are compared, and of their values: the classifier's features are some ten times as many.
MOST_COMPARED = 10_000
MOST_VALUES_COMPARED = 30_000_000


@dataclass(frozen=True)
class Gaussianity:
    """
    Statistics of samples that N(0, I) determines. Each has a counterpart `normal_...`, the same statistic of as many
    samples of N(0, I), which shows what chance alone gives.

    Args:
        mean (`float`):
            Root mean square over elements of each element's mean; 0 for N(0, I).
        std (`float`):
            Standard deviation of all values; 1 for N(0, I).
        element_std (`float`):
            Root mean square over elements of `std - 1`, where std is that of the element; 0 for N(0, I).
        skewness (`float`):
            Third standardised moment of all values; 0 for N(0, I).
        kurtosis (`float`):
            Excess kurtosis of all values, their fourth standardised moment less 3; 0 for N(0, I).
        neighbour_correlation (`float`):
            Correlation, in [-1, 1], of values that are neighbours along the last axis; 0 for N(0, I).
        radius (`float`):
            Kolmogorov-Smirnov distance, in [0, 1], of the samples' squared norms from the chi-squared distribution.
        accuracy (`float`):
            Share, in [0, 1], of held-out samples that a logistic classifier of x, x^2 and products of neighbours
            assigns correctly to the samples or to N(0, I): a classifier two-sample test (Lopez-Paz and Oquab, 2017,
            arXiv 1610.06545). 0.5 is chance.
        normal_mean, normal_std, normal_element_std, normal_skewness, normal_kurtosis (`float`):
            The same of N(0, I).
        normal_neighbour_correlation, normal_radius, normal_accuracy (`float`):
            The same of N(0, I).
    """

    mean: float
    std: float
    element_std: float
    skewness: float
    kurtosis: float
    neighbour_correlation: float
    radius: float
    accuracy: float
    normal_mean: float
    normal_std: float
    normal_element_std: float
    normal_skewness: float
    normal_kurtosis: float
    normal_neighbour_correlation: float
    normal_radius: float
    normal_accuracy: float

    def __str__(self) -> str:
        lines = [
            f"{name:22s} {value:9.4f} {getattr(self, f'normal_{name}'):9.4f}"
            for name, value in asdict(self).items()
            if not name.startswith("normal_")
        ]
        return "\n".join([f"{'':22s} {'samples':>9s} {'N(0, I)':>9s}", *lines])


def gaussianity(samples: torch.Tensor, seed: int = 0) -> Gaussianity:
    """
    Compare samples with standard normal noise.

    Args:
        samples (`torch.Tensor` of shape `(N, ...)`):
            At least 20 samples of finite values. They are compared on the CPU.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the standard normal noise, and of the halves that the classifier is trained and tested on.

    Returns:
        [`Gaussianity`]: the statistics of the samples and of as many samples of N(0, I).

    Raises:
        `ValueError`: there are too few samples, or values that are not finite.
    """
    if len(samples) < 20 or not samples.isfinite().all():
        raise ValueError(f"gaussianity: at least 20 samples of finite values are needed; got {tuple(samples.shape)}.")
    x = samples.detach().cpu().float()
    generator = torch.Generator().manual_seed(seed)
    # Two sets of N(0, I): one to compare the samples with, the other to compare with it in their place.
    normal, other = (torch.randn(x.shape, generator=generator) for _ in range(2))
    return Gaussianity(
        **_statistics(x, normal, generator),
        **{f"normal_{name}": value for name, value in _statistics(other, normal, generator).items()},
    )


def random_part(noise: torch.Tensor, seed: int) -> torch.Tensor:
    """
    A random part of the samples, which may be sorted, small enough for [`gaussianity`].

    Args:
        noise (`torch.Tensor` of shape `(N, ...)`):
            The samples.
        seed (`int`):
            Seed of the choice.
    """
    count = min(MOST_COMPARED, max(20, MOST_VALUES_COMPARED // noise[0].numel()))
    return noise[torch.randperm(len(noise), generator=generator_of(seed, "compared"))[:count]]


def _statistics(x: torch.Tensor, normal: torch.Tensor, generator: torch.Generator) -> dict[str, float]:
    flat = x.flatten(1).double()
    std = flat.std()
    z = (flat - flat.mean()) / std
    left, right = x[..., :-1].double(), x[..., 1:].double()
    squared = flat.square().sum(1).sort().values
    expected = torch.special.gammainc(torch.tensor(flat.shape[1] / 2, dtype=torch.float64), squared / 2)
    ranks = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return {
        "mean": flat.mean(0).square().mean().sqrt().item(),
        "std": std.item(),
        "element_std": (flat.std(0) - 1).square().mean().sqrt().item(),
        "skewness": z.pow(3).mean().item(),
        "kurtosis": z.pow(4).mean().item() - 3,
        "neighbour_correlation": (
            (left * right).mean() / (left.square().mean() * right.square().mean()).sqrt()
        ).item(),
        "radius": torch.maximum(ranks[1:] - expected, expected - ranks[:-1]).max().item(),
        "accuracy": two_sample_accuracy(x, normal, generator),
    }


def two_sample_accuracy(a: torch.Tensor, b: torch.Tensor, generator: torch.Generator) -> float:
    """
    Share of held-out samples that a regularised logistic classifier assigns to the right one of two sets.

    Args:
        a, b (`torch.Tensor` of shape `(N, ...)`):
            The two sets; a random half of each trains the classifier.
        generator (`torch.Generator`):
            Chooses the halves.
    """
    sets = [_features(samples)[torch.randperm(len(samples), generator=generator)] for samples in (a, b)]
    halves = list(zip(*(features.tensor_split([len(features) // 2]) for features in sets), strict=True))
    train = torch.cat(halves[0])
    center, scale = train.mean(0), train.std(0).clamp(min=1e-6)
    # A sample is assigned to `a` where its product with the weights is positive; those of `b` are reflected.
    train, test = (
        torch.cat(
            [
                sign * F.pad((part - center) / scale, (0, 1), value=1.0)
                for part, sign in zip(half, (1, -1), strict=True)
            ]
        )
        for half in halves
    )
    return (test @ _logistic(train) > 0).float().mean().item()


def _features(x: torch.Tensor) -> torch.Tensor:
    products = [
        x.narrow(axis, 0, x.shape[axis] - 1) * x.narrow(axis, 1, x.shape[axis] - 1) for axis in range(1, x.ndim)
    ]
    return torch.cat([part.flatten(1) for part in (x, x.square(), *products)], dim=1)


def _logistic(features: torch.Tensor) -> torch.Tensor:
    """
    Weights w of least logistic loss `mean log(1 + exp(-features w))`. A ridge, which grows with the number of features
    per sample, holds all but the last one, the intercept.
    """
    weights = torch.zeros(features.shape[1], requires_grad=True)
    ridge = math.sqrt(features.shape[1] / len(features)) / 10
    optimizer = torch.optim.LBFGS([weights], max_iter=OPTIMIZER_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-(features @ weights)).mean() + ridge * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()
