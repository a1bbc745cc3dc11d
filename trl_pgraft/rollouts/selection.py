# SPDX-License-Identifier: Apache-2.0

"""From a round's rewards to training rows: sum the rewards, accept group by group, pair rows with controls."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from ..core.acceptance import accept_best_of_n, accept_preference, accept_top_k, deduplicate, has_signal
from ..core.divergence import estimated_kl, implied_kl
from ..core.seeding import seed_of
from .dataset import INPUT_PREFIX
from .prompts import PromptGroup, Sample


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
class Rollout:
    """
    One round's samples of all processes, scored and decided.

    Args:
        groups (`list[PromptGroup]`):
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

    groups: list[PromptGroup]
    samples: list[Sample]
    states: torch.Tensor
    values: torch.Tensor
    reward: torch.Tensor
    decision: Decision
    denoiser_calls: int = 0

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset, rewards: Sequence[str]) -> "Rollout":
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
            PromptGroup(i, prompt, len(rows), own)
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


def accept(
    rewards: torch.Tensor,
    groups: Sequence[PromptGroup],
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
        groups (`Sequence[PromptGroup]`):
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


def combined_rewards(values: torch.Tensor, weights: Sequence[float], groups: Sequence[PromptGroup]) -> torch.Tensor:
    """
    Weighted sum of rewards.

    A function that leaves out a whole group does not speak about that prompt and is passed over there; one that leaves
    out some samples of a group leaves them out of the sum as well, because they cannot be compared.

    Args:
        values (`torch.Tensor` of shape `(N, F)`):
            Value of each function, NaN where it returned `None`.
        weights (`Sequence[float]`):
            `F` weights.
        groups (`Sequence[PromptGroup]`):
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


def accumulated_kl(progress: Any, round_: Rollout, config: Any) -> float:
    """
    KL to the reference that the rounds so far imply, this one included: their sum, or, where the policy drew all of
    them for one top-k selection without ties, the KL of the composed selections.

    Args:
        progress ([`~trl_pgraft.checkpoints.TrainerState`]):
            Has counted the rounds before, and counts this one.
        round_ ([`Rollout`]):
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
