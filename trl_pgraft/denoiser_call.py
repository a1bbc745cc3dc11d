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


"""Record how a pipeline calls its denoiser, and replay that call with other latents and timesteps.

No denoising loop is copied. A forward pre-hook on the denoiser sees the keyword arguments of the pipeline's own call,
so the latents are as the denoiser gets them (every scheduler's private scaling is already undone), and the
conditioning is what the pipeline made of its prompts.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .batch_axes import put_on, take_rows
from .denoiser_format import DenoiserFormat, uncompiled
from .pipeline_inputs import prompt_arguments


class CallRecorded(Exception):
    """Leaves a pipeline once its denoiser call has been seen."""


@dataclass(frozen=True)
class DenoiserCall:
    """
    How one pipeline calls its denoiser, as [`learn_denoiser_call`] found it.

    Args:
        format ([`DenoiserFormat`]):
            Where latents, timestep and prediction are.
        timestep_dtype (`torch.dtype`):
            Precision the pipeline's own timesteps come in.
        clock (`tuple[float, float]`):
            `(scale, offset)`: the denoiser is told `scale * t + offset` at the scheduler's training timestep `t`.
        sign (`int`):
            +1 or -1: the scheduler is given `sign * output`.
        calls_per_step (`int`):
            Denoiser calls of one guided step: 1, or 2 where the branches are called one after the other.
        branches (`int`):
            Parts of a guided step: 1 without classifier-free guidance, 2 with it.
        conditional_branch (`int`):
            Which part belongs to the prompt.
        batch_axes (`dict`):
            Per conditioning argument, the axis that grows with the number of prompts, or `None`; nested like the
            arguments themselves.
        guidance_scale (`float` or `None`, *optional*, defaults to `1.0`):
            w of the pipeline's guidance `u + w (c - u)` as measured, which need not be its argument; `None` where it
            combines the branches otherwise.
    """

    format: DenoiserFormat
    timestep_dtype: torch.dtype
    clock: tuple[float, float]
    sign: int
    calls_per_step: int
    branches: int
    conditional_branch: int
    batch_axes: dict[str, Any]
    guidance_scale: float | None = 1.0

    @property
    def latents_name(self) -> str:
        """Argument that takes the noisy latents."""
        return self.format.latents_name

    @property
    def timestep_name(self) -> str:
        """Argument that takes the timestep."""
        return self.format.timestep_name

    @property
    def is_guided(self) -> bool:
        return self.branches == 2

    def training_timestep(self, denoiser_timestep: float) -> float:
        """Scheduler's training timestep of a timestep that the denoiser was given."""
        scale, offset = self.clock
        return (denoiser_timestep - offset) / scale


@dataclass(frozen=True)
class Conditioning:
    """
    Denoiser arguments of some prompts, one row a prompt, kept on the host.

    Args:
        conditional (`dict`):
            Arguments of the prompts' own branch, without latents and timestep.
        unconditional (`dict` or `None`):
            Arguments of the other branch of a guided call, `None` without classifier-free guidance.
        batch_axes (`dict`):
            See [`DenoiserCall`].
    """

    conditional: dict[str, Any]
    unconditional: dict[str, Any] | None
    batch_axes: dict[str, Any]

    def rows(self, indices: Sequence[int], device: torch.device | str, unconditional: bool = False) -> dict[str, Any]:
        """Denoiser arguments of the prompts at `indices`, on `device`."""
        branch = self.unconditional if unconditional else self.conditional
        return put_on(take_rows(branch, self.batch_axes, torch.as_tensor(indices).tolist()), device)


def denoiser_name_of(pipeline: Any) -> str:
    """Attribute under which `pipeline` keeps its denoiser: `"transformer"` or `"unet"`."""
    for name in ("transformer", "unet"):
        if isinstance(getattr(pipeline, name, None), torch.nn.Module):
            return name
    raise ValueError(
        f"sd_pipeline: {type(pipeline).__name__} has neither a `transformer` nor a `unet` module. Pass a diffusers "
        "pipeline whose denoiser is kept under one of these names."
    )


def denoiser_of(pipeline: Any) -> torch.nn.Module:
    """What `pipeline` calls to predict noise, data or velocity: a module, or what `torch.compile` made of it."""
    return getattr(pipeline, denoiser_name_of(pipeline))


def replay(
    denoiser: Callable[..., Any],
    call: DenoiserCall,
    x_t: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: dict[str, Any],
) -> torch.Tensor:
    """
    Call the denoiser as the pipeline does, with other latents and timesteps.

    Args:
        denoiser (`torch.nn.Module`):
            The module, or what accelerate made of it.
        x_t (`torch.Tensor` of shape `(B, ...)`):
            Noisy latents in the denoiser's own layout.
        timesteps (`torch.Tensor` of shape `(B,)`):
            Training timesteps of the scheduler.
        conditioning (`dict`):
            From [`Conditioning.rows`], `B` rows.

    Returns:
        `torch.Tensor` of the shape of `x_t`: the prediction in the scheduler's parameterization and sign.
    """
    scale, offset = call.clock
    clock = scale * timesteps.double() + offset
    # A clock that the pipeline keeps in integers is still real-valued between its own steps.
    dtype = call.timestep_dtype if call.timestep_dtype.is_floating_point else torch.float32
    arguments = call.format.arguments(x_t, clock.to(x_t.device, dtype), conditioning)
    return call.sign * prediction_of(call.format, denoiser(**arguments), x_t)


def record_conditioning(
    pipeline: Any,
    call: DenoiserCall,
    prompts: Sequence[str],
    pipeline_kwargs: dict[str, Any] | None = None,
    inputs: Sequence[dict[str, Any]] | None = None,
) -> Conditioning:
    """
    Record the denoiser's conditioning for `prompts` without sampling: the pipeline is left at its denoiser's door.

    Args:
        prompts (`Sequence[str]`):
            `P` prompts; row `i` of the result belongs to prompt `i`.
        pipeline_kwargs (`dict`, *optional*):
            Arguments of the sampling call.
        inputs (`Sequence[dict]`, *optional*):
            `P` dicts of each prompt's own inputs of the pipeline.
    """
    calls = calls_of_first_step(pipeline, call.calls_per_step, prompts, pipeline_kwargs or {}, inputs)
    parts = [put_on(part, "cpu") for part in branches_of(calls, call.format, call.batch_axes, len(prompts))]
    unconditional = parts[1 - call.conditional_branch] if call.is_guided else None
    return Conditioning(parts[call.conditional_branch], unconditional, call.batch_axes)


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


def branches_of(
    calls: list[dict[str, Any]], format: DenoiserFormat, batch_axes: dict[str, Any], prompts: int
) -> list[dict[str, Any]]:
    """Conditioning of each branch of one step, with `prompts` rows each, whether called together or in turn."""
    parts = []
    for arguments in calls:
        conditioning = format.conditioning(arguments)
        for start in range(0, len(format.latents(arguments)), prompts):
            parts.append(take_rows(conditioning, batch_axes, range(start, start + prompts)))
    return parts


def prediction_of(format: DenoiserFormat, output: Any, x_t: torch.Tensor) -> torch.Tensor:
    """The denoiser's prediction; of a learned variance only the prediction's channels."""
    prediction = format.prediction(output)
    return prediction[:, : x_t.shape[1]] if prediction.shape[1] > x_t.shape[1] else prediction
