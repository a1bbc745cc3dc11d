# SPDX-License-Identifier: Apache-2.0

"""The prompts of an iteration, from a function as in DDPO or a data set as in TRL, and the samples grouped by them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import torch
from diffusers import DiffusionPipeline

from ..config import GraftConfig
from ..core.seeding import generator_of, sample_seed
from ..pipelines.inputs import takes_prompts
from ..rewards.conventions import check_columns
from ..rewards.registry import Reward


LARGEST_GROUP = 10_000  # the KL that top-k of M implies takes memory in proportion to M
# A prompt and its further columns.
Prompt = tuple[str, dict[str, Any]]
# What holds prompts: a data set, a list of them, or the Hub's name of a data set with a split `train`.
PromptData: TypeAlias = datasets.Dataset | Sequence[str] | str
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
        `ValueError`: the data set is empty, has no prompts, or one that is not a string.
    """
    train_dataset = _as_dataset("train_dataset", train_dataset, required)

    def source(epoch: int, count: int) -> Iterator[Prompt]:
        for number in range(epoch * count, (epoch + 1) * count):
            pass_, index = divmod(number, len(train_dataset))
            generator = generator_of(seed, "prompts", pass_)
            yield _as_prompt(train_dataset[torch.randperm(len(train_dataset), generator=generator)[index].item()])

    return source


def _as_dataset(name: str, given: PromptData, required: bool, token: str | None = None) -> datasets.Dataset:
    """The data set that is given, one of the prompts in a list, or the split `train` of one on the Hub; checked."""
    if isinstance(given, str):
        given = datasets.load_dataset(given, split="train", token=token)
    elif isinstance(given, list | tuple):
        given = datasets.Dataset.from_dict({"prompt": list(_checked_prompts(name, given))})
    if not isinstance(given, datasets.Dataset):
        raise ValueError(
            f"{name} is a {type(given).__name__}; give a `datasets.Dataset`, one split: it is gone through in random "
            "order, so a stream has to be loaded. A list of prompts and a data set's name on the Hub are taken too."
        )
    columns = given.column_names
    # Embeddings stand for prompts.
    if required and not {"prompt", "prompt_embeds"} & set(columns):
        raise ValueError(f"{name} has no column `prompt`; it has {', '.join(columns)}.")
    if len(given) == 0:
        raise ValueError(f"{name} is empty: there is no prompt to sample images for.")
    given = _with_plain_images(given)
    if required and "prompt_embeds" not in columns:
        # Of rows that a transform computes when they are read, the first one alone is.
        is_computed = given.format["type"] == "custom"
        _checked_prompts(name, [_as_prompt(given[0])[0]] if is_computed else given.with_format(None)["prompt"][:])
    return given


def _with_plain_images(dataset: datasets.Dataset) -> datasets.Dataset:
    """The data set with images as PIL's, also where its format makes arrays of them, which have no palette."""
    kind, chosen, options = (dataset.format[name] for name in ("type", "columns", "format_kwargs"))
    others = [name for name in chosen if not isinstance(dataset.features[name], datasets.Image)]
    if kind in (None, "custom") or others == chosen:
        return dataset
    return dataset.select_columns(chosen).with_format(kind, columns=others, output_all_columns=True, **options)


def _checked_prompts(name: str, prompts: Sequence[Any]) -> Sequence[str]:
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"{name}: the prompt of row {row} is {str(prompt)[:80]}, a {type(prompt).__name__}. A prompt is a "
                "string, which may be empty; of chat messages give the text alone."
            )
    return prompts


def _as_prompt(row: dict[str, Any]) -> Prompt:
    return row.get("prompt", ""), {name: value for name, value in row.items() if name != "prompt"}


