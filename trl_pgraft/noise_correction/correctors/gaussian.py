# SPDX-License-Identifier: Apache-2.0

"""The Gaussian of inverted noise as a corrector: a linear map that needs no training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from ...adapters.files import GAUSSIAN_FILE
from ...pipelines.denoiser_call import DenoiserCall


# Of a covariance: a matrix of 8192 x 8192 float64 has 0.5 GiB.
MOST_ELEMENTS = 8192


@dataclass(frozen=True)
class GaussianCorrector:
    """
    The Gaussian with the mean m and covariance C of the inverted noise, reached by the linear map `m + C^(1/2) x`.

    Of all maps from N(0, I) to this Gaussian, this one moves the noise the least in mean squared distance (Peyre and
    Cuturi, Computational Optimal Transport, remark 2.31).

    Args:
        mean (`torch.Tensor` of shape `(d,)`, float32):
            Mean of the flattened noise, on the CPU.
        root (`torch.Tensor` of shape `(d, d)`, float32):
            Symmetric root of its covariance, on the CPU.
    """

    kind: ClassVar[str] = "gaussian"
    mean: torch.Tensor
    root: torch.Tensor

    @staticmethod
    def check_size(count: int, elements: int) -> None:
        """
        Check that a covariance can be fitted, before anything is inverted.

        Args:
            count (`int`):
                Number of samples that it is fitted to.
            elements (`int`):
                Number of elements of one sample.

        Raises:
            `ValueError`: there are too few samples for a covariance, or too many elements.
        """
        if elements > MOST_ELEMENTS or count <= elements:
            raise ValueError(
                f"A Gaussian of {count} samples of {elements} elements: it needs more samples than elements (what is "
                f"held out does not count), and no more than {MOST_ELEMENTS} elements. Use corrector='network' or "
                "'lora'."
            )

    @classmethod
    def fit(cls, noise: torch.Tensor) -> "GaussianCorrector":
        """
        Fit to inverted noise. The covariance is [`cross_validated_covariance`].

        Args:
            noise (`torch.Tensor` of shape `(N, ...)`):
                Inverted noise; the computation runs on its device, in float64.

        Raises:
            `ValueError`: there are too few samples for a covariance, or too many elements.
        """
        flat = noise.flatten(1).double()
        cls.check_size(*flat.shape)
        values, vectors = torch.linalg.eigh(cross_validated_covariance(flat))
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        return cls(flat.mean(0).float().cpu(), root.float().cpu())

    def correct(
        self, noise: torch.Tensor, call: DenoiserCall, conditioning: dict[str, Any], steps: int
    ) -> torch.Tensor:
        """
        Map standard normal noise to noise of the inverted kind.

        Args:
            noise (`torch.Tensor` of shape `(B, ...)`):
                Standard normal noise, in the layout of the denoiser's latents.
            call, conditioning:
                Not used: a Gaussian does not depend on prompts.
            steps (`int`):
                0 leaves the noise as it is; all other numbers give the same.

        Returns:
            `torch.Tensor` of the shape and dtype of `noise`.
        """
        if steps == 0:
            return noise
        if noise[0].numel() != len(self.mean):
            raise ValueError(
                f"The Gaussian of this corrector was fitted to latents of {len(self.mean)} elements, and this call "
                f"starts from {tuple(noise.shape[1:])}. It knows no other size. Sample with the height and width that "
                "were inverted, or with corrector_steps=0, or train corrector='network' or 'lora', which run at other "
                "sizes."
            )
        mean, root = self.mean.to(noise.device), self.root.to(noise.device)
        return (mean + noise.float().flatten(1) @ root).reshape(noise.shape).to(noise.dtype)

    def save(self, folder: Path) -> None:
        save_file({"mean": self.mean, "root": self.root.contiguous()}, folder / GAUSSIAN_FILE)

    @classmethod
    def load(cls, folder: Path, pipeline: DiffusionPipeline) -> "GaussianCorrector":
        return cls(**load_file(folder / GAUSSIAN_FILE))

    def whiten(self, noise: torch.Tensor) -> torch.Tensor:
        """The inverse of `correct`, for noise of shape `(N, ...)`; float64."""
        mean, root = self.mean.to(noise.device).double(), self.root.to(noise.device).double()
        return torch.linalg.solve(root, (noise.flatten(1).double() - mean).T).T.reshape(noise.shape)

    def nats_gained(self, noise: torch.Tensor) -> float:
        """
        Mean log-likelihood ratio of samples under this Gaussian and under N(0, I), in nats per element.

        Args:
            noise (`torch.Tensor` of shape `(N, ...)`):
                Inverted noise that the Gaussian was not fitted to.
        """
        squares = noise.double().square().sum() - self.whiten(noise).square().sum()
        volume = torch.linalg.slogdet(self.root.to(noise.device).double())[1]
        return (squares / (2 * len(noise)) - volume).item() / noise[0].numel()


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
