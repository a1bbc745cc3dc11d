# SPDX-License-Identifier: Apache-2.0

"""
Correctors, which carry standard normal noise to noise of the inverted kind.

Each has `kind` (its name in the configuration and on disk), `save(folder)`, `load(folder, pipeline)` and
`correct(noise, call, conditioning, steps)`. A `FlowCorrector` is trained. It also has `module`, `parameters`,
`settings` and `active()`, and a call predicts u, see `transport.py`.
"""

from pathlib import Path

from diffusers import DiffusionPipeline

from .gaussian import GaussianCorrector
from .lora import LoraCorrector
from .network import NetworkCorrector


FlowCorrector = LoraCorrector | NetworkCorrector
Corrector = FlowCorrector | GaussianCorrector
CORRECTORS: dict[str, type[Corrector]] = {
    "lora": LoraCorrector,
    "network": NetworkCorrector,
    "gaussian": GaussianCorrector,
}


def load_corrector(kind: str, folder: Path, pipeline: DiffusionPipeline) -> Corrector:
    """
    Load a corrector for a pipeline.

    Args:
        kind (`str`):
            Its name in `CORRECTORS`.
        folder (`Path`):
            Folder that its `save` wrote to.
        pipeline (`DiffusionPipeline`):
            The pipeline that it was trained for; a LoRA is added to its denoiser, frozen and switched off.

    Raises:
        `ValueError`: the kind is unknown, or the weights do not fit the denoiser.
    """
    if kind not in CORRECTORS:
        raise ValueError(
            f"{folder} has a corrector of the kind {kind!r}; this version of trl_pgraft knows "
            f"{', '.join(CORRECTORS)}. Fit one of these to the same data."
        )
    return CORRECTORS[kind].load(folder, pipeline)
