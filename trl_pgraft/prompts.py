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


"""Where a round's prompts come from: a function, as in DDPO, or a dataset, as in TRL."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch

from .rollout import seed_of


PromptSource = Callable[[int, int], Iterator[tuple[str, dict[str, Any]]]]


def prompts_from_function(prompt_function: Callable[[], tuple[str, Any]]) -> PromptSource:
    """Source that asks `prompt_function` for a prompt and its metadata, once a group."""

    def source(epoch: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for _ in range(count):
            prompt, metadata = prompt_function()
            if not isinstance(prompt, str):
                raise ValueError(
                    f"prompt_function must return (str, metadata); its first item is a {type(prompt).__name__}."
                )
            yield prompt, {"metadata": metadata}

    return source


def prompts_from_dataset(train_dataset: datasets.Dataset, seed: int, required: bool = True) -> PromptSource:
    """
    Source that goes through the `prompt` column in a seeded order, anew for each pass over the dataset.

    The column may be missing where prompts are not `required`; they are empty then.
    """
    columns = list(train_dataset.column_names)
    if "prompt" not in columns and required:
        raise ValueError(f"train_dataset has no column `prompt`; it has {', '.join(columns)}.")
    if len(train_dataset) == 0:
        raise ValueError("train_dataset is empty: there is no prompt to draw images for.")

    def source(epoch: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for position in range(epoch * count, (epoch + 1) * count):
            pass_, index = divmod(position, len(train_dataset))
            generator = torch.Generator().manual_seed(seed_of(seed, "prompts", pass_))
            row = dict(train_dataset[torch.randperm(len(train_dataset), generator=generator)[index].item()])
            yield row.pop("prompt", ""), row

    return source


def choose_prompt_source(
    seed: int,
    prompt_function: Callable[[], tuple[str, Any]] | None,
    train_dataset: datasets.Dataset | None,
    samples_dataset: datasets.Dataset | None,
    required: bool = True,
) -> PromptSource | None:
    """
    The one source of prompts that was given; `None` for `samples_dataset`, whose samples are drawn already.

    A dataset needs a column `prompt` unless `required` is `False`: the pipeline takes none.

    Raises:
        `ValueError`: none or more than one was given.
    """
    given = {
        "prompt_function": prompt_function,
        "train_dataset": train_dataset,
        "samples_dataset": samples_dataset,
    }
    named = [name for name, source in given.items() if source is not None]
    if len(named) != 1:
        raise ValueError(
            f"Exactly one of {', '.join(given)} must be given, because it says which prompts are drawn; got "
            f"{' and '.join(named) or 'none'}."
        )
    if prompt_function is not None:
        return prompts_from_function(prompt_function)
    return prompts_from_dataset(train_dataset, seed, required) if train_dataset is not None else None
