# SPDX-License-Identifier: Apache-2.0

"""A pilot of groups whose trajectories are seen at several steps, and what the pipeline makes of these states."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from ..adapters.policy import Policy
from ..config import GraftConfig
from ..core.parameterizations import predicted_original
from ..core.seeding import seed_of
from ..pipelines.inputs import prompt_arguments
from ..pipelines.observe import observe_steps, record_trajectory
from ..pipelines.pixels import to_uint8
from ..rewards import Reward
from ..rollouts.batch import collate
from ..rollouts.collect import RolloutCollector
from ..rollouts.prompts import PromptGroup, Sample, columns_of, samples_of
from ..rollouts.selection import accept


StepEnd = Callable[[int, slice, Sequence[torch.Generator], torch.Tensor], torch.Tensor]


class PilotSource(Protocol):
    """What a pilot takes of a [`PGraftTrainer`]: its policy, and what collects its rollouts."""

    policy: Policy
    collector: RolloutCollector
    config: GraftConfig
    rewards: Sequence[Reward]
    accelerator: Accelerator
    pipeline: Any
    denoiser: torch.nn.Module

    def sampler(self, reference: bool = False) -> AbstractContextManager[Any]:
        """The pipeline as the policy samples, or as the reference."""


@dataclass(frozen=True)
class Pilot:
    """
    Groups drawn, scored and decided as in a round, with every trajectory's state at several positions.

    Args:
        groups (`list[PromptGroup]`), samples (`list[Sample]`):
            What was drawn: `N` samples.
        images (`torch.Tensor` of shape `(N, 3, H, W)`, uint8):
            Final images.
        reward (`torch.Tensor` of shape `(N,)`):
            Weighted sum of the rewards, NaN where a sample is left out.
        accepted (`torch.Tensor` of shape `(N,)`, bool):
            Decisions of the trainer's acceptance rule.
        states (`dict[int, torch.Tensor]`):
            x_I at each position, of shape `(N, ...)`, as the denoiser sees it.
        originals (`dict[int, torch.Tensor]`):
            The sampler's own prediction of x_0 from these states, guidance included.
    """

    groups: list[PromptGroup]
    samples: list[Sample]
    images: torch.Tensor
    reward: torch.Tensor
    accepted: torch.Tensor
    states: dict[int, torch.Tensor]
    originals: dict[int, torch.Tensor]


def draw_pilot(trainer: PilotSource, groups: list[PromptGroup], positions: Sequence[int]) -> Pilot:
    """Draw the groups with the trainer's pipeline as it is, and keep the states at `positions`."""
    config = trainer.config
    samples = samples_of(groups, config.seed, 0)
    images, values, seen = [], [], []
    for rows in _batches(trainer, samples):
        with _states_and_originals(trainer, positions, len(samples[rows])) as of_batch:
            drawn, value = collate(samples[rows], trainer.collector.draw_and_score(samples[rows]))
        images.append(drawn.images)
        values.append(value)
        seen.append(of_batch)
    reward = trainer.collector.combine(torch.cat(values), groups)
    decision = accept(
        reward, groups, trainer.collector.acceptance, config.acceptance_kwargs, (config.seed, 0, "accept")
    )
    states, originals = ({p: torch.cat([batch[p][i] for batch in seen]) for p in positions} for i in (0, 1))
    return Pilot(groups, samples, torch.cat(images), reward, decision.accepted, states, originals)


@contextmanager
def _states_and_originals(
    trainer: PilotSource, positions: Sequence[int], batch_size: int
) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """State and predicted x_0 at each position of the pipeline call made inside the block."""
    outputs: list[torch.Tensor | None] = []
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def on_step(model_output: torch.Tensor, **_: Any) -> None:
        outputs.append(model_output if len(outputs) in positions else None)

    with ExitStack() as stack:
        pipeline, call = trainer.pipeline, trainer.policy.call
        recorders = {p: stack.enter_context(record_trajectory(pipeline, call, p, batch_size)) for p in positions}
        stack.enter_context(observe_steps(trainer.pipeline.scheduler, on_step))
        yield seen
    for position, recorder in recorders.items():
        x_i = original = recorder.x_i.float()
        if position < len(outputs):
            level = trainer.policy.levels.schedule(recorder.timesteps[position])
            original, _ = predicted_original(trainer.policy.prediction_type, outputs[position].float(), x_i, *level)
        seen[position] = x_i.cpu(), original.cpu()


