# SPDX-License-Identifier: Apache-2.0

"""How far a set of samples is from standard normal noise."""

import math
from dataclasses import asdict, dataclass

import torch


NEWTON_STEPS = 20


@dataclass(frozen=True)
class Gaussianity:
    """
    Statistics of samples that N(0, I) fixes, each beside what as many draws of N(0, I) gave (`normal_...`).

    Args:
        mean (`float`):
            Root mean square over elements of each element's mean.
        std (`float`):
            Standard deviation of all values.
        element_std (`float`):
            Root mean square over elements of `std - 1`.
        skewness (`float`):
            Skewness of all values.
        kurtosis (`float`):
            Excess kurtosis of all values.
        neighbour_correlation (`float`):
            Correlation of values that are neighbours along the last axis.
        radius (`float`):
            Kolmogorov-Smirnov distance of the samples' squared norms from the chi-squared law.
        accuracy (`float`):
            Share of held-out samples that a logistic classifier of x, x^2 and products of neighbours tells from
            N(0, I): a classifier two-sample test. 0.5 is chance.
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
        values = asdict(self)
        names = [name for name in values if not name.startswith("normal_")]
        lines = [f"{name:22s} {values[name]:9.4f} {values[f'normal_{name}']:9.4f}" for name in names]
        return "\n".join([f"{'':22s} {'samples':>9s} {'N(0, I)':>9s}", *lines])


def gaussianity(samples: torch.Tensor, seed: int = 0) -> Gaussianity:
    """
    Compare samples with standard normal noise.

    Args:
        samples (`torch.Tensor` of shape `(N, ...)`):
            At least 20 samples.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the noise that they are compared with.

    Returns:
        [`Gaussianity`].

    Raises:
        `ValueError`: there are too few samples, or values that are not finite.
    """
    if len(samples) < 20 or not samples.isfinite().all():
        raise ValueError(f"gaussianity: at least 20 samples of finite values are needed; got {tuple(samples.shape)}.")
    x = samples.detach().cpu().float()
    generator = torch.Generator().manual_seed(seed)
    # A third draw, so that the classifier's accuracy on N(0, I) against N(0, I) is there to compare with.
    normal, other = (torch.randn(x.shape, generator=generator) for _ in range(2))
    found = {**_moments(x), "radius": _radius(x), "accuracy": two_sample_accuracy(x, normal, generator)}
    chance = {**_moments(other), "radius": _radius(other), "accuracy": two_sample_accuracy(other, normal, generator)}
    return Gaussianity(**found, **{f"normal_{name}": value for name, value in chance.items()})


def _moments(x: torch.Tensor) -> dict[str, float]:
    flat = x.flatten(1).double()
    std = flat.std()
    z = (flat - flat.mean()) / std
    left, right = x[..., :-1].double(), x[..., 1:].double()
    values = {
        "mean": flat.mean(0).square().mean().sqrt(),
        "std": std,
        "element_std": (flat.std(0) - 1).square().mean().sqrt(),
        "skewness": z.pow(3).mean(),
        "kurtosis": z.pow(4).mean() - 3,
        "neighbour_correlation": (left * right).mean() / (left.square().mean() * right.square().mean()).sqrt(),
    }
    return {name: value.item() for name, value in values.items()}


def _radius(x: torch.Tensor) -> float:
    squared, d = x.flatten(1).double().square().sum(1).sort().values, x[0].numel()
    expected = torch.special.gammainc(torch.tensor(d / 2, dtype=torch.float64), squared / 2)
    ranks = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return torch.maximum(ranks[1:] - expected, expected - ranks[:-1]).max().item()


def two_sample_accuracy(a: torch.Tensor, b: torch.Tensor, generator: torch.Generator) -> float:
    """
    Share of held-out samples that a regularised logistic classifier assigns to the right one of two sets.

    Args:
        a, b (`torch.Tensor` of shape `(N, ...)`):
            The two sets; a random half of each trains the classifier.
        generator (`torch.Generator`):
            Chooses the halves.
    """
    features = torch.cat([_features(a), _features(b)])
    labels = torch.cat([torch.ones(len(a)), -torch.ones(len(b))])
    order = torch.cat([torch.randperm(len(a), generator=generator), torch.randperm(len(b), generator=generator)])
    is_first = torch.cat([torch.arange(len(s)) < len(s) // 2 for s in (a, b)])
    order[len(a) :] += len(a)
    train, test = order[is_first], order[~is_first]
    center, scale = features[train].mean(0), features[train].std(0).clamp(min=1e-6)
    features = torch.cat([(features - center) / scale, torch.ones(len(features), 1)], dim=1)
    weights = _logistic(features[train], labels[train])
    return ((features[test] @ weights) * labels[test] > 0).float().mean().item()


def _features(x: torch.Tensor) -> torch.Tensor:
    axes = range(1, x.ndim) if x.ndim > 2 else [1]
    products = [x.narrow(axis, 0, x.shape[axis] - 1) * x.narrow(axis, 1, x.shape[axis] - 1) for axis in axes]
    return torch.cat([part.flatten(1) for part in (x, x.square(), *products)], dim=1)


def _logistic(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Weights of least logistic loss, with a ridge that grows with the number of features per sample; the last is the
    intercept, which has none."""
    weights = torch.zeros(features.shape[1], requires_grad=True)
    ridge = math.sqrt(features.shape[1] / len(features)) / 10
    optimizer = torch.optim.LBFGS([weights], max_iter=NEWTON_STEPS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        misfit = torch.nn.functional.softplus(-(features @ weights) * labels).mean()
        loss = misfit + ridge * weights[:-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()
