# SPDX-License-Identifier: Apache-2.0

"""The Gaussian that is independent from one spatial frequency to another, with a covariance of channels at each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt, pi, prod

import torch

from .shrinkage import LEAST_VARIANCE, beyond_chance, in_parts, summed


# Of the covariances of all frequencies, and of a discrete cosine transform.
MOST_VALUES = 2**26
LONGEST_AXIS = 8192


@dataclass(frozen=True)
class SpectralGaussian:
    """
    The Gaussian whose discrete cosine transform has independent frequencies, each with a covariance of the channels.

    Args:
        mean (`torch.Tensor` of the shape of the latents, float32):
            The mean, on the CPU.
        roots (`torch.Tensor` of shape `(F, C, C)`, float32):
            Symmetric roots of the `C` channels' covariances at the `F` frequencies, on the CPU.
    """

    mean: torch.Tensor
    roots: torch.Tensor

    @staticmethod
    def obstacle(count: int, shape: Sequence[int]) -> str:
        """Why it cannot be fitted to `count` samples of `shape`; empty where it can."""
        channels, *grid = layout_of(shape)
        if channels**2 * prod(grid) <= MOST_VALUES and max(grid) <= LONGEST_AXIS:
            return ""
        return f"{channels} channels of {grid} are too many covariances, or too long for a cosine transform"

    @classmethod
    def fit(cls, noise: torch.Tensor, device: torch.device) -> "SpectralGaussian":
        """
        Fit to noise. Means and covariances are shrunk as far as chance explains them.

        Args:
            noise (`torch.Tensor` of shape `(N, ...)`):
                The samples.
            device (`torch.device`):
                Where the transforms are computed.
        """
        channels, *grid = layout_of(noise.shape[1:])
        total = torch.zeros(prod(grid), channels, dtype=torch.float64)
        products, count, bands = total.new_zeros(*total.shape, channels), len(noise), bands_of(grid)
        for part in in_parts(noise, device):
            y = coefficients(part).movedim(0, 1).contiguous()  # (F, B, C)
            total += y.sum(1).cpu()
            products += (y.mT @ y).cpu()
        mean = total / count
        covariances = (products - count * mean[:, :, None] * mean[:, None]) / (count - 1)
        chance = covariances.diagonal(dim1=1, dim2=2).sum(1) / count
        mean = mean * beyond_chance(mean.square().sum(1), chance, bands)[:, None]
        roots = root_of(shrunk(covariances, count - 1, bands))
        return cls(values_of(mean[None].float(), noise.shape[1:])[0], roots.float())

    def colour(self, z: torch.Tensor) -> torch.Tensor:
        return self.mean.to(z.device) + self._mapped(z, self.roots)

    def whiten(self, x: torch.Tensor) -> torch.Tensor:
        return self._mapped(x - self.mean.to(x.device), torch.linalg.inv(self.roots.double()).float())

    @property
    def log_volume(self) -> float:
        return torch.linalg.slogdet(self.roots.double())[1].sum().item()

    def _mapped(self, x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """x with its channels multiplied by a matrix at each frequency."""
        y = (coefficients(x).movedim(0, 1).contiguous() @ matrices.to(x.device)).movedim(0, 1)
        return values_of(y, x.shape[1:])


def shrunk(covariances: torch.Tensor, freedom: int, bands: torch.Tensor) -> torch.Tensor:
    """
    Covariances of the frequencies, shrunk to what their band has in common, and that to the identity.

    A band's covariance, the variance of each frequency relative to its band, and what is left of each frequency's
    covariance are kept as far as they differ from 1 by more than chance.

    Args:
        covariances (`torch.Tensor` of shape `(F, C, C)`, float64):
            Sample covariance at each frequency.
        freedom (`int`):
            Its degrees of freedom.
        bands (`torch.Tensor` of shape `(F,)`, int64):
            Number of each frequency's band.

    Returns:
        `torch.Tensor` of shape `(F, C, C)`.
    """
    sizes, channels = bands.bincount(), covariances.shape[1]
    identity = torch.eye(channels, dtype=covariances.dtype)
    of_bands = summed(covariances, bands) / sizes[:, None, None]
    of_bands = _kept(of_bands, identity, freedom * sizes, torch.arange(len(sizes)))
    root = root_of(of_bands)
    inverse = torch.linalg.inv(root)[bands]
    relative = inverse @ covariances @ inverse
    variance = relative.diagonal(dim1=1, dim2=2).mean(1)
    chance = 2 * relative.square().sum((1, 2)) / (channels**2 * freedom)
    variance = 1 + beyond_chance((variance - 1).square(), chance, bands) * (variance - 1)
    variance = variance.clamp(min=LEAST_VARIANCE)
    relative = _kept(relative / variance[:, None, None], identity, freedom, bands)
    return variance[:, None, None] * (root[bands] @ relative @ root[bands])


def _kept(
    found: torch.Tensor, target: torch.Tensor, freedom: int | torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """Covariances moved to a target as far as chance explains their squared distance from it in their group."""
    # Mean squared error of a Gaussian's sample covariance.
    chance = (found.diagonal(dim1=1, dim2=2).sum(1).square() + found.square().sum((1, 2))) / freedom
    kept = beyond_chance((found - target).square().sum((1, 2)), chance, groups)
    return target + kept[:, None, None] * (found - target)


def root_of(covariances: torch.Tensor) -> torch.Tensor:
    """Symmetric roots of covariances of shape `(n, C, C)`."""
    values, vectors = torch.linalg.eigh(covariances)
    return (vectors * values.clamp(min=LEAST_VARIANCE).sqrt()[:, None]) @ vectors.mT


def layout_of(shape: Sequence[int]) -> list[int]:
    """
    Channels and spatial axes of latents: `(C, ...)`, or packed ones `(tokens, C)`, of which a square number is taken
    for the rows of a square.
    """
    if len(shape) != 2:
        return [*shape] if len(shape) > 2 else [1, *shape]
    side = isqrt(shape[0])
    return [shape[1], side, side] if side**2 == shape[0] else [shape[1], shape[0]]


def bands_of(grid: Sequence[int]) -> torch.Tensor:
    """Number of each frequency's band, of shape `(F,)`: half an octave along each axis."""
    band = torch.zeros(1, dtype=torch.int64)
    for length in grid:
        octaves = [k.bit_length() - 1 for k in range(length)]
        levels = [k if k < 2 else 2 * o + (k >> (o - 1)) % 2 for k, o in enumerate(octaves)]
        band = (band[:, None] * 64 + torch.tensor(levels)).flatten()
    return band.unique(return_inverse=True)[1]