def probe(trainer: PilotSource, pilot: Pilot, position: int) -> torch.Tensor:
    """Rewards of the x_0 predicted from each x_I, of shape `(N,)`: a pipeline call of one step decodes them."""

    def replace(_: int, rows: slice, generators: Sequence[torch.Generator], latents: torch.Tensor) -> torch.Tensor:
        return pilot.originals[position][rows].to(latents)

    return _score(trainer, pilot, _finish(trainer, pilot, replace, num_inference_steps=1))


def complete(trainer: PilotSource, pilot: Pilot, position: int, number: int) -> torch.Tensor:
    """Rewards of the `number`-th other completion of each x_I, of shape `(N,)`."""
    return _score(trainer, pilot, _finish(trainer, pilot, _reseed(pilot, position, number)))


def is_stochastic(trainer: PilotSource, pilot: Pilot, position: int) -> bool:
    """Whether completions from one x_I differ, told from the images of the first batch."""
    rows, images = next(_finish(trainer, pilot, _reseed(pilot, position, 0)))
    # Kernels that sum in another order every time change some pixels by a level or two.
    return bool((images.float() - pilot.images[rows].float()).abs().mean() > 0.5)


def _reseed(pilot: Pilot, position: int, number: int) -> StepEnd:
    """The pilot's noise up to x_I and other noise after it, so that the scheduler's own state is right as well."""

    def reseed(step: int, rows: slice, generators: Sequence[torch.Generator], latents: torch.Tensor) -> torch.Tensor:
        if step + 1 == position:
            for generator, sample in zip(generators, pilot.samples[rows], strict=True):
                generator.manual_seed(seed_of(sample.seed, "completion", position, number))
        return latents

    return reseed


def _finish(
    trainer: PilotSource, pilot: Pilot, on_step_end: StepEnd, **changed: Any
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Call the pipeline as for the pilot, with `on_step_end` on its latents after every step; batches of images."""
    for rows in _batches(trainer, pilot.samples):
        batch = pilot.samples[rows]
        generators = [torch.Generator().manual_seed(sample.seed) for sample in batch]

        def callback(
            pipeline: Any, step: int, timestep: Any, tensors: dict, rows: slice = rows, generators: list = generators
        ) -> dict[str, torch.Tensor]:
            return {"latents": on_step_end(step, rows, generators, tensors["latents"])}

        own = {"output_type": "pt", "callback_on_step_end": callback, "generator": generators, **changed}
        inputs = [trainer.policy.inputs_of(sample.group.columns) for sample in batch]
        prompts = [sample.group.prompt for sample in batch]
        arguments = prompt_arguments(trainer.pipeline, prompts, {**trainer.policy.arguments, **own}, inputs)
        yield rows, to_uint8(trainer.pipeline(**arguments).images).cpu()


def _score(trainer: PilotSource, pilot: Pilot, batches: Iterator[tuple[slice, torch.Tensor]]) -> torch.Tensor:
    scorer = trainer.collector.make_scorer()
    for rows, images in batches:
        batch = pilot.samples[rows]
        scorer.add(images, [sample.group.prompt for sample in batch], columns_of(batch))
    values = torch.cat([values for values, _ in scorer.results()])
    return trainer.collector.combine(values, pilot.groups)


def _batches(trainer: PilotSource, samples: Sequence[Sample]) -> Iterator[slice]:
    size = trainer.config.sample_batch_size
    return (slice(start, start + size) for start in range(0, len(samples), size))
