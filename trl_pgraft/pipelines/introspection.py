# SPDX-License-Identifier: Apache-2.0

"""Find out how a pipeline calls its denoiser, by asking it: what one call does not tell, several calls do.

The batch axes come from calls for two and for three prompts, the conditional branch from a call without guidance,
clock and sign from what the scheduler is given beside it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from .denoiser_call import DenoiserCall, branches_of, denoiser_of, prediction_of
from .denoiser_format import DenoiserFormat
from .inputs import parameters_of
from .observe import (
    CallRecorded,
    calls_of_first_step,
    observe_calls,
    observe_steps,
    require_a_call,
    run_until_recorded,
)
from .schedulers import run_on_known_data, sampler_of
from .tree import find_batch_axes, merge_axes


# Of different lengths, because some pipelines pass a mask only where there is padding.
PROBE_PROMPTS = ["a", "a longer prompt", "of words"]
GUIDANCE_ARGUMENTS = ("true_cfg_scale", "guidance_scale")


def introspect_denoiser_call(
    pipeline: Any, pipeline_kwargs: dict[str, Any] | None = None, denoiser_format: type[DenoiserFormat] | None = None
) -> DenoiserCall:
    """
    Find out how `pipeline` calls its denoiser, by running it for one, two and three prompts, guided and unguided.

    Costs about six denoiser calls for one image.

    Args:
        pipeline (`DiffusionPipeline`):
            What to ask.
        pipeline_kwargs (`dict`, *optional*):
            Arguments of the sampling call: guidance scale, size, and what it is handed beside a prompt.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`] for a denoiser that the default does not serve.

    Raises:
        `ValueError`: where the pipeline breaks one of the rules, naming it.
    """
    kwargs = {**(pipeline_kwargs or {}), "num_inference_steps": _probe_steps(pipeline, pipeline_kwargs or {})}
    format = (denoiser_format or DenoiserFormat).of(denoiser_of(pipeline))
    run_on_known_data(sampler_of(pipeline, pipeline_kwargs or {}))  # refuses schedulers that the rest would stumble on
    step = _first_step(pipeline, PROBE_PROMPTS[:1], kwargs)
    branches = _count_branches(step, format, pipeline)
    off = {} if branches == 1 else _guidance_off(pipeline, kwargs, format)
    unguided = {**kwargs, **off}
    axes = _batch_axes(pipeline, kwargs, len(step.calls), format)
    probe = _two_steps(pipeline, unguided, format)
    conditional = 0 if branches == 1 else _conditional_branch(pipeline, kwargs, unguided, axes, format)
    sign = _sign(probe, pipeline)
    scale = _guidance_scale(step, format, conditional, sign, kwargs.get(*off)) if off else 1.0
    return DenoiserCall(
        format=format,
        timestep_dtype=format.timestep(step.calls[0]).dtype,
        clock=_fit_clock(probe, pipeline.scheduler),
        sign=sign,
        calls_per_step=len(step.calls),
        branches=branches,
        conditional_branch=conditional,
        batch_axes=axes,
        guidance_scale=scale,
    )


@dataclass
class _Step:
    """Named arguments and outputs of all denoiser calls of a step, and what the scheduler was given."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    model_output: torch.Tensor | None = None
    timestep: float = math.nan


def _first_step(pipeline: Any, prompts: list[str], kwargs: dict[str, Any]) -> _Step:
    """What happens in the first step of a pipeline call."""
    step = _Step()

    def stop(timestep: Any, model_output: torch.Tensor, **_: Any) -> None:
        step.timestep, step.model_output = float(timestep), model_output
        raise CallRecorded

    handle = denoiser_of(pipeline).register_forward_hook(lambda module, args, output: step.outputs.append(output))
    try:
        with observe_calls(denoiser_of(pipeline), step.calls.append), observe_steps(pipeline.scheduler, stop):
            run_until_recorded(pipeline, prompts, kwargs)
    finally:
        handle.remove()
    require_a_call(pipeline, step.calls)
    return step


def _probe_steps(pipeline: Any, kwargs: dict[str, Any]) -> int:
    """Steps to ask for so that two are made, where an image is started from and only a share of them is."""
    parameter = parameters_of(pipeline).get("strength")
    strength = kwargs.get("strength", parameter.default if parameter else None)
    return 2 if not isinstance(strength, float) or strength <= 0 else math.ceil(2 / strength)


def _count_branches(step: _Step, format: DenoiserFormat, pipeline: Any) -> int:
    _check_latents(step, format, pipeline)
    branches = sum(len(format.latents(call)) for call in step.calls)
    if branches > 2:
        raise ValueError(
            f"{type(pipeline).__name__} calls its denoiser on {branches} branches a step; classifier-free guidance "
            "with two (conditional, unconditional) is what can be trained. Switch further guidance off in "
            "pipeline_kwargs."
        )
    return branches


def _check_latents(step: _Step, format: DenoiserFormat, pipeline: Any) -> None:
    """The rule on latents: a tensor, of which the prediction has the shape, or more channels (learned variance)."""
    override = "Override DenoiserFormat and pass it as denoiser_format (docs/models.md has examples)."
    latents, output = format.latents(step.calls[0]), format.prediction(step.outputs[0])
    denoiser = type(denoiser_of(pipeline)).__name__
    for found, what in ((latents, f"argument `{format.latents_name}`"), (output, "output")):
        if not isinstance(found, torch.Tensor):
            raise ValueError(
                f"{denoiser}: its {what} is a {type(found).__name__}, where noisy latents and prediction must be "
                f"tensors. {override}"
            )
    shape, expected = output.shape, latents.shape
    if shape[0] != expected[0] or shape[2:] != expected[2:] or shape[1] < expected[1]:
        raise ValueError(
            f"{denoiser}: its argument `{format.latents_name}` has shape {tuple(expected)} and its output "
            f"{tuple(shape)}; the noisy latents must have the prediction's shape. An inpainting model takes further "
            f"channels there. {override}"
        )


def _guidance_off(pipeline: Any, kwargs: dict[str, Any], format: DenoiserFormat) -> dict[str, float]:
    """The argument and value, at 1.0 or else at 0.0, that switch guidance off, so that one branch is left."""
    names = [name for name in GUIDANCE_ARGUMENTS if name in parameters_of(pipeline)]
    for off in ({name: value} for value in (1.0, 0.0) for name in names):
        step = _first_step(pipeline, PROBE_PROMPTS[:1], {**kwargs, **off})
        if sum(len(format.latents(call)) for call in step.calls) == 1:
            return off
    raise ValueError(
        f"{type(pipeline).__name__} calls its denoiser on two branches, and setting {' or '.join(names) or 'nothing'} "
        "to 1.0 leaves both, so the conditional branch cannot be told. Sample without guidance: switch it off in "
        "pipeline_kwargs."
    )


def _batch_axes(pipeline: Any, kwargs: dict[str, Any], calls: int, format: DenoiserFormat) -> dict[str, Any]:
    """Batch axes of the conditioning, from the arguments of calls for two and for three prompts."""
    two, three = (
        [
            format.conditioning(call)
            for call in calls_of_first_step(pipeline, calls, (PROBE_PROMPTS * 2)[1 : 1 + n], kwargs)
        ]
        for n in (2, 3)
    )
    axes: Any = None
    for for_two, for_three in zip(two, three, strict=True):
        for name in for_two:
            try:
                axes = merge_axes(axes, {name: find_batch_axes(for_two[name], for_three[name])})
            except ValueError as error:
                raise ValueError(
                    f"{type(pipeline).__name__}: the batch axis of its denoiser's argument `{name}` cannot be told, "
                    f"because {error}. Override DenoiserFormat.conditioning (docs/models.md)."
                ) from error
    return axes or {}


def _conditional_branch(
    pipeline: Any, kwargs: dict[str, Any], unguided: dict[str, Any], axes: dict[str, Any], format: DenoiserFormat
) -> int:
    """Index of the branch that equals the recording with guidance off."""
    for prompt in PROBE_PROMPTS:
        step, plain = (_first_step(pipeline, [prompt], arguments) for arguments in (kwargs, unguided))
        wanted = format.conditioning(plain.calls[0])
        matches = [
            index
            for index, part in enumerate(branches_of(step.calls, format, axes, 1))
            if all(_equal(part[name], wanted[name]) for name in part)
        ]
        if len(matches) == 1:
            return matches[0]
        if not matches:
            raise ValueError(
                f"{type(pipeline).__name__}: no branch of its guided call equals its call with guidance off, so the "
                "conditional branch cannot be told. Sample without guidance (sample_guidance_scale=1.0)."
            )
        # The negative prompt may be the very prompt that was asked with.
    raise ValueError(
        f"{type(pipeline).__name__}: both branches of its guided call are the same, so there is no guidance to train "
        "with. Give negative inputs that differ from the prompt's, or sample with sample_guidance_scale=1.0."
    )


def _guidance_scale(
    step: _Step, format: DenoiserFormat, conditional: int, sign: int, given: float | None
) -> float | None:
    """w of `u + w (c - u)`, fitted to what the scheduler was given; `None` where it is something else."""
    latents = [format.latents(call) for call in step.calls]
    outputs = [prediction_of(format, output, x_t) for output, x_t in zip(step.outputs, latents, strict=True)]
    parts = sign * torch.cat(outputs).cpu().double()
    combined = step.model_output.cpu().double()[:1, : parts.shape[1]].reshape(parts[:1].shape)
    c, u = parts[conditional : conditional + 1], parts[1 - conditional : 2 - conditional]
    scale = ((combined - u) * (c - u)).sum() / (c - u).square().sum()
    residual = (u + scale * (c - u) - combined).norm()
    tolerance = 1e-4 * (combined - u).norm()
    if given is not None:
        # Some pipelines add w (c - u) to c. In half precision only these values tell guidance from what resembles it.
        rounding = torch.finfo(outputs[0].dtype).eps / 2 * scale.abs() * parts.norm()
        for nominal in (given, given + 1):
            if math.isclose(scale, nominal, rel_tol=1e-2) and residual <= tolerance + rounding:
                return float(nominal)
    return float(scale) if residual <= tolerance else None


@dataclass
class _Probe:
    scheduler_timesteps: list[float]
    denoiser_timesteps: list[float]
    x_t: torch.Tensor | None = None
    output: torch.Tensor | None = None
    model_output: torch.Tensor | None = None


def _two_steps(pipeline: Any, kwargs: dict[str, Any], format: DenoiserFormat) -> _Probe:
    """Run two unguided steps; keep both clocks, and what the scheduler was given of the first prediction."""
    denoiser = denoiser_of(pipeline)
    probe = _Probe([], [])

    def on_denoiser(arguments: dict[str, Any]) -> None:
        probe.x_t = format.latents(arguments)
        probe.denoiser_timesteps.append(float(format.timestep(arguments).flatten()[0]))

    def on_output(module: torch.nn.Module, args: tuple, output: Any) -> None:
        if probe.model_output is None:
            probe.output = prediction_of(format, output, probe.x_t)

    def on_step(timestep: Any, model_output: torch.Tensor, **_: Any) -> None:
        probe.model_output = model_output if probe.model_output is None else probe.model_output
        probe.scheduler_timesteps.append(float(timestep))
        if len(probe.scheduler_timesteps) == 2:
            raise CallRecorded

    handle = denoiser.register_forward_hook(on_output)
    try:
        with observe_calls(denoiser, on_denoiser), observe_steps(pipeline.scheduler, on_step):
            run_until_recorded(pipeline, PROBE_PROMPTS[:1], kwargs)
    finally:
        handle.remove()
    return probe


def _fit_clock(probe: _Probe, scheduler: Any) -> tuple[float, float]:
    """Affine map between the two clocks; a well-known one where it fits, because bf16 timesteps are rounded."""
    total = float(scheduler.config.num_train_timesteps)
    # Another denoiser may make the second step.
    pairs = list(zip(probe.scheduler_timesteps, probe.denoiser_timesteps, strict=False))
    for scale, offset in ((1.0, 0.0), (1 / total, 0.0), (-1 / total, 1.0)):
        span = abs(scale) * total
        if all(abs(scale * t + offset - m) < 5e-3 * span for t, m in pairs):
            return scale, offset
    (t_0, m_0), (t_1, m_1) = pairs
    scale = (m_1 - m_0) / (t_1 - t_0)
    return scale, m_0 - scale * t_0


def _sign(probe: _Probe, pipeline: Any) -> int:
    # A learned variance may go to the scheduler beside the prediction.
    given = probe.model_output[:, : probe.output.shape[1]]
    for sign in (1, -1):
        if probe.output.shape == given.shape and torch.allclose(
            sign * probe.output.float(), given.float(), rtol=1e-2, atol=1e-3
        ):
            return sign
    raise ValueError(
        f"{type(pipeline).__name__} gives `scheduler.step` something other than plus or minus its denoiser's output; "
        "the prediction cannot be replayed without knowing what it does in between. Override "
        "DenoiserFormat.prediction to do the same, and pass it as denoiser_format (docs/models.md)."
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.shape == other.shape
        return same and torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-4)
    if isinstance(one, dict):
        return all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return True
