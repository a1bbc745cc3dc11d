# SPDX-License-Identifier: Apache-2.0

"""The Gaussian with a full covariance, for small latents of which there are many samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from .shrinkage import LEAST_VARIANCE


# Of a covariance: a matrix of 8192 x 8192 float64 has 0.5 GiB.
MOST_ELEMENTS = 8192


@dataclass(frozen=True)
class FullGaussian:
    """
    The Gaussian of mean m and covariance C, reached by the linear map `m + C^(1/2) z`.

    Of all maps from N(0, I) to this Gaussian, this one moves the noise the least in mean squared distance (Peyre and
    Cuturi, Computational Optimal Transport, remark 2.31).

    Args:
        mean (`torch.Tensor` of the shape of the latents, or flat in files of earlier versions; float32):
            The mean, on the CPU.
        root (`torch.Tensor` of shape `(d, d)`, float32):
            Symmetric root of the covariance of the flattened latents, on the CPU.
    """

    mean: torch.Tensor
    root: torch.Tensor

    @staticmethod
    def obstacle(count: int, shape: Sequence[int]) -> str:
        """Why it cannot be fitted to `count` samples of `shape`; empty where it can."""
        fits = prod(shape) <= MOST_ELEMENTS and count > prod(shape)
        return "" if fits else f"it needs more samples than elements, and no more than {MOST_ELEMENTS} elements"

    @classmethod
    def fit(cls, noise: torch.Tensor, device: torch.device) -> "FullGaussian":
        """
        Fit to noise. The covariance is [`cross_validated_covariance`].

        Args:
            noise (`torch.Tensor` of shape `(N, ...)`):
                The samples.
            device (`torch.device`):
                Where it is computed, in float64; on the CPU where that is not a GPU of CUDA.
        """
        flat = noise.flatten(1).to(device if device.type == "cuda" else "cpu").double()
        values, vectors = torch.linalg.eigh(cross_validated_covariance(flat))
        root = (vectors * values.clamp(min=LEAST_VARIANCE).sqrt()) @ vectors.T
        return cls(flat.mean(0).float().cpu().reshape(noise.shape[1:]), root.float().cpu())

    def colour(self, z: torch.Tensor) -> torch.Tensor:
        mean, root = self.mean.to(z.device), self.root.to(z.device)
        return (z.flatten(1) @ root + mean.flatten()).reshape(z.shape)

    def whiten(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1).cpu().double() - self.mean.flatten().double()
        return torch.linalg.solve(self.root.double(), flat.T).T.reshape(x.shape)

    @property
    def log_volume(self) -> float:
        return torch.linalg.slogdet(self.root.double())[1].item()


def cross_validated_covariance(samples: torch.Tensor) -> torch.Tensor:
    """
    Covariance with the variances of each half of the samples along the eigenvectors of the other half, averaged.

    A sample covariance is too large along its own first eigenvectors and too small along its last. Taking
    directions and variances from different samples follows Abadir, Distaso and Zikes (2014), Design-free estimation of
    variance matrices.

    Args:
        samples (`torch.Tensor` of shape `(N, d)`):
            The samples; even rows are one half and odd rows the other.

    Returns:
        `torch.Tensor` of shape `(d, d)`.
    """
    halves = [part - samples.mean(0) for part in (samples[::2], samples[1::2])]
    found = torch.zeros_like(samples[0].outer(samples[0]))
    for half, other in (halves, halves[::-1]):
        _, vectors = torch.linalg.eigh(half.T @ half)
        found += (vectors * (other @ vectors).square().mean(0)) @ vectors.T / 2
    return found
