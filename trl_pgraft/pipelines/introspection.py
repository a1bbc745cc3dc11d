# SPDX-License-Identifier: Apache-2.0

"""Determine how a pipeline calls its denoiser, from recordings: what one call does not show, several calls do.

The denoiser itself makes one call for one image, at the smallest size that the pipeline takes, which shows the layout
of its output. All else is recorded with a stand-in in its place: arguments, branches, guidance scale and timesteps of
every step at the real size, batch axes from two and three prompts, the conditional branch from an unguided call.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline

from .denoiser_call import DenoiserCall, branches_of, denoiser_of, prediction_of
from .denoiser_format import DenoiserFormat
from .inputs import parameters_of
from .recording import PROBE_PROMPTS, Recording, Step, record_call
from .schedulers import Sampler, run_on_known_data, sampler_of
from .stand_in import answered_by, smallest_answer
from .tree import find_batch_axes, merge_axes


# `record_call` of one pipeline, with a stand-in for its denoiser.
Record = Callable[..., Recording]
GUIDANCE_ARGUMENTS = ("true_cfg_scale", "guidance_scale")
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
    """

    timestep: float
    denoiser_timestep: float | None
    branches: int
    guidance_scale: float | None
    changed: list[str]


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
    answer = smallest_answer(pipeline, kwargs, format)
    stand_in = functools.partial(answered_by, pipeline, answer, format.latents_name)
    record: Record = functools.partial(record_call, pipeline, stand_in=stand_in)
    recording = record(PROBE_PROMPTS[:1], kwargs, steps=1)
    sampler, first = sampler_of(recording), recording.first
    run_on_known_data(sampler)  # refuses schedulers that the rest would stumble on
    branches = _count_branches(first, format, pipeline)
    _check_seed(first, record(PROBE_PROMPTS[:1], kwargs, steps=1, seed=1).first, format, pipeline)
    off, unguided = ({}, first) if branches == 1 else _guidance_off(record, pipeline, kwargs, format)
    axes = _batch_axes(record, pipeline, kwargs, format)
    conditional = _conditional_branch(record, pipeline, kwargs, off, (first, unguided), axes, format) if off else 0
    sign, nominal = _sign(unguided, format, pipeline), kwargs.get(*off) if off else None

    def facts(step: Step) -> StepFacts:
        shown = float(format.timestep(step.calls[0]).flatten()[0]) if step.calls else None
        rows = _rows(step, format)
        scale = _guidance_scale(step, format, conditional, sign, nominal) if rows == 2 else 1.0 if rows == 1 else None
        changed = _changed(first.calls, step.calls, format) if rows == branches else []
        return StepFacts(step.timestep, shown, rows, scale, changed)

    count, two_steps = len(sampler.timesteps), list[StepFacts]()
    if count == 1 and "num_inference_steps" in kwargs:  # one pair of timesteps does not determine a clock
        twice = 2 * kwargs["num_inference_steps"]
        two_steps = record(PROBE_PROMPTS[:1], {**kwargs, "num_inference_steps": twice}, 2, facts).measured
    # Left after the last step, so that no image is decoded.
    steps = record(PROBE_PROMPTS[:1], kwargs, count, facts).measured
    call = DenoiserCall(
        format=format,
        timestep_dtype=format.timestep(first.calls[0]).dtype,
        clock=_fit_clock(two_steps or steps, pipeline),
        sign=sign,
        calls_per_step=len(first.calls),
        branches=branches,
        conditional_branch=conditional,
        batch_axes=axes,
        guidance_scale=steps[0].guidance_scale,
    )
    return Introspection(call, sampler, send_to_device(first.calls, "meta"), steps)


def _check_seed(step: Step, other: Step, format: DenoiserFormat, pipeline: DiffusionPipeline) -> None:
    """Refuse arguments that differ between two seeds, because training records them once for each prompt."""
    seeded = _changed(step.calls, other.calls, format, tolerance=SEED_TOLERANCE)
    if seeded:
        raise ValueError(
            f"{type(pipeline).__name__} gives its denoiser {', '.join(seeded)}, which depends on a sample's seed, as "
            "the residuals of a ControlNet do, and a recording of each prompt serves all its samples. Tune with a "
            "pipeline without it, such as the one without the ControlNet, and use the adapter in this one."
        )


