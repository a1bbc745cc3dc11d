# SPDX-License-Identifier: Apache-2.0

"""Checks of what prompts have beside their text, such as images, before anything is sampled."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from ..adapters.policy import Policy
from ..pipelines.inputs import SET_ELSEWHERE, input_names, parameters_of
from .dataset import SAMPLE_COLUMNS
from .prompts import Prompt


def check_names(pipeline: DiffusionPipeline, columns: Sequence[str]) -> None:
    r"""
    Check that no column of `train_dataset` has a name by which something else would be expected of it.

    Args:
        pipeline (`DiffusionPipeline`):
            Its call's parameters count.
        columns (`Sequence[str]`):
            Names of the columns.

    Raises:
        `ValueError`: a column would set what the library sets, or they are those of stored samples. There is a warning
            where the pipeline's call takes one value for all prompts.
    """
    if set(SAMPLE_COLUMNS) <= set(columns):
        raise ValueError(
            "train_dataset has the columns of samples that a run kept. Give it as samples_dataset to train on them, "
            "or take the prompts alone: `dataset.select_columns('prompt')`."
        )
    taken = parameters_of(pipeline).keys() & set(columns) - {"prompt"}
    for name in sorted(taken & SET_ELSEWHERE.keys()):
        raise ValueError(f"train_dataset: column `{name}` would not be used; rename it. {SET_ELSEWHERE[name]}")
    if ignored := sorted(taken - input_names(pipeline)):
        warnings.warn(
            f"train_dataset: the call of {type(pipeline).__name__} takes one value of {', '.join(ignored)} for all "
            "prompts, in pipeline_kwargs; columns of these names are for the rewards alone.",
            stacklevel=2,
        )


def check_inputs(policy: Policy, prompts: Iterable[Prompt], owner: str) -> None:
    r"""
    Check that prompts have the same inputs of the pipeline's call, that images can be read, and that these are of one
    size: pipelines resize all images of a call to the size of the first one, or cannot take them.

    Args:
        policy ([`Policy`]):
            Its pipeline and arguments determine which columns are inputs.
        prompts (`Iterable[Prompt]`):
            Prompts, each with its further columns.
        owner (`str`):
            What has these columns, for the error's message.

    Raises:
        `ValueError`: they do not; the message names the column and two prompts.
    """
    first: Prompt | None = None
    for prompt, columns in prompts:
        try:
            sizes = {name: _size_of(value) for name, value in policy.inputs_of(columns).items()}
        except ValueError as error:
            raise ValueError(f"{owner}, prompt {prompt[:80]!r}: {error}") from error
        first = first or (prompt, sizes)
        for name in sorted({*first[1], *sizes}):
            found = [f"{text[:80]!r} has {_shown(own, name)}" for text, own in (first, (prompt, sizes))]
            if name not in sizes or name not in first[1]:
                raise ValueError(f"{owner}: give `{name}` for each prompt, or for none; {'; '.join(found)}.")
            if sizes[name] != first[1][name]:
                raise ValueError(
                    f"{owner}: images in `{name}` must be of one size; {'; '.join(found)}. Resize them, for example "
                    f"`dataset.map(lambda row: {{{name!r}: row[{name!r}].resize((512, 512))}})`."
                )


def _size_of(value: Any) -> Any:
    """Width and height of an image; of lists of images, a list; None of anything else."""
    if isinstance(value, list) and value and isinstance(value[0], Image.Image | list):
        return [_size_of(item) for item in value]
    return value.size if isinstance(value, Image.Image) else None


def _shown(sizes: dict[str, Any], name: str) -> str:
    return "none" if name not in sizes else f"one of size {sizes[name]}" if sizes[name] else "one"


def check_held_out_columns(policy: Policy, held_out: Sequence[Prompt], example: dict[str, Any]) -> None:
    r"""
    Check that held-out prompts have the images, labels and the like that the pipeline is handed in training.

    Args:
        policy ([`Policy`]):
            Its pipeline and arguments determine which columns are inputs.
        held_out (`Sequence[Prompt]`):
            Held-out prompts, each with its further columns.
        example (`dict[str, Any]`):
            Further columns of one prompt of training.

    Raises:
        `ValueError`: a held-out prompt lacks some; the message names them.
    """
    for _, columns in held_out:
        missing = sorted(
            n for n in policy.inputs_of(example) if "prompt" not in n and n not in policy.inputs_of(columns)
        )
        if missing:
            raise ValueError(
                f"{type(policy.pipeline).__name__} is handed {', '.join(missing)} for each prompt of training, which "
                "the held-out prompts do not have. In place of eval_prompts give the trainer an eval_dataset with "
                f"{'columns' if len(missing) > 1 else 'a column'} {', '.join(missing)}."
            )
