# SPDX-License-Identifier: Apache-2.0

"""
Correctors, which carry standard normal noise to noise of the inverted kind.

Each has

- `kind`: its name in the configuration and on disk;
- `save(folder)`: write it to a folder that is there;
- `load(folder, pipeline)`: read what `save` wrote, frozen, for a pipeline;
- `correct(noise, call, conditioning, steps)`: carry standard normal noise to noise of the inverted kind.

A `FlowCorrector` is trained. It also has

- `module`: the module that is called, and prepared by accelerate for training;
- `parameters`: the trained parameters, in an order that is the same in every process and after a resume;
- `settings`: what it was made with, by name, so that the checkpoint of a corrector made otherwise is refused;
- `active()`: the context that training stays inside, its backward passes too;
- a call `(x, signal, call, conditioning, model)`: predict the target u of `transport.py`.
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
            f"{folder} has a corrector of the kind {kind!r}; this version of trl_pgraft supports "
            f"{', '.join(CORRECTORS)}. Train one of these to the same data."
        )
    return CORRECTORS[kind].load(folder, pipeline)
