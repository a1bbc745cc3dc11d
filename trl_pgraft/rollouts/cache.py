# SPDX-License-Identifier: Apache-2.0

"""What an iteration has sampled and scored so far, on disk, so that an interrupted one continues where it was."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..core.seeding import seed_of
from ..core.tensor_files import load_tensors, save_tensors
from .prompts import Sample
from .rollout import NO_FLAGS, RolloutBatch


class RolloutCache:
    r"""
    The files of an iteration that no checkpoint has yet: for each batch one of images and states, and one of rewards
    once it is scored. A file is there whole or not at all.

    Args:
        folder (`Path`):
            The iteration's folder, shared by all processes of a machine.
        sampled_by (`str`):
            Fingerprint of the policy and of the sampling arguments; files with another one are not loaded.
        rewards (`Sequence[str]`):
            Names of the F rewards; rewards of other names are not loaded.
    """

    def __init__(self, folder: Path, sampled_by: str, rewards: Sequence[str]) -> None:
        self.folder = folder
        self._image_tags = {"drawn_by": sampled_by}
        self._reward_tags = {"drawn_by": sampled_by, "rewards": json.dumps(list(rewards))}

    def save_images(self, batch: RolloutBatch) -> None:
        """Write the images and states of a batch that was sampled."""
        tensors = {"images": batch.images, "x_i": batch.x_i, "calls": torch.tensor(batch.denoiser_calls)}
        self._save("images", batch.samples, {**tensors, "flagged": batch.flagged}, self._image_tags)

    def save_rewards(self, samples: Sequence[Sample], rewards: torch.Tensor) -> None:
        """Write the rewards (B, F) of B samples that were scored."""
        self._save("values", samples, {"values": rewards}, self._reward_tags)

    def load(self, samples: Sequence[Sample]) -> Iterator[RolloutBatch]:
        """Those of the `samples` that were sampled before, in batches with their rewards or not yet scored."""
        wanted, scored = {key_of(sample): sample for sample in samples}, self._load_rewards()
        for path in sorted(self.folder.glob("images-*.safetensors")):
            file = load_tensors(path, self._image_tags) or {"keys": torch.empty(0)}
            keys = file["keys"].tolist()
            rows = [row for row, key in enumerate(keys) if key in wanted]
            # A batch may have been scored in part, by other processes than the one that sampled it.
            for part in ([r for r in rows if keys[r] in scored], [r for r in rows if keys[r] not in scored]):
                if part:
                    # If other processes share the iteration now, each counts its part of a batch's calls.
                    calls = round(int(file["calls"]) * len(part) / len(keys))
                    own = [wanted.pop(keys[row]) for row in part]
                    flagged = file.get("flagged", NO_FLAGS).expand(len(keys))[part]
                    batch = RolloutBatch(own, file["images"][part], file["x_i"][part], calls, flagged=flagged)
                    rewards = [scored[keys[row]] for row in part if keys[row] in scored]
                    yield replace(batch, rewards=torch.stack(rewards)) if rewards else batch

    def _load_rewards(self) -> dict[int, torch.Tensor]:
        """Rewards (F,) of all samples that were scored, by their keys."""
        scored: dict[int, torch.Tensor] = {}
        for path in self.folder.glob("values-*.safetensors"):
            if file := load_tensors(path, self._reward_tags):
                scored.update(zip(file["keys"].tolist(), file["values"], strict=True))
        return scored

    def _save(
        self, kind: str, samples: Sequence[Sample], tensors: dict[str, torch.Tensor], tags: dict[str, str]
    ) -> None:
        keys = [key_of(sample) for sample in samples]
        path = self.folder / f"{kind}-{keys[0]:016x}.safetensors"
        save_tensors(path, {"keys": torch.tensor(keys), **tensors}, tags)


def key_of(sample: Sample) -> int:
    """A number for a sample's seed and prompt: a prompt function may return another prompt the second time."""
    return seed_of(sample.seed, sample.group.prompt)