@lru_cache(maxsize=8)
def cosines(length: int) -> torch.Tensor:
    """The orthonormal discrete cosine transform (DCT-II), of shape `(length, length)`: frequencies in rows."""
    k = torch.arange(length, dtype=torch.float64)
    matrix = torch.cos(pi / length * k[:, None] * (k + 0.5)) * (2 / length) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.float()


def coefficients(x: torch.Tensor) -> torch.Tensor:
    """Cosine transform along the spatial axes of latents of shape `(B, ...)`: `(B, F, C)`."""
    channels, *grid = layout_of(x.shape[1:])
    x = (x.mT if x.ndim == 3 else x).reshape(len(x), channels, *grid)
    for axis, length in enumerate(grid, 2):
        x = (x.movedim(axis, -1) @ cosines(length).T.to(x.device)).movedim(-1, axis)
    return x.flatten(2).mT


def values_of(y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of [`coefficients`], for latents of shape `(B, *shape)`."""
    channels, *grid = layout_of(shape)
    x = y.mT.reshape(len(y), channels, *grid)
    for axis, length in enumerate(grid, 2):
        x = (x.movedim(axis, -1) @ cosines(length).to(x.device)).movedim(-1, axis)
    return (x.flatten(2).mT if len(shape) == 2 else x).reshape(len(y), *shape)
