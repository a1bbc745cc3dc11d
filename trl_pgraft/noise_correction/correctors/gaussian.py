# SPDX-License-Identifier: Apache-2.0

"""
The Gaussian of inverted noise as a corrector: a linear map that needs no training.

There are several families of Gaussians. Each is a class with

- `obstacle(count, shape)`: why it cannot be fitted to so many samples of a shape, or an empty text;
- `fit(noise, device)`: fit it to noise of shape `(N, ...)`;
- `mean`: its mean, of the shape of the latents;
- `colour(z)`: the linear map from N(0, I) to it, for z of shape `(B, ...)`;
- `whiten(x)`: the inverse of `colour`;
- `log_volume`: logarithm of the determinant of `colour`.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ...adapters.files import GAUSSIAN_FILE
from ...pipelines.denoiser_call import DenoiserCall
from .full import FullGaussian
from .low_rank import LowRankGaussian
from .shrinkage import in_parts
from .spectral import SpectralGaussian


Gaussian = FullGaussian | SpectralGaussian | LowRankGaussian
FAMILIES: dict[str, type[Gaussian]] = {
    "full": FullGaussian,
    "spectral": SpectralGaussian,
    "low_rank": LowRankGaussian,
}
NO_CORRECTOR = (
    "no Gaussian describes the held-out inverted noise better than N(0, I), so there is no corrector and the pipeline "
    "samples as it is. corrector='network' or 'lora' may find what a Gaussian cannot have."
)
LEAST_HELD_OUT = 5
# By how much a Gaussian must be better than N(0, I) to be chosen: in standard errors, and in nats per element, because
# one that was shrunk to N(0, I) differs from it by rounding, which has next to no error.
STANDARD_ERRORS = 3
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class GaussianCorrector:
    """
    A Gaussian fitted to the inverted noise. It does not depend on prompts.

    Args:
        gaussian (`Gaussian`):
            One of `FAMILIES`.
    """

    kind: ClassVar[str] = "gaussian"
    gaussian: Gaussian

    @property
    def family(self) -> str:
        """Its name in `FAMILIES`."""
        return next(name for name, family in FAMILIES.items() if type(self.gaussian) is family)

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

        Raises:
            `ValueError`: the latents are of another size than those that the Gaussian was fitted to.
        """
        if steps == 0:
            return noise
        fitted, shape = tuple(self.gaussian.mean.shape), tuple(noise.shape[1:])
        # Files of earlier versions have a flat mean.
        if shape != fitted and (len(fitted) > 1 or noise[0].numel() != fitted[0]):
            raise ValueError(
                f"The Gaussian of this corrector was fitted to latents of shape {fitted}, and this call starts from "
                f"{shape}. It knows no other size. Sample with the height and width that were inverted, "
                "or with corrector_steps=0, or train corrector='network' or 'lora', which run at other sizes."
            )
        return self.gaussian.colour(noise.float()).to(noise.dtype)

    def save(self, folder: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in vars(self.gaussian).items()}
        save_file(tensors, folder / GAUSSIAN_FILE, {"family": self.family})

    @classmethod
    def load(cls, folder: Path, pipeline: DiffusionPipeline) -> "GaussianCorrector":
        path = folder / GAUSSIAN_FILE
        with safe_open(path, "pt") as file:
            family = (file.metadata() or {}).get("family", "full")
        if family not in FAMILIES:
            raise ValueError(
                f"{path} has a Gaussian of the family {family!r}; this version of trl_pgraft supports "
                f"{', '.join(FAMILIES)}."
            )
        return cls(FAMILIES[family](**load_file(path)))

    def nats_gained(self, noise: torch.Tensor) -> torch.Tensor:
        """
        Log-likelihood ratio of samples under this Gaussian and under N(0, I), in nats per element.

        Args:
            noise (`torch.Tensor` of shape `(N, ...)`):
                Inverted noise that the Gaussian was not fitted to.

        Returns:
            `torch.Tensor` of shape `(N,)`, float64, on the CPU.
        """
        pairs = ((part.double(), self.gaussian.whiten(part).double()) for part in in_parts(noise, noise.device))
        gained = torch.cat([(x.square() - z.square()).flatten(1).sum(1) / 2 for x, z in pairs])
        return (gained - self.gaussian.log_volume) / noise[0].numel()


