# SPDX-License-Identifier: Apache-2.0

"""Observe a pipeline's denoiser calls and scheduler steps without copying its denoising loop."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .denoiser_call import DenoiserCall, denoiser_of
from .denoiser_format import named_arguments


class Trajectory:
    """
    What [`record_trajectory`] saw of one pipeline call.

    Attributes:
        x_i (`torch.Tensor` of shape `(B, ...)`):
            The state that enters the recorded step, as the denoiser sees it; the final latents where `step_index` is
            the number of steps.
        timesteps (`list[float]`):
            The scheduler's training timesteps, in the order of the steps.
        denoiser_calls (`int`):
            Denoiser evaluations, counted per image and branch.
        steps_without (`int`):
            Steps before the recorded one in which the denoiser was not called.
    """

    def __init__(self, step_index: int):
        self.step_index = step_index
        self.x_i: torch.Tensor | None = None
        self.timesteps: list[float] = []
        self.denoiser_calls = 0
        self.steps_without = 0


@contextmanager
def record_trajectory(
    pipeline: DiffusionPipeline, call: DenoiserCall, step_index: int, batch_size: int
) -> Iterator[Trajectory]:
    """
    Record the state that enters the scheduler's step number `step_index` (0 is pure noise) of the pipeline call made
    inside the block.

    The final latents never pass through the denoiser: they are the last result of `scheduler.step`, which is observed
    on this scheduler object and restored on leaving.
    """
    trajectory = Trajectory(step_index)
    last_result, calls_before = None, 0

    def on_denoiser(arguments: dict[str, Any]) -> None:
        latents = call.format.latents(arguments)
        trajectory.denoiser_calls += latents.shape[0]
        if len(trajectory.timesteps) == step_index and trajectory.x_i is None:
            trajectory.x_i = latents[:batch_size].clone()  # the same in both branches

    def on_step(timestep: Any, result: Any, **_: Any) -> None:
        nonlocal last_result, calls_before
        if len(trajectory.timesteps) < step_index:
            trajectory.steps_without += trajectory.denoiser_calls == calls_before
        calls_before = trajectory.denoiser_calls
        trajectory.timesteps.append(float(timestep))
        last_result = result[0] if isinstance(result, tuple) else result.prev_sample

    with observe_calls(denoiser_of(pipeline), on_denoiser), observe_steps(pipeline.scheduler, on_step):
        yield trajectory
    # Some pipelines start late in the schedule (strength), so the end is known only once it is reached.
    if trajectory.x_i is None and len(trajectory.timesteps) == step_index and last_result is not None:
        trajectory.x_i = last_result[:batch_size].clone()


@contextmanager
def observe_calls(denoiser: torch.nn.Module, observer: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Show `observer` the named arguments of every call of `denoiser` made inside the block."""
    named = named_arguments(denoiser)

    def hook(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        observer(named(*args, **kwargs))

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


def settings_of_layers(module: torch.nn.Module) -> dict[str, str]:
    """Attributes without tensors, such as the scale of an IP-Adapter or a LoRA, of all layers of a module, as text."""
    return {
        f"{path}.{name}": repr(value)
        for path, layer in module.named_modules()
        for name, value in vars(layer).items()
        if "_hooks" not in name and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float | str) or value is None
