# SPDX-License-Identifier: Apache-2.0

"""Sample images batch by batch, with their trajectories' states, and work on finished batches beside it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..pipelines.denoiser_call import DenoiserCall, denoiser_name_of
from ..pipelines.inputs import call_pipeline, inputs_of
from ..pipelines.observe import Trajectory, record_trajectory
from ..pipelines.pixels import to_uint8
from .prompts import Sample
from .rollout import NO_FLAGS, RolloutBatch


Item = TypeVar("Item")
Result = TypeVar("Result")


@torch.no_grad()
def sample_batches(
    pipeline: DiffusionPipeline,
    call: DenoiserCall,
    samples: Sequence[Sample],
    step_index: int,
    batch_size: int,
    arguments: dict[str, Any],
    progress: bool = False,
) -> Iterator[RolloutBatch]:
    r"""
    Sample with the pipeline as it is, batch by batch, and record each trajectory's state at one step.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline; adapters and gates on it take part.
        call ([`DenoiserCall`]):
            How the pipeline calls its denoiser.
        samples (`Sequence[Sample]`):
            The samples wanted, with their prompts and seeds.
        step_index (`int`):
            Step of the sampler whose input is x_I; the number of steps stands for the final latents.
        batch_size (`int`):
            Images of one pipeline call.
        arguments (`dict[str, Any]`):
            Keyword arguments of the pipeline call, from [`sampling_arguments`].
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Yields:
        [`RolloutBatch`]: the next batch of the samples, not scored.

    Raises:
        `ValueError`: the pipeline makes no such step, makes steps before it without its denoiser, or returns images
            that are not finite.
    """
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, desc="sampling", leave=False, disable=not progress):
        batch = samples[start : start + batch_size]
        with record_trajectory(pipeline, call, step_index, len(batch)) as trajectory:
            inputs = [inputs_of(pipeline, s.group.columns, arguments) for s in batch]
            prompts, seeds = [s.group.prompt for s in batch], [s.seed for s in batch]
            output = call_pipeline(pipeline, prompts, seeds, {**arguments, "output_type": "pt"}, inputs)
        x_i = _checked_state(trajectory, pipeline)
        images = to_uint8(output.images if hasattr(output, "images") else output.frames).cpu()
        yield RolloutBatch(batch, images, x_i.float().cpu(), trajectory.denoiser_calls, flagged=flags_of(output))


def flags_of(output: Any) -> torch.Tensor:
    """1 for each image of a pipeline's output that its safety checker flagged, 0 for others; NaN without a checker."""
    flags = getattr(output, "nsfw_content_detected", getattr(output, "nsfw_detected", None))
    # A flag may be one for each frame of a video.
    found = [float(torch.as_tensor(f is not None and f).any()) for f in (() if flags is None else flags)]
    return torch.tensor(found) if found else NO_FLAGS


def _checked_state(trajectory: Trajectory, pipeline: DiffusionPipeline) -> torch.Tensor:
    name = denoiser_name_of(pipeline)
    if trajectory.x_i is None:
        raise ValueError(
            f"{type(pipeline).__name__} made {len(trajectory.timesteps)} steps and none with index "
            f"{trajectory.step_index}, where its state was to be recorded. Does its `{name}` run at every step?"
        )
    if trajectory.steps_without:
        raise ValueError(
            f"{type(pipeline).__name__} made {trajectory.steps_without} of the first {trajectory.step_index} steps "
            f"without its `{name}`, which is what is tuned. Where another model takes over at low noise, choose a "
            "tuned_fraction that ends before it does."
        )
    return trajectory.x_i


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int = 0) -> list[Result]:
    r"""
    The results of a function for some items, in their order.

    Args:
        function (`Callable`):
            Called with each item, such as a batch to score.
        items (`Iterable`):
            The items, which this thread makes; while it makes the next one, threads work on those before.
        workers (`int`, *optional*, defaults to `0`):
            Number of threads; with 0, the function is called in this one, before the next item is made.
    """
    if not workers:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