def choose_prompts(
    config: GraftConfig,
    rewards: Sequence[Reward],
    pipeline: DiffusionPipeline | None,
    prompt_function: Callable[[], tuple[str, Any]] | None,
    train_dataset: PromptData | None,
    eval_dataset: PromptData | None,
    samples_dataset: datasets.Dataset | datasets.DatasetDict | None,
) -> tuple[PromptSource | None, list[Prompt], datasets.Dataset | None]:
    r"""
    The prompts of a run, chosen from a trainer's arguments and checked before anything is sampled.

    Args:
        config ([`GraftConfig`]):
            The run's configuration, of which `seed`, `eval_prompts` and `hub_token` are read.
        rewards (`Sequence[Reward]`):
            The reward functions, which are called with the columns of the prompts.
        pipeline (`DiffusionPipeline` or `None`):
            The pipeline; data sets need no prompts if its call takes none.
        prompt_function (`Callable` or `None`):
            See [`prompts_from_function`].
        train_dataset (`datasets.Dataset`, list of `str`, `str` or `None`):
            See [`prompts_from_dataset`]; or a list of prompts, or the name of a data set on the Hub.
        eval_dataset (`datasets.Dataset`, list of `str`, `str` or `None`):
            Held-out prompts with columns as those of `train_dataset`, in place of `config.eval_prompts`.
        samples_dataset (`datasets.Dataset`, `datasets.DatasetDict` or `None`):
            Samples of an earlier run, in place of prompts.

    Returns:
        `tuple[PromptSource | None, list[Prompt], datasets.Dataset | None]`: the source of prompts to sample images
            for, `None` with `samples_dataset`; the held-out prompts, none if none are given; and `train_dataset` as a
            data set.

    Raises:
        `ValueError`: not exactly one of the three sources is given, held-out prompts are given twice, a data set is
            of another type, is empty or lacks prompts, or a reward function cannot be called with its columns.
    """
    required = not callable(pipeline) or takes_prompts(pipeline)
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
    held_out = _held_out_prompts(config, eval_dataset, required)
    for _, columns in held_out[:1]:
        check_columns(rewards, columns, "eval_prompts" if eval_dataset is None else "eval_dataset")
    if train_dataset is not None:
        dataset = _as_dataset("train_dataset", train_dataset, required, config.hub_token)
        check_columns(rewards, _as_prompt(dataset[0])[1], "train_dataset")
        return prompts_from_dataset(dataset, config.seed, required), held_out, dataset
    if prompt_function is None:
        return None, held_out, None
    check_columns(rewards, ["metadata"], "prompt_function")
    return prompts_from_function(prompt_function), held_out, None


def _held_out_prompts(config: GraftConfig, eval_dataset: PromptData | None, required: bool) -> list[Prompt]:
    if eval_dataset is None:
        return with_columns(config.eval_prompts or [])
    if config.eval_prompts:
        raise ValueError("eval_dataset and config.eval_prompts both say what is held out; give one of them.")
    return [_as_prompt(row) for row in _as_dataset("eval_dataset", eval_dataset, required, config.hub_token)]


def with_columns(prompts: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None) -> list[Prompt]:
    """The P `prompts`, each with its values of the `columns` of P values; without any where there are no columns."""
    prompts = _checked_prompts("held-out prompts", [prompts] if isinstance(prompts, str) else prompts)
    return [
        (prompt, {name: values[i] for name, values in (columns or {}).items()}) for i, prompt in enumerate(prompts)
    ]


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


def check_group_size(config: GraftConfig, processes: int, is_sampling: bool = True) -> None:
    r"""
    Check that an iteration has more images of a prompt than are selected of them, and not too many.

    Args:
        config ([`GraftConfig`]):
            The run's configuration.
        processes (`int`):
            Number of processes of the run.
        is_sampling (`bool`, *optional*, defaults to `True`):
            Whether the run samples; `False` passes, because groups of stored samples are as large as they are.

    Raises:
        `ValueError`: its groups are too small or too large; the message names the fields.
    """
    images = config.sample_batch_size * config.sample_num_batches_per_epoch * processes
    size, k = config.group_size(images), config.acceptance_kwargs.get("k", 1)
    if is_sampling and size <= k:
        raise ValueError(
            f"sample_batch_size * sample_num_batches_per_epoch * processes = {images}: groups have {size} images, "
            f"of which k={k} cannot be selected. Sample more images per iteration."
        )
    if size > LARGEST_GROUP:
        raise ValueError(f"samples_per_prompt: groups of {size} images are too large; at most {LARGEST_GROUP} are.")


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
    # The starts come first, because no prompt may be taken beyond the last group.
    taken = enumerate(zip(range(0, images, group_size), prompts, strict=False))
    return [
        PromptGroup(index, prompt, min(group_size, images - start), columns)
        for index, (start, (prompt, columns)) in taken
    ]


def samples_of(groups: Sequence[PromptGroup], seed: int, purpose: str = "rollout", first: int = 0) -> list[Sample]:
    """All samples of `groups`, numbered from `first` on; see [`sample_seed`] for `seed` and `purpose`."""
    members = ((group, i) for group in groups for i in range(group.size))
    return [Sample(g, i, sample_seed(seed, purpose, n)) for n, (g, i) in enumerate(members, first)]


def columns_of(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Further columns of the prompts of `samples`, as lists."""
    return {
        name: [sample.group.columns.get(name) for sample in samples]
        for name in dict.fromkeys(name for sample in samples for name in sample.group.columns)
    }
