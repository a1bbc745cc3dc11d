# SPDX-License-Identifier: Apache-2.0

"""A round's samples as a dataset, and the fingerprint that ties it to what drew it."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import torch

from ..pipelines.pixels import to_pil
from .batch import Drawn
from .prompts import Prompt, Sample


# Columns of what the pipeline was handed beside a prompt; without it, an input `image` would be taken for a sample.
INPUT_PREFIX = "input_"
SAMPLE_COLUMNS = ("prompt", "image", "reward", "accepted", "round", "group", "seed", "x_I", "t_I", "fingerprint")


def check_samples(dataset: Any, fingerprint: str, rewards: Sequence[str]) -> datasets.Dataset:
    """
    The samples to train on, checked against what is to be trained.

    Args:
        dataset (`datasets.Dataset` or `datasets.DatasetDict` of one split):
            Samples of one or several rounds.
        fingerprint (`str`):
            From [`sampling_fingerprint`].
        rewards (`Sequence[str]`):
            Reward functions whose columns are read.

    Raises:
        `ValueError`: columns are missing, it has no rows or several splits, or it was drawn otherwise.
    """
    if isinstance(dataset, dict):
        if len(dataset) != 1:
            raise ValueError(f"samples_dataset has the splits {', '.join(dataset)}; give one of them.")
        (dataset,) = dataset.values()
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"samples_dataset is a {type(dataset).__name__}; load it without streaming.")
    needed = [*SAMPLE_COLUMNS, *(f"reward_{name}" for name in rewards)]
    missing = [name for name in needed if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"samples_dataset has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}. It must "
            "be what a run with these rewards kept, in samples/ of its output folder or on the Hub."
        )
    found = set(dataset["fingerprint"])
    if not found:
        raise ValueError("samples_dataset is empty: there is nothing to train on.")
    if found != {fingerprint}:
        raise ValueError(
            "samples_dataset was drawn from another model, scheduler, guidance or tuned_fraction (fingerprint "
            f"{', '.join(sorted(map(str, found)))}; this configuration has {fingerprint}). Train with the "
            "configuration that drew it."
        )
    return dataset


def example_columns(dataset: Any) -> dict[str, Any]:
    """Further columns of a dataset's first prompt; of samples, what the pipeline was handed."""
    if not isinstance(dataset, datasets.Dataset) or not len(dataset):
        return {}
    row = dataset[0]
    stored = {n.removeprefix(INPUT_PREFIX): value for n, value in row.items() if n.startswith(INPUT_PREFIX)}
    return stored if "x_I" in row else row


def prompts_of_samples(samples: datasets.Dataset) -> Iterator[Prompt]:
    """A prompt for each group of samples, with what the pipeline was handed beside it."""
    kept = samples.select_columns([n for n in samples.column_names if n == "prompt" or n.startswith(INPUT_PREFIX)])
    first = {group: i for i, group in reversed(list(enumerate(zip(samples["round"], samples["group"], strict=True))))}
    for row in sorted(first.values()):
        columns = dict(kept[row])
        yield columns.pop("prompt"), {name.removeprefix(INPUT_PREFIX): value for name, value in columns.items()}


def to_dataset(
    samples: Sequence[Sample],
    drawn: Drawn,
    rewards: dict[str, Sequence[float]],
    accepted: Sequence[bool],
    epoch: int,
    state_timestep: float | None,
    fingerprint: str,
    inputs: Sequence[dict[str, Any]] | None = None,
) -> datasets.Dataset:
    """
    A round as a dataset: prompt, image, one column per reward, accepted, round, group, seed, x_I, t_I.

    Args:
        samples (`Sequence[Sample]`):
            What was drawn.
        drawn ([`Drawn`]):
            Images and states, in the same order.
        rewards (`dict[str, Sequence[float]]`):
            Columns `reward` (the sum) and `reward_<name>`; NaN where left out.
        accepted (`Sequence[bool]`):
            Decisions.
        epoch (`int`):
            Number of the round.
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
        "round": [epoch] * len(samples),
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
            "round": datasets.Value("int64"),
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
