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


"""Find out how a pipeline calls its denoiser, by asking it: what one call does not tell, two calls do.

The batch axes come from calls for one and for two prompts, the conditional branch from a call without guidance, clock
and sign from what the scheduler is given beside it.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .denoiser_call import (
    CallRecorded,
    DenoiserCall,
    argument_names,
    branches_of,
    conditioning_of,
    denoiser_of,
    map_tensors,
    observe_calls,
    observe_steps,
    prediction_of,
    require_a_call,
    run_until_recorded,
)
from .samplers import run_on_known_data, sampler_of


def learn_denoiser_call(pipeline: Any, pipeline_kwargs: dict[str, Any] | None = None) -> DenoiserCall:
    """
    Find out how `pipeline` calls its denoiser, by running it for one and two prompts, guided and unguided.

    Costs at most six denoiser calls. `pipeline_kwargs` are those of the sampling call (guidance scale, size, ...).

    Raises:
        `ValueError`: where the pipeline breaks one of the rules, naming it.
    """
    kwargs = {**(pipeline_kwargs or {}), "num_inference_steps": 2}
    denoiser = denoiser_of(pipeline)
    latents_name, timestep_name = argument_names(denoiser)
    run_on_known_data(sampler_of(pipeline, pipeline_kwargs or {}))  # refuses schedulers that the rest would stumble on
    one, two = (_first_step(pipeline, ["a"] * n, kwargs) for n in (1, 2))
    branches = sum(call[latents_name].shape[0] for call in one)
    if branches > 2:
        raise ValueError(
            f"{type(pipeline).__name__} calls its denoiser on {branches} branches a step; classifier-free guidance "
            "with two (conditional, unconditional) is what can be trained."
        )
    plain = one
    if branches == 2:
        plain = _first_step(pipeline, ["a"], {**kwargs, "guidance_scale": 1.0})
    probe = _two_steps(pipeline, {**kwargs, **({"guidance_scale": 1.0} if branches == 2 else {})})
    axes = map_tensors(_batch_axis, conditioning_of(one[0], denoiser), conditioning_of(two[0], denoiser))
    parts = branches_of(one, denoiser, axes, 1)
    return DenoiserCall(
        latents_name=latents_name,
        timestep_name=timestep_name,
        timestep_dtype=one[0][timestep_name].dtype,
        clock=_fit_clock(probe, pipeline.scheduler),
        sign=_sign(probe, pipeline),
        calls_per_step=len(one),
        branches=branches,
        conditional_branch=_matching(parts, conditioning_of(plain[0], denoiser), pipeline),
        batch_axes=axes,
    )


@dataclass
class _Probe:
    scheduler_timesteps: list[float]
    denoiser_timesteps: list[float]
    x_t: torch.Tensor | None = None
    output: torch.Tensor | None = None
    model_output: torch.Tensor | None = None


def _two_steps(pipeline: Any, kwargs: dict[str, Any]) -> _Probe:
    """Run two unguided steps; keep both clocks, and what the scheduler was given of the last prediction."""
    denoiser = denoiser_of(pipeline)
    latents_name, timestep_name = argument_names(denoiser)
    probe = _Probe([], [])

    def on_denoiser(arguments: dict[str, Any]) -> None:
        probe.x_t = arguments[latents_name]
        probe.denoiser_timesteps.append(float(torch.as_tensor(arguments[timestep_name]).flatten()[0]))

    def on_output(module: torch.nn.Module, args: tuple, output: Any) -> None:
        probe.output = prediction_of(output, probe.x_t)

    def on_step(timestep: Any, model_output: torch.Tensor, **_: Any) -> None:
        probe.model_output = model_output
        probe.scheduler_timesteps.append(float(timestep))
        if len(probe.scheduler_timesteps) == 2:
            raise CallRecorded

    handle = denoiser.register_forward_hook(on_output)
    try:
        with observe_calls(denoiser, on_denoiser), observe_steps(pipeline.scheduler, on_step):
            run_until_recorded(pipeline, ["a"], kwargs)
    finally:
        handle.remove()
    return probe


def _first_step(pipeline: Any, prompts: list[str], kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """Named arguments of all denoiser calls of the first step."""
    calls: list[dict[str, Any]] = []

    def stop(**_: Any) -> None:
        raise CallRecorded

    with observe_calls(denoiser_of(pipeline), calls.append), observe_steps(pipeline.scheduler, stop):
        run_until_recorded(pipeline, prompts, kwargs)
    require_a_call(pipeline, calls)
    return calls


def _batch_axis(for_one: Any, for_two: Any) -> int | None:
    if not isinstance(for_one, torch.Tensor) or for_one.shape == for_two.shape:
        return None
    sizes = zip(for_one.shape, for_two.shape, strict=True)
    return next(axis for axis, (one, two) in enumerate(sizes) if two == 2 * one)


def _matching(parts: list[dict[str, Any]], plain: dict[str, Any], pipeline: Any) -> int:
    """Index of the branch that equals the recording with guidance off."""
    if len(parts) == 1:
        return 0
    for index, part in enumerate(parts):
        if all(_equal(part[name], plain[name]) for name in part):
            return index
    raise ValueError(
        f"{type(pipeline).__name__}: no branch of its guided call equals its call with guidance_scale=1.0, so the "
        "conditional branch cannot be told. Sample without guidance (sample_guidance_scale=1.0)."
    )


def _fit_clock(probe: _Probe, scheduler: Any) -> tuple[float, float]:
    """Affine map between the two clocks; a well-known one where it fits, because bf16 timesteps are rounded."""
    total = float(scheduler.config.num_train_timesteps)
    (t_0, t_1), (m_0, m_1) = probe.scheduler_timesteps, probe.denoiser_timesteps
    for scale, offset in ((1.0, 0.0), (1 / total, 0.0), (-1 / total, 1.0)):
        span = abs(scale) * total
        if all(abs(scale * t + offset - m) < 5e-3 * span for t, m in ((t_0, m_0), (t_1, m_1))):
            return scale, offset
    scale = (m_1 - m_0) / (t_1 - t_0)
    return scale, m_0 - scale * t_0


def _sign(probe: _Probe, pipeline: Any) -> int:
    for sign in (1, -1):
        if probe.output.shape == probe.model_output.shape and torch.allclose(
            sign * probe.output.float(), probe.model_output.float(), rtol=1e-2, atol=1e-3
        ):
            return sign
    raise ValueError(
        f"{type(pipeline).__name__} gives `scheduler.step` something other than plus or minus its denoiser's output; "
        "the prediction cannot be replayed without knowing what it does in between."
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-4)
    if isinstance(one, dict):
        return all(_equal(one[name], other[name]) for name in one)
    return True
