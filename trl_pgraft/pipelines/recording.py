# SPDX-License-Identifier: Apache-2.0

"""Record what a pipeline hands its denoiser and its scheduler, in all steps of a call or in the first ones."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .controls import Control, answered, observe_controls
from .denoiser_call import DenoiserCall, denoiser_name_of, denoiser_of
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
            Named arguments of the denoiser's calls, with those of controls in place of their outputs.
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
    measure: Callable[[Step, Step], Any] = lambda first, step: None,
    seed: int = 0,
    stand_in: Callable[[], AbstractContextManager[None]] = nullcontext,
    controls: Sequence[Control] = (),
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
            `measure(first, step)`, called after each step; its results are the recording's `measured`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the initial noise.
        stand_in (`Callable`, *optional*):
            Makes the context in which the pipeline runs, see [`answered_by`]; the denoiser computes itself without.
        controls (`Sequence[Control]`, *optional*):
            Modules like a ControlNet, for which stand-ins answer.

    Raises:
        `ValueError`: the scheduler made a step before the denoiser was called, or neither was called.
    """
    recorder, denoiser = _Recorder(pipeline, steps, measure), denoiser_of(pipeline)
    with (
        denoiser.register_forward_hook(recorder.on_output),
        observe_controls(controls) as recorded,
        observe_calls(denoiser, lambda arguments: recorder.on_call(recorded(arguments))),
        observe_steps(pipeline.scheduler, recorder.on_step),
        # Stand-ins go before what is offloaded is freed, which puts modules' own `forward` back.
        until_recorded(pipeline),
        stand_in(),
        answered(controls),
    ):
        _call(pipeline, prompts, pipeline_kwargs, seed=seed)
    if not recorder.recording.first.calls:
        raise _nothing_to_record(pipeline)
    return recorder.recording


class _Recorder:
    """Makes a [`Recording`] of one pipeline call, and leaves it after a number of steps."""

    def __init__(self, pipeline: DiffusionPipeline, steps: int | None, measure: Callable[[Step, Step], Any]):
        self.pipeline, self.steps, self.measure = pipeline, steps, measure
        self.recording, self.step = Recording(), Step()

    def on_call(self, arguments: dict[str, Any]) -> None:
        if self.recording.scheduler is None:
            self.recording.scheduler = copy.deepcopy(self.pipeline.scheduler)
            vars(self.recording.scheduler).pop("step", None)  # the observer's
        self.step.calls.append(arguments)

    def on_step(self, timestep: Any, model_output: torch.Tensor, options: dict[str, Any], **_: Any) -> None:
        if self.recording.scheduler is None:
            raise _nothing_to_record(self.pipeline)
        step, self.step = self.step, Step()
        step.timestep, step.model_output, step.options = float(timestep), model_output, options
        if not self.recording.measured:
            self.recording.first = step
        self.recording.measured.append(self.measure(self.recording.first, step))
        if len(self.recording.measured) == self.steps:
            raise CallRecorded

    def on_output(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self.step.outputs.append(output)
        if self.steps == 0:
            self.recording.first = self.step
            raise CallRecorded


def _nothing_to_record(pipeline: DiffusionPipeline) -> ValueError:
    return ValueError(
        f"{type(pipeline).__name__} reached `scheduler.step`, or its end, without calling its "
        f"`{denoiser_name_of(pipeline)}`: there is no denoiser call to record."
    )


def calls_of_first_step(
    pipeline: DiffusionPipeline,
    call: DenoiserCall,
    prompts: Sequence[str],
    pipeline_kwargs: dict[str, Any],
    inputs: Sequence[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Named arguments of the denoiser's calls in the first step; the last of them is not computed."""
    return first_calls(pipeline, call, lambda: _call(pipeline, prompts, pipeline_kwargs, inputs))


def first_calls(pipeline: DiffusionPipeline, call: DenoiserCall, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Named arguments of the denoiser's calls in the first step of `run`; the last of them is not computed."""
    calls: list[dict[str, Any]] = []

    def stop_at_last(arguments: dict[str, Any]) -> None:
        calls.append(recorded(arguments))
        if len(calls) == call.calls_per_step:
            raise CallRecorded

    with observe_controls(call.controls) as recorded, observe_calls(denoiser_of(pipeline), stop_at_last):
        with until_recorded(pipeline), answered(call.controls):
            run()
    return calls


def _call(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    pipeline_kwargs: dict[str, Any],
    inputs: Sequence[dict[str, Any]] | None = None,
    seed: int = 0,
) -> None:
    # A generator of its own leaves the caller's random state alone.
    generator = torch.Generator().manual_seed(seed)
    arguments = prompt_arguments(pipeline, prompts, {**pipeline_kwargs, "output_type": "latent"}, inputs)
    pipeline(generator=generator, **arguments)


@contextmanager
def until_recorded(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Stop where an observer raises [`CallRecorded`]; what is offloaded is offloaded again, also after an error."""
    try:
        # Not compiled: a few calls of sizes that nothing else uses, with hooks on layers that a compiled graph skips.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    except CallRecorded:
        pipeline.maybe_free_model_hooks()
    except Exception:
        getattr(pipeline, "maybe_free_model_hooks", lambda: None)()
        raise
