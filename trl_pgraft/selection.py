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


"""From a round's rewards to training rows: sum the rewards, accept group by group, pair rows with controls."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from .acceptance import (
    accept_best_of_n,
    accept_preference,
    accept_top_k,
    deduplicate,
    estimated_kl,
    has_signal,
    implied_kl,
)
from .fine_tuning import Rows
from .rollout import Group, Sample, seed_of
from .samples import INPUT_PREFIX


RANK_RULES = (accept_top_k, accept_best_of_n, accept_preference)


@dataclass(frozen=True)
class Decision:
    """
    Which samples of a round are accepted.

    Args:
        accepted (`torch.Tensor` of shape `(N,)`, bool):
            Accepted samples.
        implied_kl (`float`):
            KL to the sampling law that the rule implies, averaged over groups, in nats.
        without_signal (`float`):
            Share of groups whose rewards are all equal.
        skipped (`int`):
            Groups with fewer than two scored samples.
    """

    accepted: torch.Tensor
    implied_kl: float
    without_signal: float
    skipped: int


@dataclass(frozen=True)
class Round:
    """
    One round's samples of all processes, scored and decided.

    Args:
        groups (`list[Group]`):
            The groups.
        samples (`list[Sample]`):
            All `N` samples, group by group.
        states (`torch.Tensor` of shape `(N, ...)`):
            x_I of each.
        values (`torch.Tensor` of shape `(N, F)`):
            Value of each reward function, NaN where left out.
        reward (`torch.Tensor` of shape `(N,)`):
            Their weighted sum.
        decision ([`Decision`]):
            What is accepted.
        denoiser_calls (`int`, *optional*, defaults to `0`):
            What drawing them took, counted per image and branch.
    """

    groups: list[Group]
    samples: list[Sample]
    states: torch.Tensor
    values: torch.Tensor
    reward: torch.Tensor
    decision: Decision
    denoiser_calls: int = 0

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset, rewards: Sequence[str]) -> "Round":
        """The round stored in a dataset of samples; `rewards` names the functions whose columns are read."""
        # By way of pandas, because the numpy format makes rewards float32.
        inputs = [name for name in dataset.column_names if name.startswith(INPUT_PREFIX)]
        table = dataset.remove_columns(["image", "x_I", *inputs]).to_pandas()
        states = torch.as_tensor(dataset.select_columns("x_I").with_format("numpy")[:]["x_I"])
        # The numbers of groups start anew in each round.
        members: dict[tuple[int, int, str], list[int]] = {}
        for row, key in enumerate(zip(table["round"], table["group"], table["prompt"], strict=True)):
            members.setdefault(key, []).append(row)
        stored = dataset.select_columns(inputs) if inputs else [{}] * len(dataset)
        columns = [
            {name.removeprefix(INPUT_PREFIX): value for name, value in stored[rows[0]].items()}
            for rows in members.values()
        ]
        groups = [
            Group(i, prompt, len(rows), own)
            for i, (((*_, prompt), rows), own) in enumerate(zip(members.items(), columns, strict=True))
        ]
        order = [row for rows in members.values() for row in rows]
        seeds = iter(order)
        samples = [Sample(g, i, int(table["seed"][next(seeds)])) for g in groups for i in range(g.size)]
        stored = {name: torch.tensor(table[name].to_numpy())[order] for name in table if name.startswith("reward")}
        values = [stored[f"reward_{name}"] for name in rewards]
        return cls(
            groups,
            samples,
            states[order],
            torch.stack(values, dim=1) if values else torch.empty(len(order), 0),
            stored["reward"],
            Decision(torch.tensor(table["accepted"].to_numpy())[order], float("nan"), float("nan"), 0),
        )

    def captions(self) -> list[str]:
        """What is written under each sample's picture: reward, whether it is accepted, and prompt."""
        rows = zip(self.samples, self.reward.tolist(), self.decision.accepted.tolist(), strict=True)
        return [f"{reward:.3g}{', accepted' if taken else ''}: {s.group.prompt}" for s, reward, taken in rows]

    def metrics(self, rewards: Sequence[str]) -> dict[str, float]:
        """What is logged of a round; names as users of TRL's trainers know them."""
        scored, reward, accepted = ~self.reward.isnan(), self.reward, self.decision.accepted
        spreads = [group[~group.isnan()] for group in reward.split([g.size for g in self.groups])]
        deviations = torch.stack([group.std() for group in spreads if len(group) > 1] or [torch.tensor(torch.nan)])
        per_reward = {
            f"rewards/{name}/{statistic}": getattr(torch, statistic)(column[~column.isnan()]).item()
            for name, column in zip(rewards, self.values.T, strict=True)
            for statistic in ("mean", "std")
        }
        return {
            **per_reward,
            "reward": reward[scored].mean().item(),
            "reward_std": reward[scored].std().item(),
            "reward_accepted": reward[accepted].mean().item(),
            "group_reward_std": deviations.mean().item(),
            "frac_reward_zero_std": (deviations == 0).float().mean().item(),
            "acceptance_rate": accepted.float().mean().item(),
            "accepted": accepted.sum().item(),
            "groups_skipped": self.decision.skipped,
            "implied_kl": self.decision.implied_kl,
        }


