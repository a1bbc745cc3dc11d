# SPDX-License-Identifier: Apache-2.0

"""The Gaussian of inverted noise as a corrector: a linear map, which needs no training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from ...adapters.files import GAUSSIAN_FILE
from ...pipelines.denoiser_call import DenoiserCall


# Of a covariance: a matrix of 8192 x 8192 float64 has 0.5 GiB.
MOST_ELEMENTS = 8192


def check_size(count: int, elements: int) -> None:
    """
    Raise where a covariance cannot be fitted: a trainer asks before it inverts anything.

    Raises:
        `ValueError`: there are too few samples for a covariance, or too many elements.
    """
    if elements > MOST_ELEMENTS or count <= elements:
        raise ValueError(
            f"A Gaussian of {count} samples of {elements} elements: it needs more samples than elements (what is held "
            f"out does not count), and no more than {MOST_ELEMENTS} elements. Use corrector='network' or 'lora'."
        )


@dataclass(frozen=True)
class GaussianCorrector:
    """
    The Gaussian of the inverted noise's mean and covariance, by the linear map that moves N(0, I) to it the least.

    Args:
        mean (`torch.Tensor` of shape `(d,)`):
            The mean.
        root (`torch.Tensor` of shape `(d, d)`):
            Symmetric root of the covariance.
    """

    kind: ClassVar[str] = "gaussian"
    mean: torch.Tensor
    root: torch.Tensor

    @classmethod
    def fit(cls, noise: torch.Tensor) -> "GaussianCorrector":
        """
        Fit to inverted noise of shape `(N, ...)`, on the device where it is.

        The covariance is [`cross_validated_covariance`], as the eigenvalues of the samples' own are spread by chance:
        those of 10,000 draws of N(0, I) of 3,072 elements lie between 0.2 and 2.4.

        Raises:
            `ValueError`: there are too few samples for a covariance, or too many elements.
        """
        flat = noise.flatten(1).double()
        check_size(*flat.shape)
        values, vectors = torch.linalg.eigh(cross_validated_covariance(flat))
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return cls(flat.mean(0).float().cpu(), root.float().cpu())

    def correct(
        self, noise: torch.Tensor, call: DenoiserCall, conditioning: dict[str, Any], steps: int
    ) -> torch.Tensor:
        """See [`Corrector`]; steps but 0 are all the same to a linear map."""
        if steps == 0:
            return noise
        mean, root = self.mean.to(noise.device), self.root.to(noise.device)
        return (mean + noise.float().flatten(1) @ root).reshape(noise.shape).to(noise.dtype)

    def save(self, folder: Path) -> None:
        """See [`Corrector`]."""
        save_file({"mean": self.mean, "root": self.root.contiguous()}, folder / GAUSSIAN_FILE)

    @classmethod
    def load(cls, folder: Path, pipeline: Any) -> "GaussianCorrector":
        """See [`Corrector`]."""
        return cls(**load_file(folder / GAUSSIAN_FILE))

    def whiten(self, noise: torch.Tensor) -> torch.Tensor:
        """The inverse of `correct`, for noise of shape `(N, ...)`; float64."""
        mean, root = self.mean.to(noise.device).double(), self.root.to(noise.device).double()
        return torch.linalg.solve(root, (noise.flatten(1).double() - mean).T).T.reshape(noise.shape)

    def nats_gained(self, noise: torch.Tensor) -> float:
        """By how much samples of shape `(N, ...)` are likelier here than under N(0, I), in nats per element."""
        squares = noise.double().square().sum() - self.whiten(noise).square().sum()
        volume = torch.linalg.slogdet(self.root.to(noise.device).double())[1]
        return (squares / (2 * len(noise)) - volume).item() / noise[0].numel()


def cross_validated_covariance(samples: torch.Tensor) -> torch.Tensor:
    """
    Covariance of `samples` `(N, d)`: the variances of each half along the eigenvectors of the other, averaged.

    A sample covariance is too large along its own first eigenvectors and too small along its last.
    """
    halves = [part - samples.mean(0) for part in (samples[::2], samples[1::2])]
    found = torch.zeros_like(samples[0].outer(samples[0]))
    for half, other in (halves, halves[::-1]):
        _, vectors = torch.linalg.eigh(half.T @ half)
        found += (vectors * (other @ vectors).square().mean(0)) @ vectors.T / 2
    return found
