# SPDX-License-Identifier: Apache-2.0

"""What is measured on a model's images: the verifier, a judge nobody trained on, fidelity and diversity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from examples.emoji.evaluate import read_prompts, sample
from examples.emoji.judge import Judge
from examples.emoji.scenes import FOLDER as EMOJI, Renderer, layout, parse_prompt
from examples.emoji.verifier import Verifier
from examples.noise_correction.frechet import distance_of_gaussians


# Noise seeds of evaluation images; training draws its own from other numbers.
FIRST_SEED = 7_000_000


def frechet_distance(features: torch.Tensor, others: torch.Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of features of shape `(n, D)`; NaN without a judge."""
    if features.isnan().any() or others.isnan().any():
        return float("nan")
    return distance_of_gaussians(features.double(), others.double())


def pairwise_distances(features: torch.Tensor) -> torch.Tensor:
    """Distances between the images of each prompt: features `(P, n, D)` to the `(P, n (n - 1) / 2)` pairs."""
    row, column = torch.triu_indices(features.shape[1], features.shape[1], offset=1)
    return (features[:, row] - features[:, column]).norm(dim=-1)


@dataclass(frozen=True)
class Measured:
    """
    Result of an evaluation.

    Args:
        prompts (`pd.DataFrame`):
            One row a prompt: `score`, `soft_score` and `judge` (means over its images), `best_score` and `best_judge`
            (of the image that the soft score prefers), `diversity` (mean distance of its images' features) and
            `diversity_right` (of its right images; NaN where there are fewer than two).
        frechet_real (`float`): Fréchet distance to rendered scenes of the same prompts.
        features (`torch.Tensor`): the images' features, `(P * n, D)`.
        images (`torch.Tensor`): the images, `(P, n, 3, 64, 64)` in [0, 1].
    """

    prompts: pd.DataFrame
    frechet_real: float
    features: torch.Tensor
    images: torch.Tensor


class Evaluation:
    """
    Images of a split's prompts, the same noise for every model.

    Args:
        split (`str`): `"train"`, `"held_out"` or `"test"`.
        images_per_prompt (`int`): samples of each prompt.
        steps (`int`): sampler steps.
        batch (`int`, *optional*, defaults to `512`): images a pipeline call.
        limit (`int`, *optional*): only the first prompts.
        judge (`str`, *optional*): folder of the judge; the committed one where not given. Without weights there, what
            the judge and its features measure is NaN.
        categories (`Sequence[str]`, *optional*): only prompts of these.
    """

    def __init__(
        self,
        split: str,
        images_per_prompt: int,
        steps: int,
        batch: int = 512,
        limit: int | None = None,
        judge: str | None = None,
        categories: Sequence[str] | None = None,
    ):
        rows = [row for row in read_prompts(split) if categories is None or row["category"] in categories]
        self.rows, self.repeats, self.steps, self.batch = rows[:limit], images_per_prompt, steps, batch
        self.prompts = [row["prompt"] for row in self.rows for _ in range(images_per_prompt)]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.verifier = Verifier.load().to(self.device)
        folder = Path(judge or EMOJI / "judge")
        self.judge = Judge.load(folder).to(self.device) if (folder / "judge.safetensors").exists() else None
        self.real = self._features(self._rendered())

    def _rendered(self) -> torch.Tensor:
        scenes = layout([parse_prompt(prompt) for prompt in self.prompts], np.random.default_rng(0))
        return Renderer(self.device)(scenes, torch.Generator(self.device).manual_seed(0)).cpu()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        if self.judge is None:
            return torch.full((len(images), 1), torch.nan)
        return torch.cat([self.judge.features(batch.to(self.device)).cpu() for batch in images.split(self.batch)])

    def _scores(self, judge: Callable, images: torch.Tensor) -> np.ndarray:
        batches = range(0, len(images), self.batch)
        scores = [judge(images[i : i + self.batch], self.prompts[i : i + self.batch]) for i in batches]
        return np.concatenate(scores).reshape(-1, self.repeats)

    def __call__(self, pipeline, guidance: float, **options) -> Measured:
        """Draw with a pipeline (`options` are further arguments of its call), and measure."""
        seeds = [FIRST_SEED + index for index in range(len(self.prompts))]
        images = sample(pipeline, self.prompts, self.steps, guidance, seeds, self.batch, **options)
        features = self._features(images)
        score, soft = self._scores(self.verifier.score, images), self._scores(self.verifier.soft_score, images)
        judged = self._scores(self.judge.score, images) if self.judge else np.full_like(score, np.nan)
        best = soft.argmax(1)[:, None]
        columns = {"score": score.mean(1), "soft_score": soft.mean(1), "judge": judged.mean(1)}
        columns |= {"best_score": np.take_along_axis(score, best, 1)[:, 0]}
        columns |= {"best_judge": np.take_along_axis(judged, best, 1)[:, 0]}
        if self.repeats > 1:
            columns |= self._diversity(features.unflatten(0, (-1, self.repeats)), torch.tensor(score > 0))
        named = {name: [row[name] for row in self.rows] for name in ("prompt", "category")}
        frechet = frechet_distance(features, self.real)
        return Measured(pd.DataFrame(named | columns), frechet, features, images.unflatten(0, (-1, self.repeats)))

    def _diversity(self, features: torch.Tensor, right: torch.Tensor) -> dict[str, np.ndarray]:
        distances = pairwise_distances(features)
        row, column = torch.triu_indices(self.repeats, self.repeats, offset=1)
        both = right[:, row] & right[:, column]
        among_right = distances.where(both, torch.nan).nanmean(1)
        return {"diversity": distances.mean(1).numpy(), "diversity_right": among_right.numpy()}
