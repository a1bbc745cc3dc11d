# SPDX-License-Identifier: Apache-2.0

"""Find modules of a pipeline, such as a ControlNet, whose outputs it hands to its denoiser."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .controls import Control, matching_rows, observe_results
from .denoiser_format import DenoiserFormat
from .recording import PROBE_PROMPTS, Recording
from .smallest_call import denoisers_of
from .stand_in import answer_like
from .tree import find_batch_axes, tensors_in


def find_controls(
    pipeline: DiffusionPipeline,
    record: Callable[..., Recording],
    kwargs: dict[str, Any],
    format: DenoiserFormat,
) -> tuple[Recording, tuple[Control, ...]]:
    """
    Record a step of one prompt, and find the modules whose outputs are among the denoiser's arguments in it.

    They compute once, for the layout of their outputs. Which outputs are handed on, and where, is seen from calls with
    stand-ins that return noise, because outputs of zero (a scale of 0 in the first step) look all alike.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
        record (`Callable`):
            [`record_call`] of this pipeline, with a stand-in for its denoiser.
        kwargs (`dict`):
            Arguments of the sampling call.
        format ([`DenoiserFormat`]):
            Format of the denoiser.

    Returns:
        The recording and the modules.

    Raises:
        `ValueError`: the batch axis of one of a module's arguments cannot be determined.
    """
    modules, formats = {}, {}
    for name, module in getattr(pipeline, "components", {}).items():
        if isinstance(module, torch.nn.Module) and not any(module is own for own in denoisers_of(pipeline)):
            with suppress(ValueError):  # it takes no timestep
                formats[name], modules[name] = DenoiserFormat.of(module), module
    with observe_results(modules) as computed:
        recording = record(PROBE_PROMPTS[:1], kwargs, steps=1)
    candidates = [
        Control(name, modules[name], formats[name], format, answer, {}, {})
        for name, (own, output) in computed.items()
        if isinstance(latents := formats[name].latents(own), torch.Tensor)
        and (answer := answer_like(latents, output, of_any_axes=True)) is not None
    ]
    if not candidates:
        return recording, ()
    prompts, seen = (PROBE_PROMPTS * 2)[1:], []
    for count in (2, 3):
        with observe_results(modules) as results:
            step = record(prompts[:count], kwargs, steps=1, controls=candidates).first
        seen.append((step.calls[0], results))
    (call, two), (_, three) = seen
    controls = []
    for candidate in candidates:
        name = candidate.name
        sources = _sources(format.conditioning(call), two[name][1])
        if sources:
            own = (candidate.format.conditioning(results[name][0]) for results in (two, three))
            controls.append(replace(candidate, sources=sources, batch_axes=_batch_axes(pipeline, name, *own)))
    return recording, tuple(controls)


def _sources(conditioning: dict[str, Any], output: Any) -> dict[str, Any]:
    """Those of the denoiser's arguments that are outputs, with the numbers of these outputs in their places."""
    outputs = tensors_in(output)
    numbers = {name: _numbers(value, outputs) for name, value in conditioning.items() if tensors_in(value)}
    return {name: found for name, found in numbers.items() if None not in tensors_in(found, int | None)}


def _numbers(value: Any, outputs: list[torch.Tensor]) -> Any:
    """The number of the output that each tensor of a tree is, in some of its rows; `None` for what is no output."""
    if isinstance(value, dict):
        return {name: _numbers(part, outputs) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_numbers(part, outputs) for part in value)
    if not isinstance(value, torch.Tensor):
        return None
    rows = (matching_rows(value, output) for output in outputs)
    return next((number for number, found in enumerate(rows) if found and max(found) >= 0), None)


def _batch_axes(pipeline: DiffusionPipeline, name: str, two: dict[str, Any], three: dict[str, Any]) -> dict[str, Any]:
    """Batch axes of a module's own arguments, from its calls for two and three prompts."""
    axes = {}
    for argument, value in two.items():
        try:
            axes[argument] = find_batch_axes(value, three[argument])
            if axes[argument] == 0 and not isinstance(value, torch.Tensor):
                raise ValueError("it is a list that grows with the prompts")
        except ValueError as error:
            raise ValueError(
                f"{type(pipeline).__name__}: training runs its `{name}` for many prompts, and the batch axis of its "
                f"argument `{argument}` cannot be determined, because {error}. Hand the same images to all "
                "prompts in pipeline_kwargs, or tune with a pipeline without it."
            ) from error
    return axes
