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
    Training rows of one pass: each sample once with each number of its training timesteps.

    Args:
        states (`torch.Tensor` of shape `(R,)`, int64):
            Index of each row's state x_I among the states of its rollout.
        prompts (`torch.Tensor` of shape `(R,)`, int64):
            Index of each row's conditioning.
        seeds (`list[int]`):
            Seed of the timesteps and noise of each row's sample.
        uses (`torch.Tensor` of shape `(R,)`, int64):
            Number of each row's timestep among those of its sample.
    """

    states: torch.Tensor
    prompts: torch.Tensor
    seeds: list[int]
    uses: torch.Tensor

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, index: torch.Tensor) -> "Rows":
        """The rows at `index`."""
        seeds = [self.seeds[i] for i in index.tolist()]
        return Rows(self.states[index], self.prompts[index], seeds, self.uses[index])


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
        prompt_rows (`torch.Tensor` of shape `(R,)`, int64):
            Index of each accepted sample's prompt among these.
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
        self.prompt_rows = torch.tensor([index_of[key] for key in keys], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.accepted)

    def passes(self, timesteps: int = 1, control: bool = False) -> Iterator[Rows]:
        r"""
        Rows of each pass, each sample at each of its timesteps, shuffled together.

        Args:
            timesteps (`int`, *optional*, defaults to `1`):
                Training timesteps of each sample in a pass.
            control (`bool`, *optional*, defaults to `False`):
                Samples without selection in place of the accepted ones.
        """
        for number in range(self.number_of_passes):
            seeds = [seed_of(*self._seed_parts, number, row) for row in self.accepted.tolist()]
            states = self._unselected(number) if control else self.accepted
            pairs = self._shuffled(len(self) * timesteps, "order", number)
            rows, uses = pairs // timesteps, pairs % timesteps
            yield Rows(states[rows], self.prompt_rows[rows], [seeds[row] for row in rows.tolist()], uses)

    def _unselected(self, number: int) -> torch.Tensor:
        """For each accepted sample one of its group, taking turns, so that passes cover the group evenly."""
        states, scored = torch.empty_like(self.accepted), self._scored.nonzero().flatten()
        members_of = self._by_group(scored)
        for group, rows in self._by_group(self.accepted).items():
            members = scored[members_of[group]]
            members = members[self._shuffled(len(members), "control", group)]
            states[rows] = members[(number * len(rows) + torch.arange(len(rows))) % len(members)]
        return states

    def _by_group(self, samples: torch.Tensor) -> dict[int, torch.Tensor]:
        """Places of the samples of each group in `samples`."""
        groups, order = self._groups[samples].sort(stable=True)
        found, counts = groups.unique_consecutive(return_counts=True)
        return dict(zip(found.tolist(), order.split(counts.tolist()), strict=True))

    def _shuffled(self, count: int, *parts: Any) -> torch.Tensor:
        return torch.randperm(count, generator=generator_of(*self._seed_parts, *parts))


def count_microbatches(rows: int, config: GraftConfig, processes: int) -> int:
    """Microbatches that each of `processes` computes in one fine-tuning on `rows` samples."""
    batches = math.ceil(rows * config.num_train_timesteps / (config.train_batch_size * processes))
    return batches * config.train_num_inner_epochs


@dataclass(frozen=True)
class Microbatch:
    r"""
    What a process computes at a time.

    Args:
        rows ([`Rows`]):
            At least one row.
        weight (`float`):
            Factor of the sum of their losses, by which the gradients that the processes average and accumulate over an
            optimizer step are the mean over all its rows; 0 where a process has no rows left and computes another's.
        ends_step (`bool`):
            Whether it is the last one of its optimizer step.
    """

    rows: Rows
    weight: float
    ends_step: bool


def microbatches_of(passes: Iterable[Rows], config: GraftConfig, accelerator: Accelerator) -> Iterator[Microbatch]:
    """This process's part of each global batch of the passes; the last batch of a pass is smaller, never filled up."""
    processes, own = accelerator.num_processes, accelerator.process_index
    size = config.train_batch_size * processes
    batches = [rows.take(part) for rows in passes for part in torch.arange(len(rows)).split(size)]
    for start in range(0, len(batches), config.train_gradient_accumulation_steps):
        step = batches[start : start + config.train_gradient_accumulation_steps]
        weight = processes / sum(map(len, step))
        for number, rows in enumerate(step, 1):
            part = torch.arange(own, len(rows), processes)
            # Every process takes part in the exchange of gradients, also where no row is left for it.
            mine = rows.take(part if len(part) else torch.tensor([0]))
            yield Microbatch(mine, weight if len(part) else 0.0, ends_step=number == len(step))
