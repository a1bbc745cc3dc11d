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


"""A round's samples as a dataset, and the fingerprint that ties it to what drew it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from PIL import Image

from .denoiser_call import denoiser_of
from .rewards.functions import to_pil
from .rollout import Drawn, Sample


# Columns of what the pipeline was handed beside a prompt; without it, an input `image` would be taken for a sample.
INPUT_PREFIX = "input_"


def sampling_fingerprint(pipeline: Any, arguments: dict[str, Any], position: int) -> str:
    """
    Short hash of what the law of recorded states depends on: model, scheduler, sampling arguments and position.

    The model enters by its configuration and a sum over its base weights, so that a fine-tuned copy is told apart.
    """
    denoiser = denoiser_of(pipeline)
    own = {n: p for n, p in denoiser.named_parameters() if "lora_" not in n}
    weights = sum(float(p.detach().float().abs().sum()) for p in own.values())
    parts = [
        type(pipeline).__name__,
        {k: str(v) for k, v in sorted(pipeline.scheduler.config.items()) if not k.startswith("_")},
        {k: _stable(v) for k, v in sorted(arguments.items())},
        f"{weights:.3e}",
        position,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def _stable(value: Any) -> str:
    """Text of an argument that is the same in another process: of images and tensors, their content."""
    if isinstance(value, Image.Image):
        value = value.tobytes()
    elif isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy().tobytes()
    elif isinstance(value, list | tuple):
        return str([_stable(v) for v in value])
    return hashlib.blake2b(value, digest_size=8).hexdigest() if isinstance(value, bytes) else str(value)


def to_dataset(
    samples: Sequence[Sample],
    drawn: Drawn,
    rewards: dict[str, Sequence[float]],
    accepted: Sequence[bool],
    state_timestep: float | None,
    fingerprint: str,
    inputs: Sequence[dict[str, Any]] | None = None,
) -> datasets.Dataset:
    """
    A round as a dataset: prompt, image, one column per reward, accepted, group, seed, x_I, t_I.

    Args:
        samples (`Sequence[Sample]`):
            What was drawn.
        drawn ([`Drawn`]):
            Images and states, in the same order.
        rewards (`dict[str, Sequence[float]]`):
            Columns `reward` (the sum) and `reward_<name>`; NaN where left out.
        accepted (`Sequence[bool]`):
            Decisions.
        state_timestep (`float` or `None`):
            t_I; `None` for final latents.
        fingerprint (`str`):
            From [`sampling_fingerprint`].
        inputs (`Sequence[dict]`, *optional*):
            What the pipeline was handed for each sample beside its prompt; columns `input_<name>`.
    """
    x_i = drawn.x_i
    columns = {
        "prompt": [s.group.prompt for s in samples],
        "image": to_pil(drawn.images),
        **{name: [float(v) for v in values] for name, values in rewards.items()},
        "accepted": [bool(a) for a in accepted],
        "group": [s.group.index for s in samples],
        "seed": [s.seed for s in samples],
        "x_I": list(x_i.numpy()),
        "t_I": [state_timestep] * len(samples),
        "fingerprint": [fingerprint] * len(samples),
    }
    array = {2: datasets.Array2D, 3: datasets.Array3D, 4: datasets.Array4D, 5: datasets.Array5D}[x_i.ndim - 1]
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "image": datasets.Image() if drawn.images.ndim == 4 else datasets.List(datasets.Image()),
            **{name: datasets.Value("float64") for name in rewards},
            "accepted": datasets.Value("bool"),
            "group": datasets.Value("int64"),
            "seed": datasets.Value("int64"),
            "x_I": array(shape=tuple(x_i.shape[1:]), dtype="float32"),
            "t_I": datasets.Value("float64"),
            "fingerprint": datasets.Value("string"),
        }
    )
    dataset = datasets.Dataset.from_dict(columns, features=features)
    names = dict.fromkeys(name for row in inputs or [] for name in row)
    own = {INPUT_PREFIX + name: [_storable(row.get(name)) for row in inputs] for name in names}
    return datasets.concatenate_datasets([dataset, datasets.Dataset.from_dict(own)], axis=1) if own else dataset


def _storable(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value
