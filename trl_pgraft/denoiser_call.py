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


class CallRecorded(Exception):
    """Leaves a pipeline once its denoiser call has been seen."""


@dataclass(frozen=True)
class DenoiserCall:
    """
    How one pipeline calls its denoiser, as [`learn_denoiser_call`] found it.

    Args:
        latents_name (`str`):
            Argument that takes the noisy latents: the first of the denoiser's `forward`.
        timestep_name (`str`):
            Argument that takes the timestep.
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
    """

    latents_name: str
    timestep_name: str
    timestep_dtype: torch.dtype
    clock: tuple[float, float]
    sign: int
    calls_per_step: int
    branches: int
    conditional_branch: int
    batch_axes: dict[str, Any]

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
        index = torch.as_tensor(indices)

        def pick(value: Any, axis: int | None) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return (value if axis is None else value.index_select(axis, index)).to(device)

        return map_tensors(pick, self.unconditional if unconditional else self.conditional, self.batch_axes)


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
    """The module that predicts noise, data or velocity in `pipeline`."""
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
    arguments = {call.latents_name: x_t, call.timestep_name: clock.to(x_t.device, dtype), **conditioning}
    return call.sign * prediction_of(denoiser(**arguments), x_t)


def record_conditioning(
    pipeline: Any, call: DenoiserCall, prompts: Sequence[str], pipeline_kwargs: dict[str, Any] | None = None
) -> Conditioning:
    """
    Record the denoiser's conditioning for `prompts` without sampling: the pipeline is left at its denoiser's door.

    Args:
        prompts (`Sequence[str]`):
            `P` prompts; row `i` of the result belongs to prompt `i`.
        pipeline_kwargs (`dict`, *optional*):
            Arguments of the sampling call.
    """
    denoiser = denoiser_of(pipeline)
    calls: list[dict[str, Any]] = []

    def stop_at_last(arguments: dict[str, Any]) -> None:
        calls.append(arguments)
        if len(calls) == call.calls_per_step:
            raise CallRecorded

    with observe_calls(denoiser, stop_at_last):
        run_until_recorded(pipeline, list(prompts), pipeline_kwargs or {})
    parts = branches_of(calls, denoiser, call.batch_axes, len(prompts))
    on_host = [map_tensors(lambda value, _: _to_host(value), part, call.batch_axes) for part in parts]
    unconditional = on_host[1 - call.conditional_branch] if call.is_guided else None
    return Conditioning(on_host[call.conditional_branch], unconditional, call.batch_axes)


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
    """

    def __init__(self, position: int):
        self.position = position
        self.x_i: torch.Tensor | None = None
        self.timesteps: list[float] = []
        self.denoiser_calls = 0


@contextmanager
def record_trajectory(pipeline: Any, call: DenoiserCall, position: int, batch_size: int) -> Iterator[Trajectory]:
    """
    Record the state that enters step `position` (0 is pure noise) of the pipeline call made inside the block.

    The final latents never pass through the denoiser: they are the last result of `scheduler.step`, which is observed
    on this scheduler object and restored on leaving.
    """
    trajectory = Trajectory(position)
    first = call.conditional_branch * batch_size if call.calls_per_step == 1 else 0

    def on_denoiser(arguments: dict[str, Any]) -> None:
        latents = arguments[call.latents_name]
        trajectory.denoiser_calls += latents.shape[0]
        if len(trajectory.timesteps) == position and trajectory.x_i is None:
            trajectory.x_i = latents[first : first + batch_size].clone()

    def on_step(timestep: Any, result: Any, **_: Any) -> None:
        trajectory.timesteps.append(float(timestep))
        if len(trajectory.timesteps) == position == len(pipeline.scheduler.timesteps):
            trajectory.x_i = (result[0] if isinstance(result, tuple) else result.prev_sample).clone()

    with observe_calls(denoiser_of(pipeline), on_denoiser), observe_steps(pipeline.scheduler, on_step):
        yield trajectory


@contextmanager
def observe_calls(denoiser: torch.nn.Module, observer: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Show `observer` the named arguments of every call of `denoiser` made inside the block."""
    signature = inspect.signature(type(denoiser).forward)
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
    """Show `observer` the timestep, model output and result of every `scheduler.step` made inside the block."""
    original, shadowed = scheduler.step, vars(scheduler).get("step")

    # With the signature of the original, because pipelines look there for what to pass, such as eta and generator.
    @functools.wraps(original)
    def step(model_output: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(model_output, timestep, *args, **kwargs)
        observer(timestep=timestep, result=result, model_output=model_output)
        return result

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
        if shadowed is not None:
            scheduler.step = shadowed


def run_until_recorded(pipeline: Any, prompts: list[str], kwargs: dict[str, Any]) -> None:
    """Call the pipeline until an observer raises [`CallRecorded`], and put its components back where they were."""
    # A generator of its own, so that asking leaves the caller's random state alone.
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            pipeline(generator=generator, **prompt_arguments(prompts, {**kwargs, "output_type": "latent"}))
    except CallRecorded:
        pipeline.maybe_free_model_hooks()


def prompt_arguments(prompts: Sequence[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline call for `prompts`: beside a list of prompts it wants a list of negative prompts."""
    negative = arguments.get("negative_prompt")
    repeated = {"negative_prompt": [negative] * len(prompts)} if isinstance(negative, str) else {}
    return {**arguments, **repeated, "prompt": list(prompts)}


def argument_names(denoiser: torch.nn.Module) -> tuple[str, str]:
    """Names of the denoiser's arguments for the noisy latents and for the timestep."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    timestep = next((name for name in names if name in ("timestep", "timesteps", "t")), None)
    if timestep is None:
        raise ValueError(f"{type(denoiser).__name__}.forward has no argument `timestep`; it takes {', '.join(names)}.")
    return names[0], timestep


def conditioning_of(arguments: dict[str, Any], denoiser: torch.nn.Module) -> dict[str, Any]:
    """A denoiser call's arguments without latents and timestep."""
    own = argument_names(denoiser)
    return {name: value for name, value in arguments.items() if name not in own}


def branches_of(
    calls: list[dict[str, Any]], denoiser: torch.nn.Module, batch_axes: dict[str, Any], prompts: int
) -> list[dict[str, Any]]:
    """Conditioning of each branch of one step, with `prompts` rows each, whether called together or in turn."""
    latents_name, _ = argument_names(denoiser)
    parts = []
    for arguments in calls:
        for branch in range(arguments[latents_name].shape[0] // prompts):

            def cut(value: Any, axis: int | None, start: int = branch * prompts) -> Any:
                return value if axis is None else value.narrow(axis, start, prompts)

            parts.append(map_tensors(cut, conditioning_of(arguments, denoiser), batch_axes))
    return parts


def prediction_of(output: Any, x_t: torch.Tensor) -> torch.Tensor:
    """The denoiser's tensor; of a learned variance only the prediction's channels."""
    prediction = output[0] if isinstance(output, tuple) else output.sample
    return prediction[:, : x_t.shape[1]] if prediction.shape[1] > x_t.shape[1] else prediction


def _to_host(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def map_tensors(function: Callable[[Any, Any], Any], tree: Any, other: Any) -> Any:
    """Apply `function` leaf by leaf to two trees of dicts that have the same keys."""
    if isinstance(tree, dict):
        return {name: map_tensors(function, value, other[name]) for name, value in tree.items()}
    return function(tree, other)
