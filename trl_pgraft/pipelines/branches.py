# SPDX-License-Identifier: Apache-2.0

"""Branches of classifier-free guidance in recorded steps: how many, which is the prompt's, and with which scale."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .denoiser_call import branches_of, prediction_of
from .denoiser_format import DenoiserFormat
from .inputs import parameters_of
from .recording import PROBE_PROMPTS, Recording, Step
from .tree import nearly_equal


# `record_call` of one pipeline, with a stand-in for its denoiser.
Record = Callable[..., Recording]
GUIDANCE_ARGUMENTS = ("true_cfg_scale", "guidance_scale")


def rows_of(step: Step, format: DenoiserFormat) -> int:
    """Rows of latents that the denoiser was given in a step: of one image, its branches."""
    return sum(format.latents(call).shape[0] for call in step.calls)


def count_branches(step: Step, format: DenoiserFormat, pipeline: DiffusionPipeline) -> int:
    """1 or 2 branches of one image; more are refused."""
    branches = rows_of(step, format)
    if branches > 2:
        raise ValueError(
            f"{type(pipeline).__name__} calls its denoiser on {branches} branches a step; classifier-free guidance "
            "with two (conditional, unconditional) is what can be trained. Switch further guidance off in "
            "pipeline_kwargs."
        )
    return branches


def guidance_off(
    record: Record, pipeline: DiffusionPipeline, kwargs: dict[str, Any], format: DenoiserFormat
) -> tuple[dict[str, float], Step]:
    """The argument and value, 1.0 or else 0.0, that switch guidance off, so that one branch is left; and that step."""
    names = [name for name in GUIDANCE_ARGUMENTS if name in parameters_of(pipeline)]
    for off in ({name: value} for value in (1.0, 0.0) for name in names):
        step = record(PROBE_PROMPTS[:1], {**kwargs, **off}, steps=1).first
        if rows_of(step, format) == 1:
            return off, step
    raise ValueError(
        f"{type(pipeline).__name__} calls its denoiser on two branches, and setting {' or '.join(names) or 'nothing'} "
        "to 1.0 leaves both, so the conditional branch cannot be determined. Sample without guidance: switch it off "
        "in pipeline_kwargs."
    )


def conditional_branch(
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
            if all(nearly_equal(part[name], wanted[name]) for name in part)
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


def measured_scale(
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
