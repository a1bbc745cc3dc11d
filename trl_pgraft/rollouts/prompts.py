# SPDX-License-Identifier: Apache-2.0

"""The prompts of an iteration, from a function as in DDPO or a data set as in TRL, and the samples grouped by them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from ..core.seeding import seed_of


# A prompt and its further columns.
Prompt = tuple[str, dict[str, Any]]
# Given the number of an iteration and a number of prompts, yields these prompts.
PromptSource = Callable[[int, int], Iterator[Prompt]]


def prompts_from_function(prompt_function: Callable[[], tuple[str, Any]]) -> PromptSource:
    r"""
    A source of the prompts that a function returns.

    Args:
        prompt_function (`Callable`):
            Returns `(prompt, metadata)`; called once for each prompt. The metadata is in a column of this name.

    Raises:
        `ValueError`: the function returns a prompt that is not a string.
    """

    def source(epoch: int, count: int) -> Iterator[Prompt]:
        for _ in range(count):
            prompt, metadata = prompt_function()
            if not isinstance(prompt, str):
                raise ValueError(
                    f"prompt_function must return (str, metadata); its first item is a {type(prompt).__name__}."
                )
            yield prompt, {"metadata": metadata}

    return source


def prompts_from_dataset(train_dataset: datasets.Dataset, seed: int, required: bool = True) -> PromptSource:
    r"""
    A source that goes through a data set in random order, in a new one for each pass.

    Args:
        train_dataset (`datasets.Dataset`):
            Prompts in a column `prompt`, with further columns.
        seed (`int`):
            Seed of the order.
        required (`bool`, *optional*, defaults to `True`):
            Whether there must be a column `prompt` or `prompt_embeds`. Without `prompt`, prompts are empty.

    Raises:
        `ValueError`: the data set is empty, or has no prompts.
    """
    _check_dataset("train_dataset", train_dataset, required)

    def source(epoch: int, count: int) -> Iterator[Prompt]:
        for number in range(epoch * count, (epoch + 1) * count):
            pass_, index = divmod(number, len(train_dataset))
            generator = torch.Generator().manual_seed(seed_of(seed, "prompts", pass_))
            yield _as_prompt(train_dataset[torch.randperm(len(train_dataset), generator=generator)[index].item()])

    return source


def _check_dataset(name: str, dataset: datasets.Dataset, required: bool) -> None:
    columns = list(dataset.column_names)
    # Embeddings stand for prompts.
    if required and not {"prompt", "prompt_embeds"} & set(columns):
        raise ValueError(f"{name} has no column `prompt`; it has {', '.join(columns)}.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: there is no prompt to sample images for.")


def _as_prompt(row: dict[str, Any]) -> Prompt:
    return row.get("prompt", ""), {name: value for name, value in row.items() if name != "prompt"}


def held_out_prompts(
    eval_prompts: Sequence[str] | None, eval_dataset: datasets.Dataset | None, required: bool = True
) -> list[Prompt]:
    r"""
    The prompts of an evaluation, from one of two sources; none if neither is given.

    Args:
        eval_prompts (`Sequence[str]` or `None`):
            Prompts without further columns.
        eval_dataset (`datasets.Dataset` or `None`):
            Prompts with columns as those of `train_dataset`.
        required (`bool`, *optional*, defaults to `True`):
            Whether the data set must have a column `prompt` or `prompt_embeds`. Without `prompt`, prompts are empty.

    Raises:
        `ValueError`: both are given, or the data set is of another type, is empty or has no prompts.
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
    r"""
    The one source of prompts that is given; `None` for `samples_dataset`, whose samples are there already.

    Args:
        seed (`int`):
            Seed of the order of `train_dataset`.
        prompt_function (`Callable` or `None`):
            See [`prompts_from_function`].
        train_dataset (`datasets.Dataset` or `None`):
            See [`prompts_from_dataset`].
        samples_dataset (`datasets.Dataset` or `None`):
            Samples of an earlier run.
        required (`bool`, *optional*, defaults to `True`):
            Whether `train_dataset` must have prompts; a pipeline may take none.

    Raises:
        `ValueError`: none or more than one is given.
    """
    given = {
        "prompt_function": prompt_function,
        "train_dataset": train_dataset,
        "samples_dataset": samples_dataset,
    }
    named = [name for name, source in given.items() if source is not None]
    if len(named) != 1:
        raise ValueError(
            f"Exactly one of {', '.join(given)} must be given, because it has the prompts to sample images for; got "
            f"{' and '.join(named) or 'none'}."
        )
    if prompt_function is not None:
        return prompts_from_function(prompt_function)
    return prompts_from_dataset(train_dataset, seed, required) if train_dataset is not None else None


@dataclass(frozen=True)
class PromptGroup:
    r"""
    The samples of one prompt, which are compared with each other.

    Args:
        index (`int`):
            Index of the group in its iteration.
        prompt (`str`):
            The prompt.
        size (`int`):
            M, the samples of the prompt.
        columns (`dict[str, Any]`):
            Further columns of the prompt, for the reward functions and the pipeline.
    """

    index: int
    prompt: str
    size: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    r"""
    One sample to be generated.

    Args:
        group ([`PromptGroup`]):
            Its prompt.
        index (`int`):
            Index of the sample in its group.
        seed (`int`):
            Seed of all noise of its trajectory.
    """

    group: PromptGroup
    index: int
    seed: int


def form_groups(prompts: Iterator[Prompt], images: int, group_size: int) -> list[PromptGroup]:
    r"""
    Groups of equal size for an iteration; a remainder makes a smaller last group.

    Args:
        prompts (`Iterator[Prompt]`):
            Yields a prompt and its further columns; one is taken for each group.
        images (`int`):
            Images of the iteration, over all processes.
        group_size (`int`):
            M, the samples per prompt.
    """
    groups = []
    for index, start in enumerate(range(0, images, group_size)):
        prompt, columns = next(prompts)
        groups.append(PromptGroup(index, prompt, min(group_size, images - start), columns))
    return groups


def samples_of(groups: Sequence[PromptGroup], *seed_parts: Any) -> list[Sample]:
    """All samples of `groups`, seeded by `seed_parts` (values that JSON has), group and index."""
    return [Sample(g, i, seed_of(*seed_parts, g.index, i)) for g in groups for i in range(g.size)]


def columns_of(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Further columns of the prompts of `samples`, as lists."""
    names = dict.fromkeys(name for sample in samples for name in sample.group.columns)
    return {name: [sample.group.columns.get(name) for sample in samples] for name in names}