@dataclass(frozen=True)
class NoCorrector:
    """Leaves the noise as it is. It stands where a corrector was looked for and N(0, I) was the best."""

    kind: ClassVar[str] = "none"

    def correct(
        self, noise: torch.Tensor, call: DenoiserCall, conditioning: dict[str, Any], steps: int
    ) -> torch.Tensor:
        return noise

    def save(self, folder: Path) -> None:
        """There is nothing to write beside the kind."""

    @classmethod
    def load(cls, folder: Path, pipeline: DiffusionPipeline) -> "NoCorrector":
        warnings.warn(f"{folder}: {NO_CORRECTOR}", stacklevel=4)
        return cls()


def fit_gaussian(
    noise: torch.Tensor, held_out: torch.Tensor, choice: str, device: torch.device
) -> tuple[GaussianCorrector | NoCorrector, dict[str, float]]:
    """
    Fit the Gaussians of a choice to noise, and keep the one of highest likelihood on held-out noise.

    The difference of two held-out log-likelihoods is that of the images' likelihoods as well: under one sampler the
    Jacobian cancels.

    Args:
        noise (`torch.Tensor` of shape `(N, ...)`):
            Inverted noise to fit to, in random order, on the CPU.
        held_out (`torch.Tensor` of shape `(M, ...)`):
            Inverted noise to choose by, on the CPU.
        choice (`str`):
            `"gaussian"` for all families that take so many samples of this shape, with N(0, I) where none is better
            than that by `STANDARD_ERRORS` and `LEAST_GAIN`; or `"gaussian_<family>"`, which is kept whatever the
            likelihood is.
        device (`torch.device`):
            Where they are fitted.

    Returns:
        `tuple[GaussianCorrector | NoCorrector, dict[str, float]]`: the corrector, and the held-out nats per element
            that each family gains over N(0, I).
    """
    best: GaussianCorrector | NoCorrector = NoCorrector()
    highest, found = -torch.inf, dict[str, float]()
    for name in families_of(choice, len(noise), len(held_out), noise.shape[1:]):
        corrector = GaussianCorrector(FAMILIES[name].fit(noise, device))
        if not len(held_out):
            return corrector, {}
        gained = corrector.nats_gained(held_out)
        found[name] = gained.mean().item()
        if choice != "gaussian":
            return corrector, found
        least = max(highest, LEAST_GAIN, STANDARD_ERRORS * gained.std().item() / len(gained) ** 0.5)
        if found[name] > least:
            best, highest = corrector, found[name]
    return best, found


def families_of(choice: str, count: int, held_out: int, shape: torch.Size) -> list[str]:
    """
    Names of the Gaussians of a choice that can be fitted.

    Args:
        choice (`str`):
            See [`fit_gaussian`].
        count, held_out (`int`):
            Numbers of samples to fit to and to choose by.
        shape (`torch.Size`):
            Shape of one sample.

    Raises:
        `ValueError`: none of them can, or there are too few samples to choose by; the message says why.
    """
    names = [name for name in FAMILIES if choice in ("gaussian", f"gaussian_{name}")]
    obstacles = {name: FAMILIES[name].obstacle(count, shape) for name in names}
    if all(obstacles.values()):
        reasons = "; ".join(f"{name}: {why}" for name, why in obstacles.items())
        raise ValueError(
            f"corrector={choice!r}: a Gaussian cannot be fitted to {count} samples of {shape.numel()} elements "
            f"{tuple(shape)} (what is held out does not count). {reasons}. Use corrector='network' or 'lora'."
        )
    if choice == "gaussian" and held_out < LEAST_HELD_OUT:
        raise ValueError(
            f"corrector='gaussian' chooses by the likelihood of held-out noise, and holds out {held_out} of "
            f"{count + held_out} samples; it needs {LEAST_HELD_OUT}. Raise held_out_fraction, take more samples, or "
            f"name one: {', '.join(f'gaussian_{name}' for name in FAMILIES)}."
        )
    return [name for name in names if not obstacles[name]]
