# SPDX-License-Identifier: Apache-2.0

"""Record what a pipeline hands its denoiser and its scheduler, in all steps of a call or in the first ones."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .denoiser_call import denoiser_name_of, denoiser_of
from .inputs import prompt_arguments
from .observe import observe_calls, observe_steps


# Of different lengths, because some pipelines pass a mask only where there is padding.
PROBE_PROMPTS = ["a", "a longer prompt", "of words"]


class CallRecorded(Exception):
    """Leaves a pipeline once what was to be recorded has been seen."""


@dataclass
class Step:
    """
    One step of a pipeline call.

    Args:
        calls (`list[dict]`, *optional*):
            Named arguments of the denoiser's calls.
        outputs (`list`, *optional*):
            What the denoiser, or its stand-in, returned.
        timestep (`float`, *optional*):
            The scheduler's training timestep.
        model_output (`torch.Tensor`, *optional*):
            The prediction that the scheduler was given, after guidance.
        options (`dict`, *optional*):
            What the scheduler was given beside prediction, timestep and sample.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    timestep: float = float("nan")
    model_output: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recording:
    """
    What was seen of one pipeline call.

    Args:
        first ([`Step`], *optional*):
            The first step.
        scheduler (*optional*):
            A copy of the pipeline's scheduler as it was before that step, with its timesteps set.
        measured (`list`, *optional*):
            What `measure` returned of each step. The steps themselves are not kept, because all latents of a video,
            or all residuals of a ControlNet, would not fit.
    """

    first: Step = field(default_factory=Step)
    scheduler: Any = None
    measured: list[Any] = field(default_factory=list)


def record_call(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    pipeline_kwargs: dict[str, Any],
    steps: int | None = None,
    measure: Callable[[Step], Any] = lambda step: None,
    seed: int = 0,
    stand_in: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Recording:
    r"""
    Call a pipeline and record its steps; its own random state, and the caller's, stay as they are.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
        prompts (`Sequence[str]`):
            One prompt for each image.
        pipeline_kwargs (`dict`):
            Arguments of the sampling call.
        steps (`int`, *optional*):
            Number of steps after which the pipeline is left; all where not given. With 0 it is left after the first
            call of its denoiser, which is then all that `first` has.
        measure (`Callable`, *optional*):
            `measure(step)`, called after each step; its results are the recording's `measured`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial noise.
        stand_in (`Callable`, *optional*):
            Makes the context in which the pipeline runs, see [`answered_by`]; the denoiser computes itself without.

    Raises:
        `ValueError`: the scheduler made a step before the denoiser was called, or neither was called.
    """
    recording, step = Recording(), Step()

    def on_call(arguments: dict[str, Any]) -> None:
        if recording.scheduler is None:
            recording.scheduler = copy.deepcopy(pipeline.scheduler)
            vars(recording.scheduler).pop("step", None)  # the observer's
        step.calls.append(arguments)

    def on_step(timestep: Any, model_output: torch.Tensor, options: dict[str, Any], **_: Any) -> None:
        nonlocal step
        if recording.scheduler is None:
            raise _nothing_to_record(pipeline)
        step.timestep, step.model_output, step.options = float(timestep), model_output, options
        if not recording.measured:
            recording.first = step
        recording.measured.append(measure(step))
        step = Step()
        if len(recording.measured) == steps:
            raise CallRecorded

    def on_output(module: torch.nn.Module, args: tuple, output: Any) -> None:
        step.outputs.append(output)
        if steps == 0:
            recording.first = step
            raise CallRecorded

    denoiser = denoiser_of(pipeline)
    handle = denoiser.register_forward_hook(on_output)
    try:
        with observe_calls(denoiser, on_call), observe_steps(pipeline.scheduler, on_step):
            run_until_recorded(pipeline, prompts, pipeline_kwargs, seed=seed, stand_in=stand_in)
    finally:
        handle.remove()
    if not recording.first.calls:
        raise _nothing_to_record(pipeline)
    return recording


def _nothing_to_record(pipeline: DiffusionPipeline) -> ValueError:
    return ValueError(
        f"{type(pipeline).__name__} reached `scheduler.step`, or its end, without calling its "
        f"`{denoiser_name_of(pipeline)}`: there is no denoiser call to record."
    )


def calls_of_first_step(
    pipeline: DiffusionPipeline,
    count: int,
    prompts: Sequence[str],
    pipeline_kwargs: dict[str, Any],
    inputs: Sequence[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Named arguments of the first `count` denoiser calls; the last of them is not computed."""
    return first_calls(pipeline, count, lambda: run_until_recorded(pipeline, prompts, pipeline_kwargs, inputs))


def first_calls(pipeline: DiffusionPipeline, count: int, run: Callable[[], None]) -> list[dict[str, Any]]:
    """Named arguments of the first `count` denoiser calls that `run` makes; the last of them is not computed."""
    calls: list[dict[str, Any]] = []

    def stop_at_last(arguments: dict[str, Any]) -> None:
        calls.append(arguments)
        if len(calls) == count:
            raise CallRecorded

    with observe_calls(denoiser_of(pipeline), stop_at_last), until_recorded(pipeline):
        run()
    return calls


def run_until_recorded(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    pipeline_kwargs: dict[str, Any],
    inputs: Sequence[dict[str, Any]] | None = None,
    seed: int = 0,
    stand_in: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Call the pipeline until an observer raises [`CallRecorded`], and put its components back where they were."""
    # A generator of its own leaves the caller's random state alone.
    generator = torch.Generator().manual_seed(seed)
    arguments = prompt_arguments(pipeline, prompts, {**pipeline_kwargs, "output_type": "latent"}, inputs)
    # The stand-in goes before what is offloaded is freed, which puts modules' own `forward` back.
    with until_recorded(pipeline), stand_in():
        pipeline(generator=generator, **arguments)


@contextmanager
def until_recorded(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Stop at [`CallRecorded`]; what is offloaded is offloaded again, also after an error."""
    try:
        # Not compiled: a few calls of sizes that nothing else uses, with hooks on layers that a compiled graph skips.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    except CallRecorded:
        pipeline.maybe_free_model_hooks()
    except Exception:
        getattr(pipeline, "maybe_free_model_hooks", lambda: None)()
        raise
