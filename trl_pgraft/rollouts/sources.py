# SPDX-License-Identifier: Apache-2.0

"""The prompts or samples of a run, chosen from a trainer's arguments and checked before anything is sampled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from diffusers import DiffusionPipeline

from ..adapters.policy import Policy
from ..config import GraftConfig
from ..pipelines.inputs import check_held_out, takes_prompts
from ..rewards.conventions import Reward
from .dataset import check_samples, example_columns
from .prompts import Prompt, PromptSource, choose_prompt_source, held_out_prompts


@dataclass(frozen=True)
class RunData:
    """
    The prompts or samples of a run.

    Args:
        source (`Callable` or `None`):
            `source(epoch, groups)` gives the prompts of an iteration; `None` for a run on samples that it was given.
        held_out (`list[Prompt]`):
            Prompts of an evaluation, each with its further columns; empty where there are none.
        samples (`datasets.Dataset`, `datasets.DatasetDict` or `None`):
            Samples of an earlier run, as they were given; `None` for a run that samples.
        example (`dict[str, Any]`):
            Further columns of one prompt of training.
    """

    source: PromptSource | None
    held_out: list[Prompt]
    samples: datasets.Dataset | datasets.DatasetDict | None
    example: dict[str, Any]

    @classmethod
    def choose(
        cls,
        config: GraftConfig,
        pipeline: DiffusionPipeline | None,
        prompt_function: Callable[[], tuple[str, Any]] | None,
        train_dataset: datasets.Dataset | None,
        eval_dataset: datasets.Dataset | None,
        samples_dataset: datasets.Dataset | datasets.DatasetDict | None,
    ) -> "RunData":
        """
        The prompts or samples that a trainer's arguments give.

        Args:
            config ([`GraftConfig`]):
                The run's configuration, of which `seed` and `eval_prompts` are read.
            pipeline (`DiffusionPipeline` or `None`):
                The pipeline; prompts may be missing if its call takes none.
            prompt_function (`Callable` or `None`):
                Returns a prompt and its metadata.
            train_dataset (`datasets.Dataset` or `None`):
                Prompts with further columns.
            eval_dataset (`datasets.Dataset` or `None`):
                Held-out prompts with columns as those of `train_dataset`.
            samples_dataset (`datasets.Dataset`, `datasets.DatasetDict` or `None`):
                Samples of an earlier run, in place of prompts.

        Raises:
            `ValueError`: not exactly one source was given, or one lacks prompts.
        """
        required = not callable(pipeline) or takes_prompts(pipeline)
        source = choose_prompt_source(config.seed, prompt_function, train_dataset, samples_dataset, required)
        held_out = held_out_prompts(config.eval_prompts, eval_dataset, required)
        example = example_columns(samples_dataset if train_dataset is None else train_dataset)
        return cls(source, held_out, samples_dataset, example)

    def check_group_size(self, config: GraftConfig, processes: int) -> None:
        """
        Check that an iteration has more images of a prompt than are selected of them.

        Args:
            config ([`GraftConfig`]):
                The run's configuration.
            processes (`int`):
                Number of processes of the run.

        Raises:
            `ValueError`: the run samples, and its groups are too small; the message names the fields.
        """
        images = config.sample_batch_size * config.sample_num_batches_per_epoch * processes
        size, k = config.group_size(images), config.acceptance_kwargs.get("k", 1)
        if self.samples is None and size <= k:
            raise ValueError(
                f"sample_batch_size * sample_num_batches_per_epoch * processes = {images}: groups have {size} images, "
                f"of which k={k} cannot be selected. Sample more images per iteration."
            )

    def checked_samples(self, policy: Policy, rewards: Sequence[Reward]) -> datasets.Dataset | None:
        """
        The samples to train on, after a check of samples and held-out prompts against the policy.

        Args:
            policy ([`Policy`]):
                Samples must be of its model, scheduler and sampling arguments; held-out prompts must have the images,
                labels and the like that it gets in training.
            rewards (`Sequence[Reward]`):
                Reward functions whose values samples must have.

        Raises:
            `ValueError`: samples or held-out prompts lack columns, or the samples are of another model or sampler.
        """
        for _, columns in self.held_out:
            check_held_out(policy.pipeline, policy.inputs_of(self.example), policy.inputs_of(columns))
        if self.samples is None:
            return None
        return check_samples(self.samples, policy.fingerprint, [reward.name for reward in rewards])
