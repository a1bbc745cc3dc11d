# SPDX-License-Identifier: Apache-2.0

"""What was sampled: a process's batches with their states, an iteration's samples, and images of held-out prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .prompts import PromptGroup, Sample, columns_of


NO_FLAGS = torch.tensor(torch.nan)  # of any number of images of a pipeline that reports none


@dataclass(frozen=True)
class RolloutBatch:
    r"""
    Samples of one process, scored or not yet.

    Args:
        samples (`Sequence[Sample]`):
            The B samples.
        images (`torch.Tensor`):
            Final images (B, 3, H, W), uint8, on the host; of a video pipeline (B, F, 3, H, W).
        x_i (`torch.Tensor`):
            The recorded states x_I (B, ...), float32, as the denoiser receives them, on the host.
        denoiser_calls (`int`):
            Denoiser evaluations that sampling took, counted per image and branch of guidance.
        rewards (`torch.Tensor`, *optional*):
            Rewards (B, F), float64, NaN where a function left a sample out; of shape (0, 0) until they are scored.
        infos (`list`, *optional*):
            The F reward functions' infos; empty for a batch that is not scored, or was scored before an interruption.
        flagged (`torch.Tensor`, *optional*):
            1 for each image that the pipeline's safety checker flagged, 0 for each other (B,). Flagged images come
            back black and are not scored: their rewards are NaN. NaN where the pipeline reports no flags.
    """

    samples: Sequence[Sample]
    images: torch.Tensor
    x_i: torch.Tensor
    denoiser_calls: int
    rewards: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    infos: list[Any] = field(default_factory=list)
    flagged: torch.Tensor = NO_FLAGS

    @property
    def is_scored(self) -> bool:
        """Whether the samples have their rewards."""
        return len(self.rewards) == len(self.samples)

    @property
    def prompts(self) -> list[str]:
        """The samples' prompts."""
        return [sample.group.prompt for sample in self.samples]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Further columns of the samples' prompts, as lists."""
        return columns_of(self.samples)

    @classmethod
    def collate(cls, samples: Sequence[Sample], batches: Sequence["RolloutBatch"]) -> "RolloutBatch":
        """One batch of the `samples`, in their order, from scored `batches` that have each of them; without infos."""
        rows = {sample.seed: row for row, sample in enumerate(s for batch in batches for s in batch.samples)}
        order = torch.tensor([rows[sample.seed] for sample in samples])
        images, x_i, rewards = (
            torch.cat([getattr(batch, name) for batch in batches])[order] for name in ("images", "x_i", "rewards")
        )
        flagged = torch.cat([batch.flagged.expand(len(batch.samples)) for batch in batches])[order]
        return cls(samples, images, x_i, sum(batch.denoiser_calls for batch in batches), rewards, flagged=flagged)


@dataclass(frozen=True)
class Rollout:
    r"""
    One iteration's samples of all processes, scored and selected.

    Args:
        groups (`list[PromptGroup]`):
            The prompts, each with the number of its samples.
        samples (`list[Sample]`):
            All N samples, group by group.
        states (`torch.Tensor`):
            x_I of each sample (N, ...).
        rewards (`torch.Tensor`):
            Rewards (N, F), NaN where a function left a sample out.
        total_reward (`torch.Tensor`):
            Weighted sum of each sample's rewards (N,), NaN where the sample is left out; see [`total_rewards`].
        accepted (`torch.Tensor`):
            Which samples are accepted (N,), bool.
        implied_kl (`float`, *optional*, defaults to NaN):
            KL from the accepted to all samples that the acceptance rule implies, averaged over groups, in nats.
        groups_skipped (`int`, *optional*, defaults to `0`):
            Number of groups with fewer than two scored samples, of which none is accepted.
        denoiser_calls (`int`, *optional*, defaults to `0`):
            Denoiser evaluations that sampling took, counted per image and branch of guidance.
        flagged (`torch.Tensor`, *optional*):
            Which images the pipeline's safety checker flagged (N,), see [`RolloutBatch`].
    """

    groups: list[PromptGroup]
    samples: list[Sample]
    states: torch.Tensor
    rewards: torch.Tensor
    total_reward: torch.Tensor
    accepted: torch.Tensor
    implied_kl: float = float("nan")
    groups_skipped: int = 0
    denoiser_calls: int = 0
    flagged: torch.Tensor = NO_FLAGS

    def captions(self) -> list[str]:
        """A caption for each sample's picture: total reward, whether it is accepted, and prompt."""
        rows = zip(self.samples, self.total_reward.tolist(), self.accepted.tolist(), strict=True)
        return [f"{reward:.3g}{', accepted' if taken else ''}: {s.group.prompt}" for s, reward, taken in rows]

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Metrics to log, in the names of TRL's trainers; `names` are those of the F rewards."""
        scored, total, accepted = ~self.total_reward.isnan(), self.total_reward, self.accepted
        by_group = [group[~group.isnan()] for group in total.split([g.size for g in self.groups])]
        deviations = torch.stack([group.std() for group in by_group if len(group) > 1] or [torch.tensor(torch.nan)])
        per_reward = {
            f"rewards/{name}/{statistic}": getattr(torch, statistic)(column[~column.isnan()]).item()
            for name, column in zip(names, self.rewards.T, strict=True)
            for statistic in ("mean", "std")
        }
        return {
            **per_reward,
            "reward": total[scored].mean().item(),
            "reward_std": total[scored].std().item(),
            "reward_accepted": total[accepted].mean().item(),
            "group_reward_std": deviations.mean().item(),
            "frac_reward_zero_std": (deviations == 0).float().mean().item(),
            "acceptance_rate": accepted.float().mean().item(),
            "accepted": accepted.sum().item(),
            "groups_skipped": self.groups_skipped,
            "implied_kl": self.implied_kl,
            **_count(self.flagged, "flagged"),
        }


@dataclass(frozen=True)
class Evaluation:
    r"""
    Images of held-out prompts and their rewards.

    Args:
        reward (`torch.Tensor`):
            Weighted sum of the rewards of each of P prompts (P,), over all processes; NaN where a sample is left out.
        values (`torch.Tensor`):
            Rewards (P, F), NaN where a function left a sample out.
        images (`torch.Tensor`):
            Images of this process's share of the prompts, uint8, each of shape (3, H, W); of videos (F, 3, H, W).
        flagged (`torch.Tensor`, *optional*):
            Which images the pipeline's safety checker flagged (P,), see [`RolloutBatch`].
    """

    reward: torch.Tensor
    values: torch.Tensor
    images: torch.Tensor
    flagged: torch.Tensor = NO_FLAGS

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Means over the prompts, by the names that are logged; `names` are those of the F rewards."""
        means = zip(names, self.values.nanmean(0).tolist(), strict=True)
        return {
            **{f"eval/rewards/{name}/mean": mean for name, mean in means},
            "eval/reward": self.reward.nanmean().item(),
            **_count(self.flagged, "eval/flagged"),
        }


def _count(flagged: torch.Tensor, name: str) -> dict[str, float]:
    """The number of flagged images, to log as `name`; nothing where the pipeline reports no flags."""
    return {} if flagged.isnan().all() else {name: int(flagged.nansum())}
