# SPDX-License-Identifier: Apache-2.0

"""Where a round's prompts come from: a function, as in DDPO, or a dataset, as in TRL; and the held-out ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from ..core.seeding import seed_of


# A prompt and its further columns.
Prompt = tuple[str, dict[str, Any]]
PromptSource = Callable[[int, int], Iterator[Prompt]]


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

    The column may be missing where prompts are not `required`, or are given as `prompt_embeds`; they are empty then.
    """
    _check_dataset("train_dataset", train_dataset, required)

    def source(epoch: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for position in range(epoch * count, (epoch + 1) * count):
            pass_, index = divmod(position, len(train_dataset))
            generator = torch.Generator().manual_seed(seed_of(seed, "prompts", pass_))
            yield _as_prompt(train_dataset[torch.randperm(len(train_dataset), generator=generator)[index].item()])

    return source


def _check_dataset(name: str, dataset: datasets.Dataset, required: bool) -> None:
    columns = list(dataset.column_names)
    # Embeddings stand for prompts.
    if required and not {"prompt", "prompt_embeds"} & set(columns):
        raise ValueError(f"{name} has no column `prompt`; it has {', '.join(columns)}.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: there is no prompt to draw images for.")


def _as_prompt(row: dict[str, Any]) -> Prompt:
    return row.get("prompt", ""), {name: value for name, value in row.items() if name != "prompt"}


def held_out_prompts(
    eval_prompts: Sequence[str] | None, eval_dataset: datasets.Dataset | None, required: bool = True
) -> list[Prompt]:
    """
    The prompts of an evaluation, from the one of both that is given; none where neither is.

    Args:
        eval_prompts (`Sequence[str]` or `None`):
            Prompts without further columns.
        eval_dataset (`datasets.Dataset` or `None`):
            Prompts with columns as those of `train_dataset`.
        required (`bool`, *optional*, defaults to `True`):
            Whether it needs a column `prompt`.

    Raises:
        `ValueError`: both are given, or the dataset is none, is empty or has no prompts.
    """
    if eval_dataset is None:
        return [(prompt, {}) for prompt in eval_prompts or []]
    if eval_prompts:
        raise ValueError("eval_dataset and config.eval_prompts both say what is held out; give one of them.")
    if not isinstance(eval_dataset, datasets.Dataset):
        raise ValueError(f"eval_dataset is a {type(eval_dataset).__name__}; give a `datasets.Dataset`, one split.")
    _check_dataset("eval_dataset", eval_dataset, required)
    return [_as_prompt(row) for row in eval_dataset]


def choose_prompt_source(
    seed: int,
    prompt_function: Callable[[], tuple[str, Any]] | None,
    train_dataset: datasets.Dataset | None,
    samples_dataset: datasets.Dataset | None,
    required: bool = True,
) -> PromptSource | None:
    """
    The one source of prompts that was given; `None` for `samples_dataset`, whose samples are drawn already.

    A dataset needs a column `prompt` or `prompt_embeds` unless `required` is `False`: the pipeline takes none.

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


@dataclass(frozen=True)
class PromptGroup:
    """
    The samples of one prompt, drawn for comparison with each other.

    Args:
        index (`int`):
            Position in the round.
        prompt (`str`):
            The prompt.
        size (`int`):
            Number of samples M.
        columns (`dict`):
            Further columns of the prompt's row, handed to the reward functions.
    """

    index: int
    prompt: str
    size: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One sample to draw: its group, its place in it, and the seed of all its noise."""

    group: PromptGroup
    index: int
    seed: int


def form_groups(prompts: Iterator[tuple[str, dict[str, Any]]], images: int, group_size: int) -> list[PromptGroup]:
    """
    Groups of `group_size` for a round of `images` images; a remainder makes a smaller last group.

    Args:
        prompts (`Iterator[tuple[str, dict]]`):
            Asked once a group for a prompt and its further columns.
        images (`int`):
            Images of the round, over all processes.
        group_size (`int`):
            Samples per prompt M.
    """
    groups = []
    for index, start in enumerate(range(0, images, group_size)):
        prompt, columns = next(prompts)
        groups.append(PromptGroup(index, prompt, min(group_size, images - start), columns))
    return groups


def samples_of(groups: Sequence[PromptGroup], *seed_parts: Any) -> list[Sample]:
    """All samples of the groups, seeded by `seed_parts`, group and index."""
    return [Sample(g, i, seed_of(*seed_parts, g.index, i)) for g in groups for i in range(g.size)]


def columns_of(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Further columns of the samples' prompts, as lists."""
    names = dict.fromkeys(name for sample in samples for name in sample.group.columns)
    return {name: [sample.group.columns.get(name) for sample in samples] for name in names}