def _rows(step: Step, format: DenoiserFormat) -> int:
    """Rows of latents that the denoiser was given in a step: of one image, its branches."""
    return sum(format.latents(call).shape[0] for call in step.calls)


def _count_branches(step: Step, format: DenoiserFormat, pipeline: DiffusionPipeline) -> int:
    branches = _rows(step, format)
    if branches > 2:
        raise ValueError(
            f"{type(pipeline).__name__} calls its denoiser on {branches} branches a step; classifier-free guidance "
            "with two (conditional, unconditional) is what can be trained. Switch further guidance off in "
            "pipeline_kwargs."
        )
    return branches


def _guidance_off(
    record: Record, pipeline: DiffusionPipeline, kwargs: dict[str, Any], format: DenoiserFormat
) -> tuple[dict[str, float], Step]:
    """The argument and value, 1.0 or else 0.0, that switch guidance off, so that one branch is left; and that step."""
    names = [name for name in GUIDANCE_ARGUMENTS if name in parameters_of(pipeline)]
    for off in ({name: value} for value in (1.0, 0.0) for name in names):
        step = record(PROBE_PROMPTS[:1], {**kwargs, **off}, steps=1).first
        if _rows(step, format) == 1:
            return off, step
    raise ValueError(
        f"{type(pipeline).__name__} calls its denoiser on two branches, and setting {' or '.join(names) or 'nothing'} "
        "to 1.0 leaves both, so the conditional branch cannot be determined. Sample without guidance: switch it off "
        "in pipeline_kwargs."
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


def _conditional_branch(
    record: Record,
    pipeline: DiffusionPipeline,
    kwargs: dict[str, Any],
    off: dict[str, float],
    first: tuple[Step, Step],
    axes: dict[str, Any],
    format: DenoiserFormat,
) -> int:
    """Index of the branch that equals the recording with guidance off; `first` has both for the first prompt."""
    for prompt in PROBE_PROMPTS:
        guided, plain = first
        if prompt != PROBE_PROMPTS[0]:
            guided, plain = (record([prompt], {**kwargs, **own}, steps=1).first for own in ({}, off))
        wanted = format.conditioning(plain.calls[0])
        matches = [
            index
            for index, part in enumerate(branches_of(guided.calls, format, axes, 1))
            if all(_equal(part[name], wanted[name]) for name in part)
        ]
        if len(matches) == 1:
            return matches[0]
        if not matches:
            raise ValueError(
                f"{type(pipeline).__name__}: no branch of its guided call equals its call with guidance off, so the "
                "conditional branch cannot be determined. Sample without guidance (sample_guidance_scale=1.0)."
            )
        # The negative prompt may be the very prompt of this recording.
    raise ValueError(
        f"{type(pipeline).__name__}: both branches of its guided call are the same, so there is no guidance to train "
        "with. Give negative inputs that differ from the prompt's, or sample with sample_guidance_scale=1.0."
    )


def _guidance_scale(
    step: Step, format: DenoiserFormat, conditional: int, sign: int, given: float | None
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
        # Some pipelines add w (c - u) to c. In half precision only these values identify guidance.
        rounding = torch.finfo(outputs[0].dtype).eps / 2 * scale.abs() * parts.norm()
        for nominal in (given, given + 1):
            if math.isclose(scale, nominal, rel_tol=1e-2) and residual <= tolerance + rounding:
                return float(nominal)
    return float(scale) if residual <= tolerance else None


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
    names = dict.fromkeys(name for pair in pairs for own in pair for name in own)
    return [name for name in names if not all(_equal(a.get(name), b.get(name), tolerance) for a, b in pairs)]


def _equal(one: Any, other: Any, tolerance: float = 1e-3) -> bool:
    """Whether arguments are equal, tensors to a share of their norm."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape:
        return bool((one.float() - other.float()).norm() <= tolerance * one.float().norm())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name], tolerance) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return all(_equal(*pair, tolerance) for pair in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor | dict | list | tuple) or type(one) is not type(other):
        return False
    return one == other or not isinstance(one, float | int | str)
