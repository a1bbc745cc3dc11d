# SPDX-License-Identifier: Apache-2.0

"""A pilot: groups whose trajectories are recorded at several steps, and rewards of what follows from these states."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..adapters.policy import Policy
from ..core.parameterizations import predicted_original
from ..core.seeding import sample_seed
from ..pipelines.inputs import prompt_arguments
from ..pipelines.observe import observe_steps, record_trajectory
from ..pipelines.pixels import to_uint8
from ..rollouts.collect import RolloutCollector
from ..rollouts.prompts import PromptGroup, Sample, samples_of
from ..rollouts.rollout import RolloutBatch
from ..rollouts.sampling import flags_of
from ..rollouts.selection import accept, total_rewards


# Given rows of the pilot, index of the step, generators and latents after the step, returns the latents to go on with.
StepEnd = Callable[[slice, int, Sequence[torch.Generator], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pilot:
    r"""
    Groups that are sampled, scored and selected as in an iteration, with each trajectory's state at several steps.

    Args:
        groups (`list[PromptGroup]`):
            The prompts, each with the number of its samples.
        samples (`list[Sample]`):
            All N samples, group by group.
        images (`torch.Tensor`):
            Final images (N, 3, H, W), uint8.
        total_reward (`torch.Tensor`):
            Weighted sum of each sample's rewards (N,), NaN where the sample is left out.
        accepted (`torch.Tensor`):
            Which samples the acceptance rule accepts (N,), bool.
        states (`dict[int, torch.Tensor]`):
            x_I (N, ...) by step index, as the denoiser receives it.
        originals (`dict[int, torch.Tensor]`):
            The x_0 (N, ...) that the sampler predicts from these states, guidance included.
        flagged (`int`, *optional*, defaults to `0`):
            Images that the pipeline's safety checker flagged: they are left out.
    """

    groups: list[PromptGroup]
    samples: list[Sample]
    images: torch.Tensor
    total_reward: torch.Tensor
    accepted: torch.Tensor
    states: dict[int, torch.Tensor]
    originals: dict[int, torch.Tensor]
    flagged: int = 0


def sample_pilot(collector: RolloutCollector, groups: list[PromptGroup], step_indices: Sequence[int]) -> Pilot:
    r"""
    Sample groups with the pipeline as it is.

    Args:
        collector ([`RolloutCollector`]):
            Samples, scores and selects; in the state in which it would collect the first rollout, the pilot is the
            same samples.
        groups (`list[PromptGroup]`):
            The groups to sample.
        step_indices (`Sequence[int]`):
            Steps of the sampler whose input states are kept; the number of steps stands for the final latents.
    """
    config, samples = collector.config, samples_of(groups, collector.config.seed)
    batches: list[RolloutBatch] = []
    recorded = []
    for rows in _batches(collector, samples):
        with _states_and_originals(collector.policy, step_indices, len(samples[rows])) as of_batch:
            batches += collector.sample_and_score(samples[rows])
        recorded.append(of_batch)
    batch = RolloutBatch.collate(samples, batches)
    total_reward = total_rewards(batch.rewards, collector.weights, groups)
    accepted, _, _ = accept(
        total_reward, groups, collector.acceptance, config.acceptance_kwargs, (config.seed, 0, "accept")
    )
    states, originals = ({s: torch.cat([seen[s][i] for seen in recorded]) for s in step_indices} for i in (0, 1))
    return Pilot(groups, samples, batch.images, total_reward, accepted, states, originals, _count(batch.flagged))


@contextmanager
def _states_and_originals(
    policy: Policy, step_indices: Sequence[int], batch_size: int
) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """State and predicted x_0 at each step of the pipeline call made inside the block."""
    outputs: list[torch.Tensor | None] = []
    recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def on_step(model_output: torch.Tensor, **_: Any) -> None:
        outputs.append(model_output if len(outputs) in step_indices else None)

    with ExitStack() as stack:
        trajectories = {
            s: stack.enter_context(record_trajectory(policy.pipeline, policy.call, s, batch_size))
            for s in step_indices
        }
        stack.enter_context(observe_steps(policy.pipeline.scheduler, on_step))
        yield recorded
    for step_index, trajectory in trajectories.items():
        assert trajectory.x_i is not None  # the sampler makes this step
        x_i = original = trajectory.x_i.float()
        output = outputs[step_index] if step_index < len(outputs) else None
        if output is not None:
            level = policy.levels.schedule(trajectory.timesteps[step_index])
            original, _ = predicted_original(policy.prediction_type, output.float(), x_i, *level)
        recorded[step_index] = x_i.cpu(), original.cpu()


def score_predictions(collector: RolloutCollector, pilot: Pilot, step_index: int) -> tuple[torch.Tensor, int]:
    r"""
    Total rewards of the x_0 predicted from each x_I, decoded by a pipeline call of one step.

    Args:
        collector ([`RolloutCollector`]):
            The pipeline, sampling arguments and rewards.
        pilot ([`Pilot`]):
            The samples, with their predictions.
        step_index (`int`):
            Step of the sampler whose input is x_I.

    Returns:
        `torch.Tensor`: (N,), NaN where a sample is left out; and the number of images that were flagged.
    """

    def replace(rows: slice, step: int, generators: Sequence[torch.Generator], latents: torch.Tensor) -> torch.Tensor:
        return pilot.originals[step_index][rows].to(latents)

    return _score(collector, pilot, _images(collector, pilot, replace, num_inference_steps=1))


def score_completions(
    collector: RolloutCollector, pilot: Pilot, step_index: int, number: int
) -> tuple[torch.Tensor, int]:
    r"""
    Total rewards of other images that follow from each x_I with new noise after it.

    Args:
        collector ([`RolloutCollector`]):
            The pipeline, sampling arguments and rewards.
        pilot ([`Pilot`]):
            The samples.
        step_index (`int`):
            Step of the sampler whose input is x_I.
        number (`int`):
            Number of the completion, which seeds its noise.

    Returns:
        `torch.Tensor`: (N,), NaN where a sample is left out; and the number of images that were flagged.
    """
    return _score(collector, pilot, _images(collector, pilot, _reseed(collector, pilot, step_index, number)))


def is_stochastic(collector: RolloutCollector, pilot: Pilot, step_index: int) -> bool:
    r"""
    Whether other noise after x_I leads to another image, as the first batch shows.

    Args:
        collector ([`RolloutCollector`]):
            The pipeline and sampling arguments.
        pilot ([`Pilot`]):
            The samples, with their images.
        step_index (`int`):
            Step of the sampler whose input is x_I.
    """
    images = next(_images(collector, pilot, _reseed(collector, pilot, step_index, 0))).images
    # Kernels that sum in another order every time change some pixels by a level or two.
    return bool((images.float() - pilot.images[: len(images)].float()).abs().mean() > 0.5)


def _reseed(collector: RolloutCollector, pilot: Pilot, step_index: int, number: int) -> StepEnd:
    """The pilot's noise up to x_I and other noise after it, so that the scheduler's own state is right as well."""
    first = (number * len(pilot.states) + list(pilot.states).index(step_index)) * len(pilot.samples)

    def reseed(rows: slice, step: int, generators: Sequence[torch.Generator], latents: torch.Tensor) -> torch.Tensor:
        if step + 1 == step_index:
            for row, generator in enumerate(generators, first + rows.start):
                generator.manual_seed(sample_seed(collector.config.seed, "completion", row))
        return latents

    return reseed


def _images(collector: RolloutCollector, pilot: Pilot, on_step_end: StepEnd, **changed: Any) -> Iterator[RolloutBatch]:
    """Call the pipeline as for the pilot, with `on_step_end` on its latents after every step; no states are kept."""
    for rows in _batches(collector, pilot.samples):
        samples = pilot.samples[rows]
        output = _call(collector.policy, samples, partial(on_step_end, rows), changed)
        images = to_uint8(output.images).cpu()
        yield RolloutBatch(samples, images, torch.empty(len(samples), 0), 0, flagged=flags_of(output))


def _call(
    policy: Policy, samples: Sequence[Sample], on_step_end: Callable[..., torch.Tensor], changed: dict[str, Any]
) -> Any:
    generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]

    def callback(
        pipeline: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {"latents": on_step_end(step, generators, tensors["latents"])}

    own = {"output_type": "pt", "callback_on_step_end": callback, "generator": generators, **changed}
    inputs = [policy.inputs_of(sample.group.columns) for sample in samples]
    prompts = [sample.group.prompt for sample in samples]
    arguments = prompt_arguments(policy.pipeline, prompts, {**policy.arguments, **own}, inputs)
    return policy.pipeline(**arguments)


def _score(collector: RolloutCollector, pilot: Pilot, batches: Iterator[RolloutBatch]) -> tuple[torch.Tensor, int]:
    scored = [collector.score_batch(batch) for batch in batches]
    rewards = torch.cat([batch.rewards for batch in scored])
    return total_rewards(rewards, collector.weights, pilot.groups), sum(_count(batch.flagged) for batch in scored)


def _count(flagged: torch.Tensor) -> int:
    return int(flagged.nansum())


def _batches(collector: RolloutCollector, samples: Sequence[Sample]) -> Iterator[slice]:
    size = collector.config.sample_batch_size
    return (slice(start, start + size) for start in range(0, len(samples), size))
