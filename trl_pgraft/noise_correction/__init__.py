# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

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
