# SPDX-License-Identifier: Apache-2.0

"""Training rows of a rollout: accepted samples, or unselected ones as a reference."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..core.seeding import seed_of
from ..rollouts.rollout import Rollout


@dataclass(frozen=True)
class Rows:
    """
    Training rows of one pass.

    Args:
        states (`torch.Tensor` of shape `(R,)`):
            Index of each row's state x_I.
        prompts (`torch.Tensor` of shape `(R,)`):
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
    """
    Training rows of a round: its accepted samples, or, as a control, as many samples of the same groups unselected.

    Both have equal prompts, timesteps and noise row by row, so that the difference of two fits is the selection.

    Args:
        round_ ([`Rollout`]):
            What was drawn and accepted.
        passes (`int`):
            Passes over the accepted samples.
        seed_parts (`Iterable`):
            Seed of the order and of each row.
        inputs_of (`Callable`, *optional*):
            Which of a group's columns the pipeline is handed; none where not given.
    """

    def __init__(
        self,
        round_: Rollout,
        passes: int,
        seed_parts: Iterable[Any],
        inputs_of: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ):
        self.accepted = round_.accepted.nonzero().flatten()
        self.number_of_passes = passes
        self._seed_parts = list(seed_parts)
        self._groups = torch.tensor([sample.group.index for sample in round_.samples])
        self._scored = ~round_.total_reward.isnan()
        groups = [round_.samples[i].group for i in self.accepted.tolist()]
        # Groups with inputs of their own are told apart; the others share the conditioning of equal prompts.
        own = [inputs_of(group.columns) if inputs_of else {} for group in groups]
        keys = [(group.prompt, group.index if inputs else None) for group, inputs in zip(groups, own, strict=True)]
        distinct = dict(zip(keys, own, strict=True))
        self.prompts = [prompt for prompt, _ in distinct]
        self.inputs = list(distinct.values())
        positions = {key: position for position, key in enumerate(distinct)}
        self._prompt_rows = torch.tensor([positions[key] for key in keys], dtype=torch.long)

    def __len__(self) -> int:
        return len(self.accepted)

    def passes(self, control: bool = False) -> Iterator[Rows]:
        """Shuffled rows of each pass; with `control`, unselected samples in place of the accepted ones."""
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
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*self._seed_parts, *parts)))
