# SPDX-License-Identifier: Apache-2.0

"""Observe a pipeline's denoiser calls and scheduler steps without copying its denoising loop."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .denoiser_call import DenoiserCall, denoiser_name_of, denoiser_of
from .denoiser_format import uncompiled
from .inputs import prompt_arguments


class CallRecorded(Exception):
    """Leaves a pipeline once its denoiser call has been seen."""


def calls_of_first_step(
    pipeline: Any,
    count: int,
    prompts: Sequence[str],
    kwargs: dict[str, Any],
    inputs: Sequence[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Named arguments of the first `count` denoiser calls; the last of them is not computed."""
    return first_calls(pipeline, count, lambda: run_until_recorded(pipeline, list(prompts), kwargs, inputs))


def first_calls(pipeline: Any, count: int, run: Callable[[], None]) -> list[dict[str, Any]]:
    """Named arguments of the first `count` denoiser calls that `run` makes; the last of them is not computed."""
    calls: list[dict[str, Any]] = []

    def stop_at_last(arguments: dict[str, Any]) -> None:
        calls.append(arguments)
        if len(calls) == count:
            raise CallRecorded

    with observe_calls(denoiser_of(pipeline), stop_at_last), until_recorded(pipeline):
        run()
    return calls


class Trajectory:
    """
    What [`record_trajectory`] saw of one pipeline call.

    Attributes:
        x_i (`torch.Tensor` of shape `(B, ...)`):
            The state at the recorded position, as the denoiser sees it; the final latents where the position is the
            number of steps.
        timesteps (`list[float]`):
            The scheduler's training timesteps, in the order of the steps.
        denoiser_calls (`int`):
            Denoiser evaluations, counted per image and branch.
        steps_without (`int`):
            Steps before the recorded position in which the denoiser was not called.
    """

    def __init__(self, position: int):
        self.position = position
        self.x_i: torch.Tensor | None = None
        self.timesteps: list[float] = []
        self.denoiser_calls = 0
        self.steps_without = 0


@contextmanager
def record_trajectory(pipeline: Any, call: DenoiserCall, position: int, batch_size: int) -> Iterator[Trajectory]:
    """
    Record the state that enters the scheduler's step number `position` (0 is pure noise) of the pipeline call made
    inside the block.

    The final latents never pass through the denoiser: they are the last result of `scheduler.step`, which is observed
    on this scheduler object and restored on leaving.
    """
    trajectory = Trajectory(position)
    first = call.conditional_branch * batch_size if call.calls_per_step == 1 else 0
    last_result, calls_before = None, 0

    def on_denoiser(arguments: dict[str, Any]) -> None:
        latents = call.format.latents(arguments)
        trajectory.denoiser_calls += latents.shape[0]
        if len(trajectory.timesteps) == position and trajectory.x_i is None:
            trajectory.x_i = latents[first : first + batch_size].clone()

    def on_step(timestep: Any, result: Any, **_: Any) -> None:
        nonlocal last_result, calls_before
        if len(trajectory.timesteps) < position:
            trajectory.steps_without += trajectory.denoiser_calls == calls_before
        calls_before = trajectory.denoiser_calls
        trajectory.timesteps.append(float(timestep))
        last_result = result[0] if isinstance(result, tuple) else result.prev_sample

    with observe_calls(denoiser_of(pipeline), on_denoiser), observe_steps(pipeline.scheduler, on_step):
        yield trajectory
    # Some pipelines start late in the schedule (strength), so the end is known only once it is reached.
    if trajectory.x_i is None and len(trajectory.timesteps) == position and last_result is not None:
        trajectory.x_i = last_result[:batch_size].clone()


@contextmanager
def observe_calls(denoiser: torch.nn.Module, observer: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Show `observer` the named arguments of every call of `denoiser` made inside the block."""
    signature = inspect.signature(type(uncompiled(denoiser)).forward)
    further = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = dict(signature.bind(module, *args, **kwargs).arguments)
        named.pop("self")
        extra = named.pop(further, {})
        observer({**named, **extra})

    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def observe_steps(scheduler: Any, observer: Callable[..., None]) -> Iterator[None]:
    """Show `observer` timestep, model output, result and further options of each `scheduler.step` in the block."""
    original, shadowed = scheduler.step, vars(scheduler).get("step")

    # With the signature of the original, because pipelines look there for what to pass, such as eta and generator.
    @functools.wraps(original)
    def step(model_output: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model_output, timestep, *args, **kwargs)
        observer(timestep=timestep, result=result, model_output=model_output, options=kwargs)
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
        if shadowed is not None:
            scheduler.step = shadowed


def run_until_recorded(
    pipeline: Any, prompts: list[str], kwargs: dict[str, Any], inputs: Sequence[dict[str, Any]] | None = None
) -> None:
    """Call the pipeline until an observer raises [`CallRecorded`], and put its components back where they were."""
    # A generator of its own, so that asking leaves the caller's random state alone.
    generator = torch.Generator().manual_seed(0)
    arguments = prompt_arguments(pipeline, prompts, {**kwargs, "output_type": "latent"}, inputs)
    with until_recorded(pipeline):
        pipeline(generator=generator, **arguments)


@contextmanager
def until_recorded(pipeline: Any) -> Iterator[None]:
    """Stop at [`CallRecorded`], and put the pipeline's components back where they were."""
    try:
        # Not compiled: a few calls of sizes that nothing else uses, with hooks on layers that a compiled graph skips.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    except CallRecorded:
        pipeline.maybe_free_model_hooks()


def require_a_call(pipeline: Any, calls: Sequence[Any]) -> None:
    """Refuse a pipeline that has reached its scheduler's step without a denoiser call."""
    if not calls:
        raise ValueError(
            f"{type(pipeline).__name__} reached `scheduler.step` without calling its "
            f"`{denoiser_name_of(pipeline)}`: there is no denoiser call to record."
        )
