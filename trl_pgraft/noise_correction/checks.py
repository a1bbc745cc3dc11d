# SPDX-License-Identifier: Apache-2.0

"""What the arguments of [`NoiseCorrectionTrainer`] are checked for before anything is inverted."""

from collections.abc import Iterable
from typing import Any

import datasets
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftConfig

from ..pipelines.inputs import checked_arguments, takes_prompts
from .config import NoiseCorrectionConfig


def check_arguments(
    config: NoiseCorrectionConfig,
    pipeline: DiffusionPipeline,
    dataset: datasets.Dataset,
    peft_config: PeftConfig | None,
    network: ModelMixin | None,
    pipeline_kwargs: dict[str, Any] | None,
) -> None:
    """
    Check that the arguments of the trainer fit together.

    Args:
        config, pipeline, dataset, peft_config, network, pipeline_kwargs:
            See [`NoiseCorrectionTrainer`].

    Raises:
        `ValueError`: they do not; the message says what is needed.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__}; it needs to be a datasets.Dataset: one split, not streamed."
        )
    columns = dataset.column_names
    if "image" not in columns and "latents" not in columns:
        raise ValueError(f"train_dataset has the columns {columns}; it needs `image` (PIL images) or `latents`.")
    if "prompt" not in columns and takes_prompts(pipeline):
        raise ValueError(
            f"train_dataset has the columns {columns}; {type(pipeline).__name__} takes prompts, so it needs `prompt` "
            "as well, of empty strings where there is nothing to say."
        )
    if not len(dataset):
        raise ValueError("train_dataset is empty.")
    for name in {"prompt", "image", "latents"} & {*columns}:
        _check_column(dataset, name)
    if network is not None and not isinstance(network, ModelMixin):
        raise ValueError(
            f"network: a {type(network).__name__} is no diffusers model, so it could not be saved. Derive it from "
            "diffusers.ModelMixin and ConfigMixin."
        )
    for name, value, corrector in (("network", network, "network"), ("peft_config", peft_config, "lora")):
        if value is not None and config.corrector != corrector:
            raise ValueError(f"{name}: given with corrector={config.corrector!r}; set corrector={corrector!r}.")
    steps = checked_arguments(pipeline, pipeline_kwargs).get("num_inference_steps", config.num_inference_steps)
    if steps != config.num_inference_steps:
        raise ValueError(
            f"pipeline_kwargs: num_inference_steps={steps} is not the configuration's {config.num_inference_steps}; "
            "set it there."
        )


def _check_column(dataset: datasets.Dataset, name: str) -> None:
    """Look for rows without a value, reading images and latents only where there are some."""
    if name == "prompt":
        check_values(name, dataset.with_format(None)[name])
    elif dataset.data.column(name).null_count:
        missing = dataset.select_columns([name]).with_format("arrow")[:][name].is_null().to_pylist()
        check_values(name, (None if is_missing else name for is_missing in missing))


def check_values(name: str, values: Iterable[Any], start: int = 0) -> None:
    """
    Check that each row has a value, and that prompts are texts.

    Args:
        name (`str`):
            Column of the data set.
        values (`Iterable`):
            Its values in successive rows.
        start (`int`, *optional*, defaults to `0`):
            Number of the first of these rows.

    Raises:
        `ValueError`: some do not; the message has the first of these rows.
    """
    kind = str if name == "prompt" else object
    wrong = [(row, v) for row, v in enumerate(values, start) if v is None or not isinstance(v, kind)]
    if wrong:
        advice = "Each needs a text, an empty one where there is nothing to say" if kind is str else "Leave them out"
        raise ValueError(
            f"train_dataset: {len(wrong)} rows, the first of them {wrong[0][0]}, have {wrong[0][1]!r} or the like as "
            f"`{name}`. {advice}."
        )
