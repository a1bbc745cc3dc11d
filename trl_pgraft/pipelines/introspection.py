# SPDX-License-Identifier: Apache-2.0

"""Determine how a pipeline calls its denoiser, from recordings: what one call does not show, several calls do.

The denoiser itself makes one call for one image, at the smallest size that the pipeline takes, which shows the layout
of its output. All else is recorded with a stand-in in its place: arguments, branches, guidance scale and timesteps of
every step at the real size, batch axes from two and three prompts, the conditional branch from an unguided call.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline

from .branches import Record, conditional_branch, count_branches, guidance_off, measured_scale, rows_of
from .controls import Control, settings_of
from .denoiser_call import DenoiserCall, denoiser_of, prediction_of
from .denoiser_format import DenoiserFormat
from .observe import settings_of_layers
from .recording import PROBE_PROMPTS, Step, record_call
from .schedulers import Sampler, run_on_known_data, sampler_of
from .smallest_call import answered_by, smallest_answer
from .tree import find_batch_axes, merge_axes, nearly_equal
from .wiring import find_controls


SEED_TOLERANCE = 0.02  # of an argument's norm: a VAE samples its encoding of an image, in a narrow range


@dataclass(frozen=True)
class StepFacts:
    """
    What one step of a pipeline call showed.

    Args:
        timestep (`float`):
            The scheduler's training timestep.
        denoiser_timestep (`float` or `None`):
            The timestep on the denoiser's own clock; `None` where another model made the step.
        branches (`int`):
            Rows that the denoiser was given for one image: 1 without classifier-free guidance, 2 with it.
        guidance_scale (`float` or `None`):
            w of `u + w (c - u)`, 1.0 without guidance; `None` where the branches are combined otherwise.
        changed (`list[str]`):
            The denoiser's arguments, beside latents and timestep, that are not those of the first step.
        settings (`dict[str, Any]`):
            Arguments of controls that have no tensors, such as a ControlNet's scale.
    """

    timestep: float
    denoiser_timestep: float | None
    branches: int
    guidance_scale: float | None
    changed: list[str]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Introspection:
    """
    What was determined of a pipeline call with certain arguments.

    Args:
        call ([`DenoiserCall`]):
            How the pipeline calls its denoiser.
        sampler ([`Sampler`]):
            A copy of its scheduler, with the timesteps of the call.
        first_step (`list[dict]`):
            Named arguments of the denoiser's calls in the first step of one image, at the size of the call; tensors
            are on the meta device, for their shapes and types.
        steps (`list[StepFacts]`):
            Timesteps, guidance and changed arguments of every step.
    """

    call: DenoiserCall
    sampler: Sampler
    first_step: list[dict[str, Any]]
    steps: list[StepFacts]


def introspect(
    pipeline: DiffusionPipeline,
    pipeline_kwargs: dict[str, Any] | None = None,
    denoiser_format: type[DenoiserFormat] | None = None,
) -> Introspection:
    """
    Determine how `pipeline` calls its denoiser, by recording it for one, two and three prompts.

    Costs one denoiser call for one image of the smallest size that the pipeline takes.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline; its components and its scheduler stay as they are.
        pipeline_kwargs (`dict`, *optional*):
            Arguments of the sampling call: guidance scale, size, and what it is handed beside a prompt.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`] for a denoiser that the default does not serve.

    Raises:
        `ValueError`: the pipeline breaks one of the rules of docs/models.md; the message names it.
    """
    kwargs = pipeline_kwargs or {}
    format = (denoiser_format or DenoiserFormat).of(denoiser_of(pipeline))
    stand_in = functools.partial(answered_by, pipeline, smallest_answer(pipeline, kwargs, format), format.latents_name)
    record: Record = functools.partial(record_call, pipeline, stand_in=stand_in)
    recording, controls = find_controls(pipeline, record, kwargs, format)
    sampler = sampler_of(recording)
    run_on_known_data(sampler)  # refuses schedulers that the rest would stumble on
    record = functools.partial(record, controls=controls)
    first = record(PROBE_PROMPTS[:1], kwargs, steps=1).first if controls else recording.first
    branches = count_branches(first, format, pipeline)
    _check_seed(first, record(PROBE_PROMPTS[:1], kwargs, steps=1, seed=1).first, format, pipeline)
    off, unguided = ({}, first) if branches == 1 else guidance_off(record, pipeline, kwargs, format)
    axes = _batch_axes(record, pipeline, kwargs, format)
    conditional = conditional_branch(record, pipeline, kwargs, off, (first, unguided), axes, format) if off else 0
    sign, nominal = _sign(unguided, format, pipeline), kwargs.get(*off) if off else None
    state = settings_of_layers(denoiser_of(pipeline))

    def facts(first: Step, step: Step) -> StepFacts:
        _check_layers(state, step, pipeline)
        rows = rows_of(step, format)
        scale = measured_scale(step, format, conditional, sign, nominal) if rows == 2 else 1.0 if rows == 1 else None
        changed = _changed(first.calls, step.calls, format) if rows == branches else []
        settings = settings_of(*step.calls[:1])
        return StepFacts(step.timestep, _timestep(step, format, pipeline), rows, scale, changed, settings)

    # Left after the last step, so that no image is decoded.
    steps = record(PROBE_PROMPTS[:1], kwargs, len(sampler.timesteps), facts).measured
    call = DenoiserCall(
        format=format,
        timestep_dtype=format.timestep(first.calls[0]).dtype,
        clock=_fit_clock(_two_steps(steps, record, kwargs, facts), pipeline),
        sign=sign,
        calls_per_step=len(first.calls),
        branches=branches,
        conditional_branch=conditional,
        batch_axes=axes,
        guidance_scale=steps[0].guidance_scale,
        controls=tuple(_with_settings(control, steps) for control in controls),
    )
    return Introspection(call, sampler, send_to_device(recording.first.calls, "meta"), steps)


def _with_settings(control: Control, steps: list[StepFacts]) -> Control:
    """The control with those of its settings that are not the same in all steps, by timestep."""
    own = [control.own(step.settings) for step in steps]
    varying = {name for settings in own for name in settings if settings[name] != own[0].get(name)}
    kept = ({name: value for name, value in settings.items() if name in varying} for settings in own)
    return replace(control, settings=list(zip([step.timestep for step in steps], kept, strict=True)))


def _check_layers(state: dict[str, str], step: Step, pipeline: DiffusionPipeline) -> None:
    """Refuse what changes the denoiser itself while it samples: training knows it as it was before."""
    now = settings_of_layers(denoiser_of(pipeline))
    changed = sorted(name for name in state | now if state.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"{type(pipeline).__name__}: {changed[0]} of its denoiser is no longer what it was by timestep "
            f"{step.timestep:g}, as after a callback of pipeline_kwargs that schedules the scale of IP-Adapters or "
            "LoRAs. Training knows one denoiser, and so does the next call of the pipeline, which finds it changed. "
            "Leave the schedule out, and load the pipeline anew."
        )


def _two_steps(
    steps: list[StepFacts], record: Record, kwargs: dict[str, Any], facts: Callable[[Step, Step], StepFacts]
) -> list[StepFacts]:
    """Steps of a call that has two at least, because one pair of timesteps does not determine a clock."""
    if len(steps) > 1 or "num_inference_steps" not in kwargs:
        return steps
    twice = {"num_inference_steps": 2 * kwargs["num_inference_steps"]}
    return record(PROBE_PROMPTS[:1], {**kwargs, **twice}, 2, facts).measured


def _timestep(step: Step, format: DenoiserFormat, pipeline: DiffusionPipeline) -> float | None:
    """The one timestep that all rows and tokens of a step have; `None` where the denoiser was not called."""
    if not step.calls:
        return None
    values = torch.cat([format.timestep(call).flatten().float() for call in step.calls])
    if not torch.equal(values, values[:1].expand_as(values)):
        raise ValueError(
            f"{type(pipeline).__name__} gives its denoiser several values as `{format.timestep_name}` in one step, as "
            "pipelines do that keep parts of a video or image free of noise, and training noises all of a state "
            "alike. Switch that off in pipeline_kwargs, or tune with a pipeline without it."
        )
    return float(values[0])


def _check_seed(step: Step, other: Step, format: DenoiserFormat, pipeline: DiffusionPipeline) -> None:
    """Refuse arguments that differ between two seeds, because training records them once for each prompt."""
    seeded = _changed(step.calls, other.calls, format, tolerance=SEED_TOLERANCE)
    if seeded:
        raise ValueError(
            f"{type(pipeline).__name__} gives its denoiser {', '.join(seeded)}, which depends on a sample's seed, and "
            "one recording of each prompt serves all its samples. Tune with a pipeline without it, and use the "
            "adapter in this one."
        )


def _batch_axes(
    record: Record, pipeline: DiffusionPipeline, kwargs: dict[str, Any], format: DenoiserFormat
) -> dict[str, Any]:
    """Batch axes of the conditioning, from the arguments of calls for two and for three prompts."""
    prompts = (PROBE_PROMPTS * 2)[1:]
    two, three = (map(format.conditioning, record(prompts[:n], kwargs, steps=1).first.calls) for n in (2, 3))
    axes: Any = None
    for for_two, for_three in zip(two, three, strict=True):
        for name in for_two:
            try:
                axes = merge_axes(axes, {name: find_batch_axes(for_two[name], for_three[name])})
            except ValueError as error:
                raise ValueError(
                    f"{type(pipeline).__name__}: the batch axis of its denoiser's argument `{name}` cannot be "
                    f"determined, because {error}. Override DenoiserFormat.conditioning (docs/models.md)."
                ) from error
    return axes or {}


def _fit_clock(steps: list[StepFacts], pipeline: DiffusionPipeline) -> tuple[float, float]:
    """Affine map between the two clocks; a common one where it fits, because bf16 timesteps are rounded."""
    total = float(pipeline.scheduler.config.num_train_timesteps)
    pairs = [(step.timestep, step.denoiser_timestep) for step in steps if step.denoiser_timestep is not None]
    for scale, offset in ((1.0, 0.0), (1 / total, 0.0), (-1 / total, 1.0)):
        span = abs(scale) * total
        if all(abs(scale * t + offset - m) < 5e-3 * span for t, m in pairs):
            return scale, offset
    (t_0, m_0), (t_1, m_1) = pairs[0], pairs[-1]
    scale = (m_1 - m_0) / (t_1 - t_0)
    return scale, m_0 - scale * t_0


def _sign(step: Step, format: DenoiserFormat, pipeline: DiffusionPipeline) -> int:
    """+1 or -1 by which the scheduler is given the output of an unguided step."""
    output = prediction_of(format, step.outputs[0], format.latents(step.calls[0]))
    # A learned variance may go to the scheduler beside the prediction.
    given = step.model_output[:, : output.shape[1]]
    for sign in (1, -1):
        if output.shape == given.shape and torch.allclose(sign * output.float(), given.float(), rtol=1e-2, atol=1e-3):
            return sign
    raise ValueError(
        f"{type(pipeline).__name__} gives `scheduler.step` something other than plus or minus its denoiser's output; "
        "the prediction cannot be replayed without knowing what it does in between. Override "
        "DenoiserFormat.prediction to do the same, and pass it as denoiser_format (docs/models.md)."
    )


def _changed(
    calls: list[dict[str, Any]], others: list[dict[str, Any]], format: DenoiserFormat, tolerance: float = 0.0
) -> list[str]:
    """Names of the conditioning arguments in which the calls of two steps with as many rows differ."""
    pairs = list(zip(map(format.conditioning, calls), map(format.conditioning, others), strict=False))
    names = dict.fromkeys(name for pair in pairs for own in pair for name in own.keys() - settings_of(own).keys())
    return [name for name in names if not all(nearly_equal(a.get(name), b.get(name), tolerance) for a, b in pairs)]
