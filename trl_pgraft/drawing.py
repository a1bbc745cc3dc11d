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



"""Draw samples and score them as they come; what an interrupted round left on disk is taken from there."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .rewards import Scorer
from .rollout import Drawn, Sample, columns_of
from .unfinished import UnfinishedRound


@dataclass(frozen=True)
class Batch:
    """
    Some samples with what was drawn for them and their rewards.

    Args:
        samples (`Sequence[Sample]`):
            `B` samples.
        drawn ([`Drawn`]):
            Their images and states.
        values (`torch.Tensor` of shape `(B, F)`):
            Value of each reward, NaN where left out.
        infos (`list`):
            What each reward said beside its values; empty for a batch that was scored before an interruption.
    """

    samples: Sequence[Sample]
    drawn: Drawn
    values: torch.Tensor
    infos: list[Any]

    @property
    def prompts(self) -> list[str]:
        """The samples' prompts."""
        return [sample.group.prompt for sample in self.samples]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Further columns of the samples' prompts, as lists."""
        return columns_of(self.samples)


def draw_and_score(
    samples: Sequence[Sample],
    draw: Callable[[Sequence[Sample]], Iterable[tuple[Sequence[Sample], Drawn]]],
    scorer: Scorer,
    unfinished: UnfinishedRound | None = None,
) -> list[Batch]:
    """
    Images, states and rewards of `samples`, in batches.

    Args:
        samples (`Sequence[Sample]`):
            What is wanted.
        draw (`Callable`):
            Draws samples batch by batch, as [`~trl_pgraft.rollout.draw`].
        scorer ([`Scorer`]):
            Scores each batch while the next is drawn, if it has threads.
        unfinished ([`UnfinishedRound`], *optional*):
            Where batches are kept as soon as they are drawn and scored, and found again; nothing is kept without.
    """
    found = list(unfinished.load(samples)) if unfinished else []
    for batch, drawn, values in found:
        if values is None:
            _score(batch, drawn, scorer, unfinished)
    there = {sample.seed for batch, *_ in found for sample in batch}
    for batch, drawn in draw([sample for sample in samples if sample.seed not in there]):
        if unfinished:
            unfinished.keep_images(batch, drawn)
        _score(batch, drawn, scorer, unfinished)
        found.append((batch, drawn, None))
    new = iter(scorer.results())
    return [Batch(*part, values, []) if values is not None else Batch(*part, *next(new)) for *part, values in found]


def _score(batch: Sequence[Sample], drawn: Drawn, scorer: Scorer, unfinished: UnfinishedRound | None) -> None:
    def keep(values: torch.Tensor) -> None:
        if unfinished:
            unfinished.keep_values(batch, values)

    scorer.add(drawn.images, [sample.group.prompt for sample in batch], columns_of(batch), keep)


def in_order(samples: Sequence[Sample], batches: Sequence[Batch]) -> tuple[Drawn, torch.Tensor]:
    """What was drawn in the order of `samples`, and the values of shape `(N, F)`."""
    place = {sample.seed: row for row, sample in enumerate(s for batch in batches for s in batch.samples)}
    order = torch.tensor([place[sample.seed] for sample in samples])
    images, states = (torch.cat([getattr(b.drawn, name) for b in batches])[order] for name in ("images", "x_i"))
    drawn = Drawn(images, states, sum(batch.drawn.denoiser_calls for batch in batches))
    return drawn, torch.cat([batch.values for batch in batches])[order]
