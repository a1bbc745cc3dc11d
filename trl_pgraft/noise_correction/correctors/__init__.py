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
- `default_settings`: what a setting counts as where the checkpoint is older than it;
- `active()`: the context that training stays inside, its backward passes too;
- a call `(x, signal, call, conditioning, model)`: predict the target u of `transport.py`.
"""

from .gaussian import GaussianCorrector, NoCorrector
from .lora import LoraCorrector
from .network import NetworkCorrector


FlowCorrector = LoraCorrector | NetworkCorrector
Corrector = FlowCorrector | GaussianCorrector | NoCorrector
CORRECTORS: dict[str, type[Corrector]] = {
    "lora": LoraCorrector,
    "network": NetworkCorrector,
    "gaussian": GaussianCorrector,
    "none": NoCorrector,
}
