# SPDX-License-Identifier: Apache-2.0

"""What a round has drawn and scored so far, on disk, so that an interrupted round goes on where it was."""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.seeding import seed_of
from .batch import Drawn
from .prompts import Sample


class UnfinishedRound:
    """
    The files of a round that no checkpoint has yet: one of images and states for each batch drawn, and one of values
    once it is scored. A file is there whole or not at all.

    Args:
        folder (`Path`):
            The round's folder, shared by all processes of a machine.
        drawn_by (`str`):
            Tells the policy and the sampling arguments; files of another are not taken.
        rewards (`Sequence[str]`):
            Names of the `F` rewards; values of others are not taken.
    """

    def __init__(self, folder: Path, drawn_by: str, rewards: Sequence[str]):
        self.folder = folder
        self._drawn_by = {"drawn_by": drawn_by}
        self._scored_by = {"drawn_by": drawn_by, "rewards": json.dumps(list(rewards))}

    def keep_images(self, samples: Sequence[Sample], drawn: Drawn) -> None:
        """Write a batch that was drawn."""
        tensors = {"images": drawn.images, "x_i": drawn.x_i, "calls": torch.tensor(drawn.denoiser_calls)}
        self._write("images", samples, tensors, self._drawn_by)

    def keep_values(self, samples: Sequence[Sample], values: torch.Tensor) -> None:
        """Write the values of shape `(B, F)` of a batch that was scored."""
        self._write("values", samples, {"values": values}, self._scored_by)

    def load(self, samples: Sequence[Sample]) -> Iterator[tuple[list[Sample], Drawn, torch.Tensor | None]]:
        """What is there of `samples`: batches with what was drawn, and their values where they were scored."""
        wanted, scored = {key_of(sample): sample for sample in samples}, self._values()
        for path in sorted(self.folder.glob("images-*.safetensors")):
            found = _read(path, self._drawn_by) or {"keys": torch.empty(0)}
            keys = found["keys"].tolist()
            rows = [row for row, key in enumerate(keys) if key in wanted]
            # A batch may have been scored in part, by other processes than those that drew it.
            for part in ([r for r in rows if keys[r] in scored], [r for r in rows if keys[r] not in scored]):
                if part:
                    # Where other processes share the round now, each counts its part of a batch's calls.
                    calls = round(int(found["calls"]) * len(part) / len(keys))
                    drawn = Drawn(found["images"][part], found["x_i"][part], calls)
                    values = [scored[keys[row]] for row in part if keys[row] in scored]
                    yield [wanted.pop(keys[row]) for row in part], drawn, torch.stack(values) if values else None

    def _values(self) -> dict[int, torch.Tensor]:
        """Values of shape `(F,)` of all samples that were scored, by their keys."""
        scored: dict[int, torch.Tensor] = {}
        for path in self.folder.glob("values-*.safetensors"):
            if file := _read(path, self._scored_by):
                scored.update(zip(file["keys"].tolist(), file["values"], strict=True))
        return scored

    def _write(self, kind: str, samples: Sequence[Sample], tensors: dict, tags: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = torch.tensor([key_of(sample) for sample in samples])
        path = self.folder / f"{kind}-{key_of(samples[0]):016x}.safetensors"
        aside = path.with_suffix(".tmp")
        save_file({"keys": keys, **{n: t.contiguous() for n, t in tensors.items()}}, aside, metadata=tags)
        os.replace(aside, path)


def key_of(sample: Sample) -> int:
    """Tells a sample: its seed, and its prompt, because a prompt function may answer otherwise the second time."""
    return seed_of(sample.seed, sample.group.prompt)


def _read(path: Path, tags: dict[str, str]) -> dict[str, torch.Tensor] | None:
    """Tensors of a file, unless there is none, it is damaged, or it is of another policy or other rewards."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys()} if file.metadata() == tags else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{path} cannot be read ({error}); what it held is drawn or scored again.", stacklevel=2)
        return None
