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


"""Draw a round: groups of samples of one prompt each, their images, and their trajectories' state at the switch."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .denoiser_call import DenoiserCall, Trajectory, denoiser_name_of, record_trajectory
from .pipeline_inputs import inputs_of, parameters_of, prompt_arguments


@dataclass(frozen=True)
class Group:
    """
    The samples of one prompt, drawn for comparison with each other.

    Args:
        index (`int`):
            Position in the round.
        prompt (`str`):
            The prompt.
        size (`int`):
            Number of samples M.
        columns (`dict`):
            Further columns of the prompt's row, handed to the reward functions.
    """

    index: int
    prompt: str
    size: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One sample to draw: its group, its place in it, and the seed of all its noise."""

    group: Group
    index: int
    seed: int


@dataclass
class Drawn:
    """
    What was drawn for some samples, in their order.

    Args:
        images (`torch.Tensor` of shape `(N, 3, H, W)`, uint8):
            Final images; of a video pipeline `(N, F, 3, H, W)`.
        x_i (`torch.Tensor` of shape `(N, ...)`, float32):
            Recorded states, as the denoiser sees them.
        denoiser_calls (`int`):
            Denoiser evaluations, counted per image and branch.
    """

    images: torch.Tensor
    x_i: torch.Tensor
    denoiser_calls: int


def seed_of(*parts: Any) -> int:
    """A 63-bit seed that is a function of `parts` alone: independent of batching, processes and order."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def form_groups(prompts: Iterator[tuple[str, dict[str, Any]]], images: int, group_size: int) -> list[Group]:
    """
    Groups of `group_size` for a round of `images` images; a remainder makes a smaller last group.

    Args:
        prompts (`Iterator[tuple[str, dict]]`):
            Asked once a group for a prompt and its further columns.
        images (`int`):
            Images of the round, over all processes.
        group_size (`int`):
            Samples per prompt M.
    """
    groups = []
    for index, start in enumerate(range(0, images, group_size)):
        prompt, columns = next(prompts)
        groups.append(Group(index, prompt, min(group_size, images - start), columns))
    return groups


def samples_of(groups: Sequence[Group], *seed_parts: Any) -> list[Sample]:
    """All samples of the groups, seeded by `seed_parts`, group and index."""
    return [Sample(g, i, seed_of(*seed_parts, g.index, i)) for g in groups for i in range(g.size)]


def columns_of(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Further columns of the samples' prompts, as lists."""
    names = dict.fromkeys(name for sample in samples for name in sample.group.columns)
    return {name: [sample.group.columns.get(name) for sample in samples] for name in names}


def sampling_arguments(config: Any, pipeline: Any, pipeline_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments of the pipeline call that `config` asks for, among those that the pipeline takes."""
    given, taken = pipeline_kwargs or {}, parameters_of(pipeline)
    wanted = {
        "num_inference_steps": config.sample_num_steps,
        _guidance_argument(taken): config.sample_guidance_scale,
        "eta": config.sample_eta,
        "negative_prompt": config.negative_prompts or None,
    }
    arguments = {name: value for name, value in wanted.items() if name in taken and value is not None} | given
    negative = {"negative_prompt", "negative_prompt_embeds"}
    if arguments.get("true_cfg_scale", 1.0) > 1.0 and not negative & arguments.keys():
        # With this scale pipelines guide only where they are handed a negative prompt.
        arguments["negative_prompt"] = ""
    return arguments


def _guidance_argument(parameters: dict[str, inspect.Parameter]) -> str:
    """The scale of classifier-free guidance: `true_cfg_scale` where `guidance_scale` is off by default."""
    distilled = parameters.get("guidance_scale")
    if "true_cfg_scale" in parameters and (distilled is None or distilled.default is None):
        return "true_cfg_scale"
    return "guidance_scale"


def call_pipeline(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    arguments: dict[str, Any],
    inputs: Sequence[dict[str, Any]] | None = None,
) -> Any:
    """Call the pipeline with one generator a sample, so that a sample does not depend on its batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(generator=generators, **prompt_arguments(pipeline, prompts, arguments, inputs))


@torch.no_grad()
def draw(
    pipeline: Any,
    call: DenoiserCall,
    samples: Sequence[Sample],
    position: int,
    batch_size: int,
    arguments: dict[str, Any],
    progress: bool = False,
) -> Iterator[tuple[Sequence[Sample], Drawn]]:
    """
    Draw samples with the pipeline as it is, batch by batch, and keep each trajectory's state at `position`.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline; adapters and gates on it take part.
        call ([`DenoiserCall`]):
            How it calls its denoiser.
        samples (`Sequence[Sample]`):
            What to draw.
        position (`int`):
            Position of x_I among the sampler's steps; the number of steps is the final latents.
        batch_size (`int`):
            Images of one pipeline call.
        arguments (`dict`):
            From [`sampling_arguments`].
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Yields:
        `tuple[Sequence[Sample], Drawn]`: a batch of the samples, and what was drawn for them.
    """
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, desc="sampling", leave=False, disable=not progress):
        batch = samples[start : start + batch_size]
        with record_trajectory(pipeline, call, position, len(batch)) as trajectory:
            inputs = [inputs_of(pipeline, s.group.columns, arguments) for s in batch]
            prompts, seeds = [s.group.prompt for s in batch], [s.seed for s in batch]
            output = call_pipeline(pipeline, prompts, seeds, {**arguments, "output_type": "pt"}, inputs)
        _check_trajectory(trajectory, pipeline)
        images = to_uint8(output.images if hasattr(output, "images") else output.frames)
        yield batch, Drawn(images, trajectory.x_i.float().cpu(), trajectory.denoiser_calls)


def _check_trajectory(trajectory: Trajectory, pipeline: Any) -> None:
    name = denoiser_name_of(pipeline)
    if trajectory.x_i is None:
        raise ValueError(
            f"{type(pipeline).__name__} made {len(trajectory.timesteps)} steps and none at position "
            f"{trajectory.position}, where its state was to be recorded. Does its `{name}` run at every step?"
        )
    if trajectory.steps_without:
        raise ValueError(
            f"{type(pipeline).__name__} made {trajectory.steps_without} of the first {trajectory.position} steps "
            f"without its `{name}`, which is what is tuned. Where another model takes over at low noise, choose a "
            "tuned_fraction that ends before it does."
        )


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """A pipeline's images in [0, 1] as uint8 on the host."""
    if not images.isfinite().all():
        raise ValueError("The pipeline returned images with non-finite values; sample in a higher precision.")
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
