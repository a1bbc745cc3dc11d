# SPDX-License-Identifier: Apache-2.0

"""The Gaussian of few factors plus independent elements, from fewer samples than elements."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from .shrinkage import LEAST_VARIANCE, beyond_chance, summed


MOST_FACTORS = 128
MOST_SAMPLES = 2048  # of which products are taken with each other
PASSES = 3
EDGE = 3  # how far beyond the largest eigenvalue of independent noise, in its own deviations, a factor begins


@dataclass(frozen=True)
class LowRankGaussian:
    """
    The Gaussian of covariance `S (I + Q' diag(e^2 - 1) Q) S`: deviations S of the elements, and factors Q.

    Args:
        mean (`torch.Tensor` of the shape of the latents, float32):
            The mean, on the CPU.
        scale (`torch.Tensor` of shape `(d,)`, float32):
            Standard deviation S of each element without the factors.
        factors (`torch.Tensor` of shape `(r, d)`, float32):
            Orthonormal directions Q in elements of unit deviation.
        deviations (`torch.Tensor` of shape `(r,)`, float32):
            Standard deviation e along each.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    factors: torch.Tensor
    deviations: torch.Tensor

    @staticmethod
    def obstacle(count: int, shape: Sequence[int]) -> str:
        """Why it cannot be fitted to `count` samples of `shape`; empty where it can."""
        return "" if count >= 8 else "it needs at least 8 samples"

    @classmethod
    def fit(cls, noise: torch.Tensor, device: torch.device) -> "LowRankGaussian":
        """
        Fit to noise: principal components of the standardised elements, by the products of samples with each other.

        The components' variances are corrected for the number of elements, and what they do not explain of an
        element's variance standardises it in the next pass, as in principal factor analysis.

        Args:
            noise (`torch.Tensor` of shape `(N, ...)`):
                The samples, in random order; the first ones are used where there are very many.
            device (`torch.device`):
                Where the products are computed.
        """
        flat = noise.flatten(1)[:MOST_SAMPLES].float()
        variance, mean = (part.cpu().double() for part in torch.var_mean(flat, 0))
        groups = torch.arange(noise.shape[1]).repeat_interleave(noise[0, 0].numel())
        freedom, left = len(flat) - 1, variance
        for _ in range(PASSES):
            diagonal = _pooled(left, freedom, groups)
            z = (flat - mean.float()).mul_(diagonal.rsqrt().float()).to(device)
            values, vectors = (part.flip(-1) for part in torch.linalg.eigh((z @ z.T).cpu().double() / freedom))
            variances, level = spikes_of(values, flat.shape[1], freedom)
            values, vectors = values[: len(variances), None], vectors[:, : len(variances)]
            factors = ((vectors.T / (freedom * values).sqrt()).float().to(device) @ z).cpu()
            explained = diagonal * (values * factors.double().square()).sum(0)
            left = (variance - explained).clamp(min=0) * freedom / (freedom - len(variances))
        mean = mean * beyond_chance(mean.square(), variance / len(flat), groups)
        scale = (diagonal * level).clamp(min=LEAST_VARIANCE).sqrt()
        return cls(mean.reshape(noise.shape[1:]).float(), scale.float(), factors, variances.sqrt().float())

    def colour(self, z: torch.Tensor) -> torch.Tensor:
        flat = self._stretched(z.flatten(1), self.deviations) * self.scale.to(z.device)
        return flat.reshape(z.shape) + self.mean.to(z.device)

    def whiten(self, x: torch.Tensor) -> torch.Tensor:
        flat = (x - self.mean.to(x.device)).flatten(1) / self.scale.to(x.device)
        return self._stretched(flat, 1 / self.deviations).reshape(x.shape)

    @property
    def log_volume(self) -> float:
        return (self.scale.double().log().sum() + self.deviations.double().log().sum()).item()

    def _stretched(self, flat: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        factors = self.factors.to(flat.device)
        return flat + (flat @ factors.T * (by.to(flat.device) - 1)) @ factors


def spikes_of(values: torch.Tensor, elements: int, freedom: int) -> tuple[torch.Tensor, float]:
    """
    Variances along the sample eigenvectors that stand out from independent noise, and the variance of that noise.

    With many elements a sample eigenvalue is far above the variance along its eigenvector. By how much is known for
    few factors in independent noise (Donoho, Gavish and Johnstone, 2018, Optimal shrinkage of eigenvalues in the
    spiked covariance model).

    Args:
        values (`torch.Tensor` of shape `(n,)`):
            Eigenvalues of the sample covariance, the largest first.
        elements (`int`):
            Number of elements of a sample.
        freedom (`int`):
            Degrees of freedom of the sample covariance.

    Returns:
        `tuple[torch.Tensor, float]`: the variances, relative to that of the noise, of shape `(r,)`; and the latter.
    """
    ratio, level = elements / freedom, values.sum() / elements
    spread = (1 / sqrt(freedom) + 1 / sqrt(elements)) ** (1 / 3) / (sqrt(freedom) + sqrt(elements))
    edge = (1 + sqrt(ratio)) ** 2 * (1 + EDGE * spread)
    for _ in range(20):
        above = (values / level)[: min(MOST_FACTORS, freedom // 4)]
        half = (above[above > edge] + 1 - ratio) / 2
        excess = half + (half.square() - above[above > edge]).sqrt() - 1
        level = values.sum() / (elements + excess.sum())
    aligned = (1 - ratio / excess.square()) / (1 + ratio / excess)
    return 1 + excess * aligned, level.item()


def _pooled(variance: torch.Tensor, freedom: int, groups: torch.Tensor) -> torch.Tensor:
    """Variances of the elements, shrunk to the mean of their group as far as chance explains what they differ by."""
    common = (summed(variance, groups) / groups.bincount())[groups].clamp(min=1e-12)
    deviation = variance / common - 1
    kept = beyond_chance(deviation.square(), torch.full_like(deviation, 2 / freedom), groups)
    return common * (1 + kept * deviation).clamp(min=1e-3)