class SelectedRows:
    """
    Training rows of a round: its accepted samples, or, as a control, as many samples of the same groups unselected.

    Both have equal prompts, timesteps and noise row by row, so that the difference of two fits is the selection.

    Args:
        round_ ([`Round`]):
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
        round_: Round,
        passes: int,
        seed_parts: Iterable[Any],
        inputs_of: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ):
        self.accepted = round_.decision.accepted.nonzero().flatten()
        self.number_of_passes = passes
        self._seed_parts = list(seed_parts)
        self._groups = torch.tensor([sample.group.index for sample in round_.samples])
        self._scored = ~round_.reward.isnan()
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


def accept(
    rewards: torch.Tensor,
    groups: Sequence[Group],
    rule: Callable[..., torch.Tensor],
    rule_kwargs: dict[str, Any],
    seed_parts: Iterable[Any],
    keys: Sequence[Any] | None = None,
) -> Decision:
    """
    Accept samples group by group.

    Args:
        rewards (`torch.Tensor` of shape `(N,)`):
            Rewards in the order of [`samples_of`]; NaN leaves a sample out.
        groups (`Sequence[Group]`):
            The groups.
        rule (`Callable`):
            Acceptance rule, see `trl_pgraft.acceptance`.
        rule_kwargs (`dict`):
            Its arguments; `k` is scaled down in a smaller group.
        seed_parts (`Iterable`):
            Seed of the draws that an acceptance probability between 0 and 1 needs.
        keys (`Sequence`, *optional*):
            `N` keys of equal samples, of which one is accepted.
    """
    generator = torch.Generator().manual_seed(seed_of(*seed_parts))
    accepted = torch.zeros(len(rewards), dtype=torch.bool)
    kls, equal, skipped, start = [], 0, 0, 0
    for group in groups:
        rows = torch.arange(start, start + group.size)
        start += group.size
        rows = rows[~rewards[rows].isnan()]
        draws = torch.rand(group.size, generator=generator)[: len(rows)]
        if len(rows) < 2:
            skipped += 1
            continue
        values = rewards[rows]
        kwargs = _scaled(rule_kwargs, groups[0].size, len(rows))
        probabilities = rule(values, **kwargs)
        if keys is not None:
            probabilities = deduplicate(probabilities, [keys[row] for row in rows])
        accepted[rows] = draws < probabilities
        kls.append(_group_kl(values, rule, probabilities))
        equal += not has_signal(values)
    scored = max(1, len(groups) - skipped)
    return Decision(accepted, sum(kls) / max(1, len(kls)), equal / scored, skipped)


def _scaled(kwargs: dict[str, Any], full: int, size: int) -> dict[str, Any]:
    if "k" not in kwargs or size == full:
        return kwargs
    return {**kwargs, "k": min(size - 1, max(1, round(kwargs["k"] * size / full)))}


def _group_kl(values: torch.Tensor, rule: Callable, probabilities: torch.Tensor) -> float:
    """Implied KL of one group; with ties, the group's own shares stand for the reward's atoms."""
    if rule not in RANK_RULES:
        return estimated_kl(probabilities)
    k = int(probabilities.count_nonzero())
    if k == 0:
        return 0.0
    _, counts = values.unique(return_counts=True)
    atoms = None if len(counts) == len(values) else tuple((counts / counts.sum()).tolist())
    return implied_kl(len(values), k, atoms=atoms)


def combined_rewards(values: torch.Tensor, weights: Sequence[float], groups: Sequence[Group]) -> torch.Tensor:
    """
    Weighted sum of rewards.

    A function that leaves out a whole group does not speak about that prompt and is passed over there; one that leaves
    out some samples of a group leaves them out of the sum as well, because they cannot be compared.

    Args:
        values (`torch.Tensor` of shape `(N, F)`):
            Value of each function, NaN where it returned `None`.
        weights (`Sequence[float]`):
            `F` weights.
        groups (`Sequence[Group]`):
            The groups.

    Returns:
        `torch.Tensor` of shape `(N,)`, NaN where a sample is left out.
    """
    parts = []
    for block in values.split([group.size for group in groups]):
        silent = block.isnan().all(0)
        total = torch.where(silent, 0.0, block * torch.tensor(weights, dtype=block.dtype)).sum(1)
        parts.append(torch.where(silent.all(), torch.nan, total))
    return torch.cat(parts)


def accumulated_kl(progress: Any, round_: Round, config: Any) -> float:
    """
    KL to the reference that the rounds so far imply, this one included: their sum, or, where the policy drew all of
    them for one top-k selection without ties, the KL of the composed selections.

    Args:
        progress ([`~trl_pgraft.checkpoints.Progress`]):
            Has counted the rounds before, and counts this one.
        round_ ([`Round`]):
            This round.
        config ([`GraftConfig`]):
            Its acceptance rule, and who draws.
    """
    kl, size = round_.decision.implied_kl, round_.groups[0].size
    if config.sample_from == "reference":
        return kl
    k = config.acceptance_kwargs.get("k", max(1, round(size / 4)))
    progress.kl_rounds, progress.kl_sum = progress.kl_rounds + 1, progress.kl_sum + kl
    is_top_k = config.acceptance == "top_k" and k < size
    progress.kl_composes &= is_top_k and abs(kl - implied_kl(size, k)) < 1e-9
    return implied_kl(size, k, rounds=progress.kl_rounds) if progress.kl_composes else progress.kl_sum
