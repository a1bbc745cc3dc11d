# SPDX-License-Identifier: Apache-2.0

"""Inverse noise correction: data inverted to noise, a corrector that learns it, and sampling from corrected noise."""

from .config import NoiseCorrectionConfig
from .gaussianity import Gaussianity, gaussianity
from .inversion import Inversion, InversionError, invert_flow
from .pipeline import NoiseCorrectedPipeline
from .trainer import NoiseCorrectionTrainer


__all__ = [
    "Gaussianity",
    "Inversion",
    "InversionError",
    "NoiseCorrectedPipeline",
    "NoiseCorrectionConfig",
    "NoiseCorrectionTrainer",
    "gaussianity",
    "invert_flow",
]
