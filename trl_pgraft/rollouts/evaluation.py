# SPDX-License-Identifier: Apache-2.0

"""Images of held-out prompts and their rewards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..rewards.conventions import Reward
from .collect import RolloutCollector
from .prompts import Prompt


@dataclass(frozen=True)
class Evaluation:
    """
    Images of held-out prompts and their rewards.

    Args:
        reward (`torch.Tensor` of shape `(P,)`):
            Weighted sum of the rewards of each prompt, over all processes.
        values (`torch.Tensor` of shape `(P, F)`):
            Value of each reward function, NaN where left out.
        images (`torch.Tensor` of shape `(p, 3, H, W)`, uint8):
            Images of this process's prompts.
    """

    reward: torch.Tensor
    values: torch.Tensor
    images: torch.Tensor

    @classmethod
    def sample(
        cls,
        collector: RolloutCollector,
        held_out: Sequence[Prompt],
        prompts: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        reference: bool = False,
    ) -> "Evaluation":
        """
        Sample one image of each prompt, with seeds that depend on its place alone, and score it.

        Args:
            collector ([`RolloutCollector`]):
                Samples and scores.
            held_out (`Sequence[Prompt]`):
                Held-out prompts of the run.
            prompts (`Sequence[str]`, *optional*):
                `P` prompts in place of them.
            columns (`Mapping[str, Sequence[Any]]`, *optional*):
                Further columns of `prompts`, of `P` values each.
            reference (`bool`, *optional*, defaults to `False`):
                Whether to sample with the reference model in place of the policy.

        Raises:
            `ValueError`: there are no prompts.
        """
        if prompts is not None:
            rows = columns or {}
            held_out = [(prompt, {name: rows[name][i] for name in rows}) for i, prompt in enumerate(prompts)]
        if not held_out:
            raise ValueError("evaluate: no prompts given, and neither eval_dataset nor config.eval_prompts has any.")
        return cls(*collector.sample_evaluation(held_out, reference))

    def metrics(self, rewards: Sequence[Reward]) -> dict[str, float]:
        """Means over the prompts, by the names that are logged; `rewards` are the `F` reward functions."""
        means = self.values.nanmean(0).tolist()
        by_function = {f"eval/rewards/{r.name}/mean": mean for r, mean in zip(rewards, means, strict=True)}
        return {**by_function, "eval/reward": self.reward.nanmean().item()}
