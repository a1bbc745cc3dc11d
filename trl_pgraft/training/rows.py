# SPDX-License-Identifier: Apache-2.0

"""
Training rows of a rollout: its accepted samples, or samples of the same groups without selection; and their
microbatches.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from ..config import GraftConfig
from ..core.seeding import generator_of, seed_of
from ..rollouts.rollout import Rollout


@dataclass(frozen=True)
class Rows:
    r"""
    Training rows of one pass.

    Args:
        states (`torch.Tensor` of shape `(R,)`, int64):
            Index of each row's state x_I among the states of its rollout.
        prompts (`torch.Tensor` of shape `(R,)`, int64):
            Index of each row's conditioning.
        seeds (`list[int]`):
            Seed of each row's timesteps and noise.
    """

    states: torch.Tensor
    prompts: torch.Tensor
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, index: torch.Tensor) -> "Rows":
        """The rows at `index`."""
        return Rows(self.states[index], self.prompts[index], [self.seeds[i] for i in index.tolist()])


class SelectedRows:
    r"""
    Training rows of an iteration: its accepted samples, or, for the reference fit, as many samples of the same groups
    without selection.

    Both have equal prompts, timesteps and noise row by row, so that the two adapters differ by the selection alone.

    Args:
        rollout ([`Rollout`]):
            The iteration's samples, scored and decided.
        passes (`int`):
            Passes over the accepted samples.
        seed_parts (`Iterable`):
            Seed of the order and of each row, as parts of [`seed_of`].
        inputs_of (`Callable`, *optional*):
            Maps a group's columns to those that the pipeline's call takes; it takes none where not given.

    Attributes:
        accepted (`torch.Tensor` of shape `(R,)`, int64):
            Indices of the accepted samples in the rollout.
        prompts (`list[str]`):
            Prompts whose conditioning the rows need, each once.
        inputs (`list[dict]`):
            What the pipeline's call takes of each of these prompts' columns.
    """

    def __init__(
        self,
        rollout: Rollout,
        passes: int,
        seed_parts: Iterable[Any],
        inputs_of: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ):
        self.accepted = rollout.accepted.nonzero().flatten()
        self.number_of_passes = passes
        self._seed_parts = list(seed_parts)
        self._groups = torch.tensor([sample.group.index for sample in rollout.samples])
        self._scored = ~rollout.total_reward.isnan()
        groups = [rollout.samples[i].group for i in self.accepted.tolist()]
        # Groups with inputs of their own have their own conditioning; the others share that of equal prompts.
        own = [inputs_of(group.columns) if inputs_of else {} for group in groups]
        keys = [(group.prompt, group.index if inputs else None) for group, inputs in zip(groups, own, strict=True)]
        distinct = dict(zip(keys, own, strict=True))
        self.prompts = [prompt for prompt, _ in distinct]
        self.inputs = list(distinct.values())
        index_of = {key: index for index, key in enumerate(distinct)}
        self._prompt_rows = torch.tensor([index_of[key] for key in keys], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.accepted)

    def passes(self, control: bool = False) -> Iterator[Rows]:
        r"""
        Shuffled rows of each pass.

        Args:
            control (`bool`, *optional*, defaults to `False`):
                Samples without selection in place of the accepted ones.
        """
        for number in range(self.number_of_passes):
            seeds = [seed_of(*self._seed_parts, number, row) for row in self.accepted.tolist()]
            states = self._unselected(number) if control else self.accepted
            yield Rows(states, self._prompt_rows, seeds).take(self._shuffled(len(self), "order", number))

    def _unselected(self, number: int) -> torch.Tensor:
        """For each accepted sample one of its group, taking turns, so that passes cover the group evenly."""
        states = torch.empty_like(self.accepted)
        groups = self._groups[self.accepted]
        for group in groups.unique().tolist():
            rows = (groups == group).nonzero().flatten()
            members = ((self._groups == group) & self._scored).nonzero().flatten()
            members = members[self._shuffled(len(members), "control", group)]
            states[rows] = members[(number * len(rows) + torch.arange(len(rows))) % len(members)]
        return states

    def _shuffled(self, count: int, *parts: Any) -> torch.Tensor:
        return torch.randperm(count, generator=generator_of(*self._seed_parts, *parts))


def count_microbatches(rows: int, config: GraftConfig, processes: int) -> int:
    """Microbatches that each of `processes` computes in one fine-tuning on `rows` rows."""
    batches = math.ceil(rows / (config.train_batch_size * processes))
    return batches * config.num_train_timesteps * config.train_num_inner_epochs


def microbatches_of(
    passes: Iterable[Rows], config: GraftConfig, accelerator: Accelerator
) -> Iterator[tuple[Rows, int]]:
    """This process's part of each global batch of the passes, once with each number of its training timesteps."""
    size, count = config.train_batch_size, accelerator.num_processes
    for rows in passes:
        for start in range(0, len(rows), size * count):
            # The last batch is filled up from the first rows of the (shuffled) pass: every process has work.
            own = torch.arange(start, start + size) + accelerator.process_index * size
            for k in range(config.num_train_timesteps):
                yield rows.take(own % len(rows)), k
